"""The requests that answer one call: one for each choice of each prompt."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from radixkv.config import SamplingParams
from radixkv.engine.async_engine import AsyncEngine
from radixkv.engine.outputs import Progress, RequestOutput, Usage
from radixkv.serving.errors import as_api_error, bad_request, shutting_down

Ids: TypeAlias = "NDArray[np.int32]"


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheUse:
    """How a call uses the cache: the arguments of `AsyncEngine.generate` of the same names."""

    extra_key: str | None = None
    cache_salt: str | None = None
    priority: int = 0
    prefix_cache: bool = True

    def as_arguments(self) -> dict[str, Any]:
        """By name."""
        return asdict(self)


class Keep(NamedTuple):
    """A prefix that is to be kept for a time once it is in the cache."""

    prefix: Ids
    keep_for_s: float


class Piece(NamedTuple):
    """What a choice gained; within a call, choices are numbered through."""

    number: int
    progress: Progress


class Generation:
    """The choices of one call, those of each prompt in a row.

    Invariant: once its `outputs` or `pieces` are over or were cancelled, none of its requests waits or runs.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        prompts: Sequence[Ids],
        params: SamplingParams,
        cache_use: CacheUse,
        *,
        keeps: Sequence[Keep] = (),
        on_prompt: Callable[[Ids, CacheUse], object] = lambda prompt, use: None,
        on_output: Callable[[RequestOutput], object] = lambda output: None,
        output_ids: Sequence[int] = (),
    ) -> None:
        """A generation that has not begun.

        Args:
            keeps: prefixes of the prompts that are to be kept.
            on_prompt: called with each prompt before it is submitted, if it is looked up in the cache.
            on_output: called with the output of each choice that came to its end.
            output_ids: the first ids of the output, if another server made them; for one choice of one prompt.

        Raises: ApiError if there are several choices, and `output_ids`.
        """
        if output_ids and len(prompts) * params.n > 1:
            raise bad_request("radixkv_output_ids are for one choice of one prompt", "radixkv_output_ids")
        self._output_ids = output_ids
        self._engine = engine
        self._params = params
        self._cache_use = cache_use
        self._keeps = keeps
        self._on_prompt = on_prompt
        self._on_output = on_output
        self.prompts = prompts

    @property
    def num_choices(self) -> int:
        """Choices of each prompt."""
        return self._params.n

    @property
    def has_one_choice(self) -> bool:
        """Whether it is one choice of one prompt."""
        return len(self.prompts) * self.num_choices == 1

    def prompt_of(self, index: int) -> Ids:
        """The prompt of a choice."""
        return self.prompts[index // self.num_choices]

    async def outputs(self) -> list[RequestOutput]:
        """The output of each choice. Raises: as `AsyncEngine.generate`; ApiError if one failed."""
        if self._keeps or self._output_ids:  # a prefix is to be kept while its request still holds it
            pieces = [piece async for piece in self.pieces() if piece.progress.output is not None]
            ordered = sorted(pieces, key=lambda piece: piece.number)
            return [piece.progress.output for piece in ordered if piece.progress.output is not None]
        self._announce()
        outputs = await self._engine.generate(list(self.prompts), self._params, **self._cache_use.as_arguments())
        return [self._checked(choice) for output in outputs for choice in output.choices]

    async def pieces(self, consume: Callable[[Piece], bool] = lambda piece: False) -> AsyncGenerator[Piece]:
        """What each choice gains, as it comes; the last one of each carries its output. Raises: as `outputs`.

        consume: of one prompt, is offered pieces between the first and the last, as by `AsyncEngine.stream`.
        """
        self._announce()
        use = {**self._cache_use.as_arguments(), "output_ids": self._output_ids}
        unkept = set(range(len(self.prompts)))
        if len(self.prompts) == 1:

            def consume_settled(progress: Progress) -> bool:
                return not unkept and consume(Piece(progress.choice_index, progress))

            one = self._engine.stream(self.prompts[0], self._params, **use, consume=consume_settled)
            async with aclosing(one) as stream:
                async for progress in stream:
                    if progress.output is not None or unkept:
                        await self._settle(0, progress, unkept)
                    yield Piece(progress.choice_index, progress)
            return
        streams = [self._engine.stream(prompt, self._params, **use) for prompt in self.prompts]
        async with aclosing(_merged(streams)) as pieces:
            async for number, progress in pieces:
                if progress.output is not None or unkept:
                    await self._settle(number, progress, unkept)
                yield Piece(number * self.num_choices + progress.choice_index, progress)

    async def _settle(self, number: int, progress: Progress, unkept: set[int]) -> None:
        """Do what the first and the last progress of a prompt ask for. Raises: ApiError if it failed."""
        if progress.output is not None:
            self._checked(progress.output)
            await self._keep()
        elif number in unkept:
            unkept.discard(number)
            await self._keep()

    def usage(self, outputs: Sequence[RequestOutput]) -> Usage:
        """What `outputs`, one for each choice, used. The prompt of several choices counts once."""
        firsts = range(0, len(outputs), self.num_choices)
        return Usage.total(Usage.of(outputs[first : first + self.num_choices]) for first in firsts)

    def _announce(self) -> None:
        if self._cache_use.prefix_cache:
            for prompt in self.prompts:
                self._on_prompt(prompt, self._cache_use)

    async def _keep(self) -> None:
        """Keep what is to be kept: from the first token on, and anew when the output has been added to the prefix."""
        use = self._cache_use
        for keep in self._keeps:
            await self._engine.keep(keep.prefix, keep.keep_for_s, extra_key=use.extra_key, cache_salt=use.cache_salt)

    def _checked(self, output: RequestOutput) -> RequestOutput:
        """`output`, which came to its own end. Raises: ApiError if it failed, or the server was shut down."""
        self._on_output(output)
        if output.error is not None:
            raise as_api_error(output.error)
        if output.finish_reason == "abort":
            raise shutting_down()
        return output


async def _merged(streams: Sequence[AsyncGenerator[Progress]]) -> AsyncGenerator[Piece]:
    """The pieces of all streams, in the order in which they come."""
    queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue(maxsize=len(streams))

    async def pump(index: int, stream: AsyncGenerator[Progress]) -> None:
        try:
            async with aclosing(stream):
                async for progress in stream:
                    await queue.put(Piece(index, progress))
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        num_open = len(tasks)
        while num_open:
            piece = await queue.get()
            if isinstance(piece, Exception):
                raise piece
            if piece is None:
                num_open -= 1
            else:
                yield piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
