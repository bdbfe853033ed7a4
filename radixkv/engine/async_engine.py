"""The engine for asyncio: a thread computes, and any number of coroutines wait."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from radixkv.cache.insight.explanation import Explanation
from radixkv.cache.namespace import Namespace
from radixkv.cache.quotas.accounts import QuotaKey
from radixkv.cache.token_ids import TokenIds
from radixkv.config import CacheQuota, EngineConfig
from radixkv.config.checks import checked_int
from radixkv.engine.arguments import CacheOptions, Prompt, as_list_of_params, as_list_of_prompts, checked_cache_options
from radixkv.engine.assembly import EngineParts, assemble
from radixkv.engine.core import EngineCore
from radixkv.engine.core_thread import CoreThread, Reader
from radixkv.engine.drafts.drafter import Drafter
from radixkv.engine.intake import NO_IDS
from radixkv.engine.outputs import Progress, RequestOutput
from radixkv.engine.resolved_config import ResolvedConfig
from radixkv.engine.results import EngineStats, FinishedOutbox, GatheredOutputs, Outbox, ResetCache
from radixkv.engine.sampling import SamplingParams
from radixkv.models.loader import load, weight_files
from radixkv.publish.publisher import EventSources

T = TypeVar("T")
MAX_WAITING = 1024
SHORT_CHARACTERS = 512  # of texts that the event loop encodes itself: it takes little longer than to ask a thread


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
        drafter: Drafter | None = None,
    ) -> None:
        """Take over `model` as it is, on its device and in its dtype.

        Args:
            max_waiting: how many requests may wait for pages; one more is refused with QueueFullError.
            drafter: as in `Engine`.

        Raises: UnsupportedModelError, UnsupportedBackendError, ConfigError.
        """
        self._set_up(assemble(model, tokenizer, config, drafter=drafter), max_waiting)

    @classmethod
    def from_parts(cls, parts: EngineParts, *, max_waiting: int = MAX_WAITING) -> AsyncEngine:
        """An engine over parts that `assemble` built, some of them perhaps exchanged."""
        engine = cls.__new__(cls)
        engine._set_up(parts, max_waiting)
        return engine

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        max_waiting: int = MAX_WAITING,
        drafter: Drafter | None = None,
        **settings: Any,
    ) -> AsyncEngine:
        """Load "demo", a local directory or a hub id, and make an engine of it. Blocks while it loads.

        `settings` are the fields of `EngineConfig`.

        Raises: ModelNotFoundError, UnsupportedModelError, UnsupportedBackendError, ConfigError.
        """
        config = EngineConfig.from_keywords(settings)
        model, tokenizer = load(name_or_path, dtype=config.dtype, device=config.device)
        parts = assemble(model, tokenizer, config, weight_files=weight_files(name_or_path), drafter=drafter)
        return cls.from_parts(parts, max_waiting=max_waiting)

    def _set_up(self, parts: EngineParts, max_waiting: int) -> None:
        max_waiting = checked_int("max_waiting", max_waiting, 1)
        self._parts = parts
        self._intake = parts.new_intake()
        core = EngineCore(parts)
        self._event_sources = core.event_sources
        self._thread = CoreThread(core, max_waiting=max_waiting)
        self._finalizer = weakref.finalize(self, self._thread.stop)

    @property
    def config(self) -> ResolvedConfig:
        """The settings, with "auto" resolved."""
        return self._parts.config

    @property
    def event_sources(self) -> EventSources | None:
        """Where events say what is cached; None without `kv_events`."""
        return self._event_sources

    @property
    def tokenizer(self) -> Any | None:
        """The tokenizer as it was given."""
        return self._parts.tokenizer

    @property
    def max_context_tokens(self) -> int:
        """The most tokens that prompt and output of one request may have."""
        return self._parts.limit.tokens

    @property
    def vocab_size(self) -> int:
        """Ids that the model has embeddings for."""
        return self._parts.vocab_size

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end an output."""
        return self._parts.eos_ids

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
        prefix_cache: bool = True,
        on_finish: Callable[[RequestOutput], object] | None = None,
    ) -> list[RequestOutput]:
        """Continue each prompt; returns one output for each, in the order of the prompts.

        Arguments and errors as `Engine.generate`; also QueueFullError, EngineFailedError, ClosedError. If the task is
        cancelled, the requests are aborted and hold nothing.
        """
        prompt_list = as_list_of_prompts(prompts)
        params_list = as_list_of_params(params, len(prompt_list))
        options = checked_cache_options(extra_key, cache_salt, priority, keep_for_s, prefix_cache)
        all_ids = await self._checked(prompt_list, params_list, options)
        by_prompt = [
            self._intake.make(ids, p, options, streams=False) for ids, p in zip(all_ids, params_list, strict=True)
        ]
        requests = [request for choices in by_prompt for request in choices]
        gathered, reader = GatheredOutputs(by_prompt), Reader(FinishedOutbox())
        try:
            self._thread.submit(requests, reader)
            while (outputs := gathered.take()) is None:
                for output in await reader.take_outputs():
                    whole = gathered.add(output)
                    if whole is not None and on_finish is not None:
                        on_finish(whole)
        finally:
            self._thread.abandon([request.id for request in requests])
        return outputs

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        extra_key: str | None = None,
        cache_salt: str | None = None,
        priority: int = 0,
        keep_for_s: float | None = None,
        prefix_cache: bool = True,
        output_ids: TokenIds = NO_IDS,
        consume: Callable[[Progress], bool] | None = None,
    ) -> AsyncGenerator[Progress]:
        """Continue one prompt, piece by piece; the last piece carries the `RequestOutput`.

        With `n` above 1 the pieces of all choices come as they are made, each with its `choice_index`, and the
        last one of each choice carries its output.

        The request starts with the first `anext`. A slow reader holds nobody up: what it has not taken is joined.
        Closing the iterator aborts the request.

        Args:
            output_ids: the output's first tokens, if another engine made them: it goes on from there. They count as
                output, and the first piece tells them again, with their text. A request that draws its tokens draws
                the later ones anew, whatever its seed.
            consume: is offered each piece that comes while the iterator waits, but for the last one of a choice. If it
                returns True, it has taken the piece, and the iterator waits on; this costs less than to resume a
                task. It is called in the event loop and must not block.

        Raises: as `generate`, and the request's own error where it occurs; InvalidRequestError if `output_ids` are
            given with several choices, logprobs or a `logits_transform`.
        """
        options = checked_cache_options(extra_key, cache_salt, priority, keep_for_s, prefix_cache)
        return self._stream(prompt, params or SamplingParams(), options, output_ids, consume)

    async def abort(self, request_id: int) -> bool:
        """End a waiting or running request now, with all its choices; its reader gets what it has, and "abort".

        Returns: True if the request was waiting or running.
        """
        return bool(await self._call(lambda core: self._abort_in(core, request_id)))

    async def stats(self) -> EngineStats:
        """What the engine holds now, and what it did since it was made."""
        stats: EngineStats = await self._call(EngineCore.stats)
        return stats

    async def observe(self, look: Callable[[EngineCore], T]) -> T:
        """What `look` makes of the core, in the core's thread between two steps. It must be quick and change nothing.

        Raises: what `look` raises; ClosedError, EngineFailedError.
        """
        seen: T = await self._call(look)
        return seen

    async def set_quotas(self, quotas: Mapping[QuotaKey, CacheQuota]) -> None:
        """Guarantee shares of the pool to namespaces; as `Engine.set_quotas`."""
        await self._call(lambda core: core.set_quotas(quotas))

    async def reset_cache(self) -> ResetCache:
        """Forget every prefix that no running request reads. O(nodes)."""
        reset: ResetCache = await self._call(EngineCore.reset_cache)
        return reset

    async def explain(
        self, prompt: Prompt, *, extra_key: str | None = None, cache_salt: str | None = None, as_admin: bool = False
    ) -> Explanation:
        """How far `prompt` is cached now, and why not further; as `Engine.explain`."""
        namespace, ids = Namespace.of(extra_key, cache_salt), await self._ids_of(prompt)
        found: Explanation = await self._call(lambda core: core.explain(ids, namespace, as_admin=as_admin))
        return found

    def explain_before(
        self, ids: NDArray[np.int32], *, extra_key: str | None = None, cache_salt: str | None = None
    ) -> Awaitable[Explanation]:
        """As `explain`, of what is cached before any request that is submitted after this call can change it.

        Raises: ClosedError, EngineFailedError.
        """
        namespace = Namespace.of(extra_key, cache_salt)
        return asyncio.wrap_future(self._thread.call(lambda core: core.explain(ids, namespace)))

    async def keep(
        self,
        prefix: Prompt,
        keep_for_s: float,
        *,
        extra_key: str | None = None,
        cache_salt: str | None = None,
    ) -> int:
        """Evict what is cached of `prefix` only if nothing else can be, for a time; as `Engine.keep`."""
        namespace, ids = Namespace.of(extra_key, cache_salt), await self._ids_of(prefix)
        return int(await self._call(lambda core: core.keep(ids, keep_for_s, namespace)))

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> NDArray[np.int32]:
        """Ids of `text`, by default as a prompt; as `Engine.encode`."""
        if len(text) <= SHORT_CHARACTERS:
            ids = self._intake.encode_unless_busy(text, add_special_tokens=add_special_tokens)
            if ids is not None:
                return ids
        return await asyncio.to_thread(self._intake.encode, text, add_special_tokens=add_special_tokens)

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

    async def _stream(
        self,
        prompt: Prompt,
        params: SamplingParams,
        options: CacheOptions,
        output_ids: TokenIds,
        consume: Callable[[Progress], bool] | None,
    ) -> AsyncGenerator[Progress]:
        (ids,) = await self._checked([prompt], [params], options)
        known = self._intake.check_output(ids, params, output_ids)
        requests = self._intake.make(ids, params, options, streams=True, output_ids=known)
        if requests[0].is_finished:
            whole = requests[0].take_progress()
            assert whole is not None, requests
            yield whole
            return
        reader = Reader(Outbox(), consume)
        try:
            self._thread.submit(requests, reader)
            num_running = len(requests)
            while num_running:
                progress = await reader.take_progress()
                output = progress.output
                if output is not None:
                    num_running -= 1
                    if output.error is not None:
                        raise output.error
                yield progress
        finally:
            self._thread.abandon([request.id for request in requests])

    async def _checked(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams], options: CacheOptions
    ) -> list[NDArray[np.int32]]:
        """The ids of all prompts, encoded in a thread. Raises: as `Intake.check_all`."""
        if not any(isinstance(prompt, str) for prompt in prompts):
            return self._intake.check_all(prompts, params, options.namespace)
        return await asyncio.to_thread(self._intake.check_all, prompts, params, options.namespace)

    async def _ids_of(self, prompt: Prompt) -> NDArray[np.int32]:
        """The ids of a text, encoded in a thread, or a copy of ids. Raises: as `Intake.ids_of`."""
        if isinstance(prompt, str):
            return await asyncio.to_thread(self._intake.ids_of, prompt)
        return self._intake.ids_of(prompt)

    async def _call(self, function: Callable[[EngineCore], object]) -> Any:
        return await asyncio.wrap_future(self._thread.call(function))

    def _abort_in(self, core: EngineCore, request_id: int) -> bool:
        progress = core.abort(request_id)
        self._thread.deliver(progress)
        return bool(progress)
