"""The engine for asyncio: a thread computes, and any number of coroutines wait."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from radixkv.cache.token_ids import TokenIds
from radixkv.config import EngineConfig
from radixkv.config.checks import checked_int
from radixkv.engine.arguments import CacheOptions, Prompt, as_list_of_params, as_list_of_prompts, checked_cache_options
from radixkv.engine.assembly import EngineParts, assemble
from radixkv.engine.core import EngineCore
from radixkv.engine.core_thread import CoreThread, Reader
from radixkv.engine.request import Progress, RequestOutput
from radixkv.engine.resolved_config import ResolvedConfig
from radixkv.engine.results import EngineStats, FinishedOutbox, Outbox
from radixkv.engine.sampling import SamplingParams
from radixkv.models.loader import load

MAX_WAITING = 1024


class AsyncEngine:
    """As `Engine`, for asyncio: the model runs in a thread of its own, and nothing here blocks the event loop.

    Cancelling a task that waits for a request aborts the request; so does leaving a stream. If the core fails, all who
    wait get an `EngineFailedError`. Coroutines of several event loops may share one engine. Use it with `async with`,
    or call `close`.

    >>> import asyncio, radixkv
    >>> async def main() -> None:
    ...     async with radixkv.AsyncEngine.from_pretrained("demo", kv_cache_tokens=4096) as engine:
    ...         params = radixkv.SamplingParams(max_tokens=8)
    ...         outputs = await engine.generate(["ROMEO:", "JULIET:"], params)
    ...         text = "".join([piece.text async for piece in engine.stream("ROMEO:", params)])
    ...         print(len(outputs), text == outputs[0].text)
    >>> asyncio.run(main())
    2 True
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any | None = None,
        config: EngineConfig | None = None,
        *,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        """Take over `model` as it is, on its device and in its dtype.

        Args:
            max_waiting: how many requests may wait for pages; one more is refused with QueueFullError.

        Raises: UnsupportedModelError, UnsupportedBackendError, ConfigError.
        """
        self._set_up(assemble(model, tokenizer, config), max_waiting)

    @classmethod
    def from_parts(cls, parts: EngineParts, *, max_waiting: int = MAX_WAITING) -> AsyncEngine:
        """An engine over parts that `assemble` built, some of them perhaps exchanged."""
        engine = cls.__new__(cls)
        engine._set_up(parts, max_waiting)
        return engine

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, max_waiting: int = MAX_WAITING, **settings: Any
    ) -> AsyncEngine:
        """Load "demo", a local directory or a hub id, and make an engine of it. Blocks while it loads.

        `settings` are the fields of `EngineConfig`.

        Raises: ModelNotFoundError, UnsupportedModelError, UnsupportedBackendError, ConfigError.
        """
        config = EngineConfig.from_keywords(settings)
        model, tokenizer = load(name_or_path, dtype=config.dtype, device=config.device)
        return cls(model, tokenizer, config, max_waiting=max_waiting)

    def _set_up(self, parts: EngineParts, max_waiting: int) -> None:
        max_waiting = checked_int("max_waiting", max_waiting, 1)
        self._parts = parts
        self._intake = parts.new_intake()
        self._thread = CoreThread(EngineCore(parts), max_waiting=max_waiting)
        self._finalizer = weakref.finalize(self, self._thread.stop)

    @property
    def config(self) -> ResolvedConfig:
        """The settings, with "auto" resolved."""
        return self._parts.config

    @property
    def tokenizer(self) -> Any | None:
        """The tokenizer as it was given."""
        return self._parts.tokenizer

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> NDArray[np.int32]:
        """Ids of `text`, by default as a prompt; as `Engine.encode`."""
        return await asyncio.to_thread(self._intake.encode, text, add_special_tokens=add_special_tokens)

    def known_ids(self, ids: TokenIds) -> NDArray[np.int32]:
        """`ids` as int32, all of them in the model's vocabulary. Raises: InvalidTokenIdsError, TokenIdsTypeError."""
        return self._intake.known_ids(ids)

    def require_tokenizer(self, what_for: str) -> Any:
        """The tokenizer. Raises: MissingTokenizerError if the model came without one."""
        return self._intake.require_tokenizer(what_for)

    async def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        extra_key: str | None = None,
        cache_salt: str | None = None,
        priority: int = 0,
        keep_for_s: float | None = None,
        on_finish: Callable[[RequestOutput], object] | None = None,
    ) -> list[RequestOutput]:
        """Continue each prompt; returns the outputs in the order of the prompts.

        Arguments and errors as `Engine.generate`; also QueueFullError, EngineFailedError, ClosedError. If the task is
        cancelled, the requests are aborted and hold nothing.
        """
        prompt_list = as_list_of_prompts(prompts)
        params_list = as_list_of_params(params, len(prompt_list))
        options = checked_cache_options(extra_key, cache_salt, priority, keep_for_s)
        all_ids = await asyncio.to_thread(self._intake.check_all, prompt_list, params_list)
        requests = [
            self._intake.make(ids, p, options, streams=False) for ids, p in zip(all_ids, params_list, strict=True)
        ]
        request_ids = [request.id for request in requests]
        outputs: dict[int, RequestOutput] = {}
        reader = Reader(FinishedOutbox())
        try:
            self._thread.submit(requests, reader)
            while len(outputs) < len(requests):
                for output in await reader.take_outputs():
                    outputs[output.request_id] = output
                    if on_finish is not None:
                        on_finish(output)
        finally:
            self._thread.abandon(request_ids)
        return [outputs[request_id] for request_id in request_ids]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        extra_key: str | None = None,
        cache_salt: str | None = None,
        priority: int = 0,
        keep_for_s: float | None = None,
    ) -> AsyncGenerator[Progress]:
        """Continue one prompt, piece by piece; the last piece carries the `RequestOutput`.

        The request starts with the first `anext`. A slow reader holds nobody up: what it has not taken is joined.
        Closing the iterator aborts the request.

        Raises: as `generate`, and the request's own error where it occurs.
        """
        options = checked_cache_options(extra_key, cache_salt, priority, keep_for_s)
        return self._stream(prompt, params or SamplingParams(), options)

    async def abort(self, request_id: int) -> bool:
        """End a waiting or running request now; its reader gets what it has, with the reason "abort".

        Returns: True if the request was waiting or running.
        """
        return bool(await self._call(lambda core: self._abort_in(core, request_id)))

    async def stats(self) -> EngineStats:
        """What the engine holds now, and what it did since it was made."""
        stats: EngineStats = await self._call(EngineCore.stats)
        return stats

    async def reset_cache(self) -> None:
        """Forget every prefix that no running request reads."""
        await self._call(EngineCore.reset_cache)

    async def check_invariants(self) -> None:
        """Prove the invariants of the cache and the scheduler. For tests. Raises: InvariantError."""
        await self._call(EngineCore.check_invariants)

    async def close(self) -> None:
        """Abort all requests, end the thread and forget the cache; readers that wait get what there is. Idempotent."""
        self._thread.stop()
        await asyncio.to_thread(self._thread.join)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _stream(self, prompt: Prompt, params: SamplingParams, options: CacheOptions) -> AsyncGenerator[Progress]:
        ids = await asyncio.to_thread(self._intake.check, prompt, params)
        request = self._intake.make(ids, params, options, streams=True)
        reader = Reader(Outbox())
        try:
            self._thread.submit([request], reader)
            output: RequestOutput | None = None
            while output is None:
                progress = await reader.take_progress()
                output = progress.output
                if output is not None and output.error is not None:
                    raise output.error
                yield progress
        finally:
            self._thread.abandon([request.id])

    async def _call(self, function: Callable[[EngineCore], object]) -> Any:
        return await asyncio.wrap_future(self._thread.call(function))

    def _abort_in(self, core: EngineCore, request_id: int) -> bool:
        progress = core.abort(request_id)
        if progress is not None:
            self._thread.deliver([progress])
        return progress is not None
