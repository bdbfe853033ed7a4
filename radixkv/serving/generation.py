"""The requests that answer one call: one for each choice of each prompt."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from radixkv.config import SamplingParams
from radixkv.engine.async_engine import AsyncEngine
from radixkv.engine.request import Progress, RequestOutput
from radixkv.serving.errors import as_api_error, shutting_down

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheUse:
    """How a call uses the cache: the arguments of `AsyncEngine.generate` of the same names."""

    extra_key: str | None = None
    cache_salt: str | None = None
    priority: int = 0
    keep_for_s: float | None = None

    def as_arguments(self) -> dict[str, object]:
        """By name."""
        return {
            "extra_key": self.extra_key,
            "cache_salt": self.cache_salt,
            "priority": self.priority,
            "keep_for_s": self.keep_for_s,
        }


class Usage(NamedTuple):
    """What a call used: `cached_tokens` of its `prompt_tokens` were found. A prompt of several choices counts once."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class Piece(NamedTuple):
    """What a choice gained."""

    index: int
    progress: Progress


class Generation:
    """The choices of one call, `num_choices` of each prompt in a row.

    Invariant: once its `outputs` or `pieces` are over or were cancelled, none of its requests waits or runs.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        prompts: Sequence[NDArray[np.int32]],
        params: SamplingParams,
        cache_use: CacheUse,
        *,
        num_choices: int = 1,
        on_output: Callable[[RequestOutput], object] = lambda output: None,
    ) -> None:
        """on_output: called with the output of each choice that came to its end."""
        self._on_output = on_output
        self._engine = engine
        self._cache_use = cache_use
        self.num_choices = num_choices
        self.prompts = [prompt for prompt in prompts for _ in range(num_choices)]
        self.params = [_of_choice(params, number) for _ in prompts for number in range(num_choices)]

    async def outputs(self) -> list[RequestOutput]:
        """The output of each choice. Raises: as `AsyncEngine.generate`; ApiError if one failed."""
        arguments = self._cache_use.as_arguments()
        outputs = await self._engine.generate(self.prompts, self.params, **arguments)  # type: ignore[arg-type]
        return [self._checked(output) for output in outputs]

    async def pieces(self) -> AsyncGenerator[Piece]:
        """What each choice gains, as it comes; the last one of each carries its output. Raises: as `outputs`."""
        arguments = self._cache_use.as_arguments()
        streams = [
            self._engine.stream(prompt, params, **arguments)  # type: ignore[arg-type]
            for prompt, params in zip(self.prompts, self.params, strict=True)
        ]
        async with aclosing(_numbered(streams[0]) if len(streams) == 1 else _merged(streams)) as pieces:
            async for piece in pieces:
                if piece.progress.output is not None:
                    self._checked(piece.progress.output)
                yield piece

    def _checked(self, output: RequestOutput) -> RequestOutput:
        """`output`, which came to its own end. Raises: ApiError if it failed, or the server was shut down."""
        self._on_output(output)
        if output.error is not None:
            raise as_api_error(output.error)
        if output.finish_reason == "abort":
            raise shutting_down()
        return output

    def usage(self, outputs: Sequence[RequestOutput]) -> Usage:
        """What `outputs`, one for each choice, used."""
        firsts = range(0, len(outputs), self.num_choices)
        return Usage(
            prompt_tokens=sum(outputs[first].prompt_tokens for first in firsts),
            cached_tokens=sum(
                min(output.cached_tokens for output in outputs[first : first + self.num_choices]) for first in firsts
            ),
            completion_tokens=sum(len(output.token_ids) for output in outputs),
        )


def _of_choice(params: SamplingParams, number: int) -> SamplingParams:
    """The parameters of one of several choices: a seed is for the first, the next ones count on from there."""
    if number == 0 or params.seed is None:
        return params
    return replace(params, seed=(params.seed + number) % (MAX_SEED + 1))


async def _numbered(stream: AsyncGenerator[Progress]) -> AsyncGenerator[Piece]:
    async with aclosing(stream):
        async for progress in stream:
            yield Piece(0, progress)


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
