"""The engine: prompts in, tokens out, prefixes kept."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from radixkv.cache.insight.explanation import Explanation
from radixkv.cache.namespace import Namespace
from radixkv.cache.prefix_cache import PrefixCache
from radixkv.cache.quotas.accounts import QuotaKey
from radixkv.cache.token_ids import TokenIds
from radixkv.config import CacheQuota, EngineConfig
from radixkv.engine.arguments import CacheOptions, Prompt, as_list_of_params, as_list_of_prompts, checked_cache_options
from radixkv.engine.assembly import EngineParts, assemble
from radixkv.engine.core import EngineCore
from radixkv.engine.drafts.drafter import Drafter
from radixkv.engine.gate import Gate
from radixkv.engine.kv_memory import Pool
from radixkv.engine.outputs import Progress, RequestOutput
from radixkv.engine.request import Request
from radixkv.engine.resolved_config import ResolvedConfig
from radixkv.engine.results import EngineStats, FinishedOutbox, GatheredOutputs, Outbox, ResetCache
from radixkv.engine.sampling import SamplingParams
from radixkv.engine.session import Session
from radixkv.engine.session_file import UserSpecialTokens
from radixkv.models.loader import load, weight_files
from radixkv.publish.publisher import EventSources


class Engine:
    """Generates text with a Hugging Face decoder, and computes a shared prefix only once.

    The engine runs inside the calls of its users: whoever waits for a request runs the steps, which serve all
    requests. Any number of threads may call it. Use it as a context manager, or call `close`.

    >>> import radixkv
    >>> engine = radixkv.Engine.from_pretrained("demo", kv_cache_tokens=4096)
    >>> params = radixkv.SamplingParams(max_tokens=8)
    >>> first, = engine.generate("ROMEO:\\nBut, soft! what light through yonder window breaks?", params)
    >>> again, = engine.generate("ROMEO:\\nBut, soft! what light through yonder window breaks?", params)
    >>> first.cached_tokens, again.cached_tokens > 0, first.token_ids == again.token_ids
    (0, True, True)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any | None = None,
        config: EngineConfig | None = None,
        *,
        drafter: Drafter | None = None,
    ) -> None:
        """Take over `model` as it is, on its device and in its dtype.

        Args:
            drafter: guesses tokens, which the engine checks several at a time, in place of `config.speculate`.

        Raises: UnsupportedModelError, UnsupportedBackendError, ConfigError.
        """
        self._set_up(assemble(model, tokenizer, config, drafter=drafter))

    @classmethod
    def from_parts(cls, parts: EngineParts) -> Engine:
        """An engine over parts that `assemble` built, some of them perhaps exchanged."""
        engine = cls.__new__(cls)
        engine._set_up(parts)
        return engine

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, *, drafter: Drafter | None = None, **settings: Any) -> Engine:
        """Load "demo", a local directory or a hub id, and make an engine of it.

        `drafter` is as in `Engine`; `settings` are the fields of `EngineConfig`.

        Raises: ModelNotFoundError, UnsupportedModelError, UnsupportedBackendError, ConfigError.
        """
        config = EngineConfig.from_keywords(settings)
        model, tokenizer = load(name_or_path, dtype=config.dtype, device=config.device)
        files = weight_files(name_or_path)
        return cls.from_parts(assemble(model, tokenizer, config, weight_files=files, drafter=drafter))

    def _set_up(self, parts: EngineParts) -> None:
        self._parts = parts
        self._core = EngineCore(parts)
        self._intake = parts.new_intake()
        self._gate = Gate()
        self._outboxes: dict[int, Outbox | FinishedOutbox] = {}  # of the requests that a caller waits for
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()

    # -- what it is made of ------------------------------------------------------------------------------------------

    @property
    def config(self) -> ResolvedConfig:
        """The settings, with "auto" resolved."""
        return self._parts.config

    @property
    def event_sources(self) -> EventSources | None:
        """Where events say what is cached; None without `kv_events`."""
        return self._core.event_sources

    @property
    def model(self) -> PreTrainedModel:
        """The model. Its attention runs on pages; on the CPU its linear layers take few tokens through our kernel."""
        return self._parts.model

    @property
    def tokenizer(self) -> Any | None:
        """The tokenizer as it was given."""
        return self._parts.tokenizer

    @property
    def cache(self) -> PrefixCache:
        """Which prefixes are cached in which pages. Read it within `exclusive`."""
        return self._parts.cache

    @property
    def pool(self) -> Pool:
        """The tensors of the KV."""
        return self._parts.pool

    @property
    def kv_bytes_per_token(self) -> int:
        """Size of the KV of a token that every layer keeps."""
        return self._parts.kv_bytes_per_token

    @property
    def max_context_tokens(self) -> int:
        """The most tokens that prompt and output of one request may have."""
        return self._parts.limit.tokens

    # -- the public verbs --------------------------------------------------------------------------------------------

    def generate(
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

        With `n` above 1 an output is that of the first choice, and its `choices` are all of them.

        All prompts are checked before any runs. If a request fails while it runs, its output has the reason "error"
        and the others go on. If this call is interrupted, its requests are aborted and hold nothing.

        Args:
            prompts: one prompt or several; a prompt is text or token ids.
            params: one for all, or one for each.
            extra_key, cache_salt: the namespace; requests in different ones never share a prefix.
            priority: what the "priority" eviction policy orders by; tokens keep the highest they were given.
            keep_for_s: for so many seconds after its end, what a request leaves in the cache is evicted only if nothing
                else can be.
            prefix_cache: False for requests that find nothing in the cache and leave nothing there; of several choices
                each computes the prompt. The cache does not count them.
            on_finish: called with the output of each prompt as it finishes (for progress bars).

        Raises: InvalidRequestError, InvalidTokenIdsError, TokenIdsTypeError.
        """
        prompt_list = as_list_of_prompts(prompts)
        params_list = as_list_of_params(params, len(prompt_list))
        options = checked_cache_options(extra_key, cache_salt, priority, keep_for_s, prefix_cache)
        all_ids = self._intake.check_all(prompt_list, params_list, options.namespace)
        by_prompt = [
            self._intake.make(ids, p, options, streams=False) for ids, p in zip(all_ids, params_list, strict=True)
        ]
        requests = [request for choices in by_prompt for request in choices]
        gathered, outbox = GatheredOutputs(by_prompt), FinishedOutbox()
        try:
            self._submit(requests, outbox)
            while (outputs := gathered.take()) is None:
                for output in self._wait_for(outbox):
                    whole = gathered.add(output)
                    if whole is not None and on_finish is not None:
                        on_finish(whole)
        finally:
            with self.exclusive():
                self._abort_all(requests)
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
    ) -> Generator[Progress]:
        """Continue one prompt, piece by piece; the last piece carries the `RequestOutput`.

        With `n` above 1 the pieces of all choices come as they are made, each with its `choice_index`, and the
        last one of each choice carries its output.

        The request starts with the first `next`. Several streams may be open at once: each step serves them all.
        Closing the iterator aborts the request.

        Raises: as `generate`, at once; and the request's own error where it occurs.
        """
        params = params or SamplingParams()
        options = checked_cache_options(extra_key, cache_salt, priority, keep_for_s, prefix_cache)
        ids = self._intake.check(prompt, params, options.namespace)
        return self._stream(ids, params, options)

    def abort(self, request_id: int) -> bool:
        """End a waiting or running request now, with all its choices; its caller gets what it has, and "abort".

        Safe to call from another thread, or from `on_finish`.

        Returns: True if the request was waiting or running.
        """
        with self.exclusive():
            progress = self._core.abort(request_id)
            self._deliver(progress)
            self._core.arrivals.notify()  # of the end of what they wait for
        return bool(progress)

    def session(
        self,
        *,
        system: str | None = None,
        extra_key: str | None = None,
        cache_salt: str | None = None,
        priority: int = 0,
        keep_for_s: float | None = None,
        user_special_tokens: UserSpecialTokens = "allow",
    ) -> Session:
        """Start a conversation; the first `send` begins it with a system turn if `system` is given.

        `user_special_tokens="text"` encodes control tokens in a user's text as ordinary text. The other arguments are
        those of `generate`, for each of its turns.
        """
        options = checked_cache_options(extra_key, cache_salt, priority, keep_for_s)
        return Session(self, options, system=system, user_special_tokens=user_special_tokens)

    def register_session(self, session: Session) -> None:
        """Know a session, as long as it lives, for what sessions have in common. Sessions call it."""
        with self.exclusive():
            self._sessions.add(session)

    def open_sessions(self, namespace: tuple[str | None, str | None]) -> list[Session]:
        """The sessions of a namespace that were not closed."""
        with self.exclusive():
            return [session for session in self._sessions if not session.closed and session.namespace == namespace]

    def stats(self) -> EngineStats:
        """What the engine holds now, and what it did since it was made."""
        with self.exclusive():
            return self._core.stats()

    def set_quotas(self, quotas: Mapping[QuotaKey, CacheQuota]) -> None:
        """Guarantee shares of the pool to namespaces, in place of what was guaranteed before; none if it is empty.

        A namespace is named by its `extra_key`, by `(extra_key, cache_salt)`, or by None if requests name none. What a
        request cannot have beside what others are guaranteed it is refused for (PromptTooLongError), or ends there
        ("length"). See docs/cache.md.

        Raises: as `PrefixCache.set_quotas`; ClosedError.
        """
        with self.exclusive():
            self._core.set_quotas(quotas)

    def reset_cache(self) -> ResetCache:
        """Forget every prefix that no running request reads. O(nodes). Raises: ClosedError."""
        with self.exclusive():
            return self._core.reset_cache()

    def explain(
        self, prompt: Prompt, *, extra_key: str | None = None, cache_salt: str | None = None, as_admin: bool = False
    ) -> Explanation:
        """How far `prompt` is cached now, and why not further: `PrefixCache.explain`, or `explain_as_admin`.

        Raises: as these; MissingTokenizerError, InvalidTokenIdsError; ClosedError.
        """
        namespace, ids = Namespace.of(extra_key, cache_salt), self._intake.ids_of(prompt)
        with self.exclusive():
            return self._core.explain(ids, namespace, as_admin=as_admin)

    def keep(
        self,
        prefix: Prompt,
        keep_for_s: float,
        *,
        extra_key: str | None = None,
        cache_salt: str | None = None,
    ) -> int:
        """Evict what is cached of `prefix` only if nothing else can be, for the next `keep_for_s` seconds.

        Returns: how many of its leading tokens are cached, and kept now.
        Raises: InvalidRequestError, MissingTokenizerError, InvalidTokenIdsError; ClosedError.
        """
        namespace, ids = Namespace.of(extra_key, cache_salt), self._intake.ids_of(prefix)
        with self.exclusive():
            return self._core.keep(ids, keep_for_s, namespace)

    def close(self) -> None:
        """Abort all requests and forget the cache; callers that wait get what there is. Idempotent."""
        with self.exclusive():
            self._deliver(self._core.close())
            self._core.arrivals.notify()

    @property
    def is_warm(self) -> bool:
        """Whether nothing more comes from `disk_cache` to fill the pool at its start."""
        return self._core.is_warm

    def step_tiers(self, timeout_s: float = 0.0) -> None:
        """Take in what the tiers brought, after waiting for it for so long at most. Raises: ClosedError.

        An engine without requests runs no steps: call this to let it fill its pool before the first one comes.
        """
        arrivals, seen = self._core.arrivals, self._core.arrivals.count
        if not self._core.has_work:
            arrivals.wait(seen, timeout_s)
        self.step()

    def flush_tiers(self, timeout_s: float = 60.0) -> bool:
        """Wait until what was handed down to the tiers below the pool is written. Returns False if it took too long.

        Raises: ClosedError.
        """
        return self._core.flush_tiers(timeout_s)

    def hand_down(
        self, prefix: Prompt, *, timeout_s: float = 10.0, extra_key: str | None = None, cache_salt: str | None = None
    ) -> bool:
        """Write what the pool holds of `prefix` to the tiers now, whatever `tier_writes` says, and wait for the end.

        Returns: whether all of it lies in each tier then; False if one failed, or it took too long.
        Raises: MissingTokenizerError, InvalidTokenIdsError, InvalidRequestError; ClosedError.
        """
        namespace, ids = Namespace.of(extra_key, cache_salt), self._intake.ids_of(prefix)
        ends_at = time.monotonic() + timeout_s
        num_before = None
        while True:  # a writer's queue is bounded: what it refuses is offered again once it has written the rest
            with self.exclusive():
                num_missing = self._core.hand_down(ids, namespace)
            if num_missing == 0 or (num_before is not None and num_missing >= num_before):
                return num_missing == 0
            num_before = num_missing
            if not self._core.flush_tiers(max(0.0, ends_at - time.monotonic())):
                return False

    def encode(self, text: str, *, add_special_tokens: bool = True) -> NDArray[np.int32]:
        """Ids of `text`, by default as a prompt: with the tokenizer's own beginning of sequence.

        Raises: MissingTokenizerError; InvalidRequestError if `text` cannot be encoded in UTF-8; InvalidTokenIdsError if
            the model has no embedding for one of the ids.
        """
        return self._intake.encode(text, add_special_tokens=add_special_tokens)

    def known_ids(self, ids: TokenIds) -> NDArray[np.int32]:
        """`ids` as int32, all of them in the model's vocabulary. Raises: InvalidTokenIdsError, TokenIdsTypeError."""
        return self._intake.known_ids(ids)

    def require_tokenizer(self, what_for: str) -> Any:
        """The tokenizer. Raises: MissingTokenizerError if the model came without one."""
        return self._intake.require_tokenizer(what_for)

    def check_invariants(self) -> None:
        """Prove the invariants of the cache and the scheduler. For tests. Raises: InvariantError."""
        with self.exclusive():
            self._core.check_invariants()

    def exclusive(self) -> AbstractContextManager[None]:
        """Keep other threads, finalisers and the first Ctrl-C out of an operation on requests and pages."""
        return self._gate.exclusive()

    def step(self) -> None:
        """Run one batch: schedule, compute, sample, and hand out what it brought. Raises: ClosedError."""
        with self.exclusive():
            self._deliver(self._core.step())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- inside ------------------------------------------------------------------------------------------------------

    def _submit(self, requests: Sequence[Request], outbox: Outbox | FinishedOutbox) -> None:
        """Queue all of `requests`. The caller aborts them in the end, also if this is interrupted."""
        with self.exclusive():
            for request in requests:
                self._core.add(request)
                self._outboxes[request.id] = outbox

    def _deliver(self, progress: Sequence[Progress]) -> None:
        for piece in progress:
            if (outbox := self._outboxes.get(piece.request_id)) is not None:
                outbox.put(piece)

    @overload
    def _wait_for(self, outbox: Outbox) -> Progress: ...
    @overload
    def _wait_for(self, outbox: FinishedOutbox) -> list[RequestOutput]: ...
    def _wait_for(self, outbox: Outbox | FinishedOutbox) -> Progress | list[RequestOutput]:
        """Step until `outbox` holds something, and take it. Between steps other threads come in."""
        while True:
            with self.exclusive():
                if taken := outbox.take():
                    return taken
                arrivals, seen = self._core.arrivals, self._core.arrivals.count
                if self._core.has_work:
                    self.step()
                    continue
                assert self._core.waits_for_tiers, "a caller waits for a request that neither waits, loads nor runs"
                timeout_s = self._core.wait_s
            arrivals.wait(seen, timeout_s)

    def _abort_all(self, requests: Sequence[Request]) -> None:
        """Abort those of `requests` that have not ended, since nobody waits for them any more."""
        for request in requests:
            if self._outboxes.pop(request.id, None) is not None and not request.is_finished:
                self._core.abort(request.id)
        self._core.arrivals.notify()  # others may have waited for what these held

    def _stream(self, ids: NDArray[np.int32], params: SamplingParams, options: CacheOptions) -> Generator[Progress]:
        requests = self._intake.make(ids, params, options, streams=True)
        outbox = Outbox()
        try:
            self._submit(requests, outbox)
            num_running = len(requests)
            while num_running:
                progress = self._wait_for(outbox)
                output = progress.output
                if output is not None:
                    num_running -= 1
                    if output.error is not None:
                        raise output.error
                yield progress
        finally:  # also called by the garbage collector, in the middle of any operation
            self._gate.do_soon(partial(self._abort_all, requests))
