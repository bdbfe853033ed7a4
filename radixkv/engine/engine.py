"""The engine: prompts in, tokens out, prefixes kept."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from radixkv.attention.backend import AttentionNeeds, choose_backend
from radixkv.cache.token_ids import TokenIds, token_array
from radixkv.config import EngineConfig
from radixkv.engine.arguments import CacheOptions, Prompt, as_list_of_params, as_list_of_prompts, checked_cache_options
from radixkv.engine.detokenizer import Detokenizer
from radixkv.engine.executor import Executor
from radixkv.engine.gpu_sampling import DeviceSampler, sampling_kernels
from radixkv.engine.graphs import make_graphs
from radixkv.engine.interrupts import DeferredInterrupt
from radixkv.engine.kv_memory import make_kv_memory
from radixkv.engine.request import Request, RequestOutput
from radixkv.engine.results import EngineStats, StreamChunk
from radixkv.engine.runner import ModelRunner
from radixkv.engine.sampling import Sampler, SamplingParams
from radixkv.engine.scheduler import Scheduler
from radixkv.engine.session import Session
from radixkv.errors import (
    InvalidRequestError,
    InvalidSamplingParamsError,
    InvalidTokenIdsError,
    MissingTokenizerError,
    PromptTooLongError,
    RadixKVError,
)
from radixkv.memory.req_to_token import ReqToTokenPool
from radixkv.models.loader import eos_token_ids, load, max_context_tokens
from radixkv.models.probe import plug_in_paged_attention
from radixkv.models.skinny_linear import speed_up_linears
from radixkv.models.streaming import MAX_CONTEXT_TOKENS, Streaming


class Engine:
    """Generates text with a Hugging Face decoder, and computes a shared prefix only once.

    >>> import radixkv
    >>> engine = radixkv.Engine.from_pretrained("demo", kv_cache_tokens=4096)
    >>> params = radixkv.SamplingParams(max_tokens=8)
    >>> first, = engine.generate("ROMEO:\\nBut, soft! what light through yonder window breaks?", params)
    >>> again, = engine.generate("ROMEO:\\nBut, soft! what light through yonder window breaks?", params)
    >>> first.cached_tokens, again.cached_tokens > 0, first.token_ids == again.token_ids
    (0, True, True)

    Attributes:
        config: the settings, with "auto" resolved.
        cache: the `PrefixCache`.
        model, tokenizer: as given; the model's attention runs on pages from now on, and on the CPU its linear layers
            take few tokens through our kernel.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any | None = None, config: EngineConfig | None = None
    ) -> None:
        """Take over `model` as it is, on its device and in its dtype.

        Raises: UnsupportedModelError, UnsupportedBackendError, ConfigError.
        """
        config = config or EngineConfig()
        layers = plug_in_paged_attention(model.eval())
        speed_up_linears(model)
        context_tokens = max_context_tokens(model.config)
        streaming = None
        if config.window is not None:
            streaming = Streaming(model, layers, window=config.window, sinks=config.sinks, limit=context_tokens)
            layers = streaming.layers
            if not any(layer.params.sliding_window is None for layer in layers):
                context_tokens = MAX_CONTEXT_TOKENS
        needs = AttentionNeeds(layers, config.page_size, model.dtype, model.device, config.kv_cache_dtype)
        chosen = choose_backend(config.attention_backend, needs)
        on_gpu = model.device.type == "cuda"
        memory = make_kv_memory(
            chosen,
            needs,
            config,
            context_tokens=context_tokens,
            scratch_pages=int(on_gpu),  # CUDA graphs pad batches with a page that the cache does not know
        )
        self.pool, self.cache, backend = memory.pool, memory.cache, memory.backend
        self.kv_bytes_per_token = memory.bytes_per_token
        num_pages, num_window_pages = memory.sizes
        pool_tokens = num_pages * config.page_size
        limits = {
            "as the model was made": context_tokens,
            "as max_context_tokens says": config.max_context_tokens,
            "as the KV pool has room for": pool_tokens,
        }
        limit, self._context_limit = min((limit, why) for why, limit in limits.items() if limit is not None)
        self._context_hint = ", or raise kv_cache_tokens" if limit == pool_tokens else ""
        self.config = replace(
            config,
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(model.device),
            kv_cache_tokens=pool_tokens,
            window_cache_tokens=None if num_window_pages is None else num_window_pages * config.page_size,
            mem_fraction=None,
            attention_backend=backend.name,
            max_running_requests=config.max_running_requests or min(256, config.max_batch_tokens),
            max_context_tokens=limit,
        )
        self.model, self.tokenizer = model, tokenizer
        self._vocab_size: int = model.config.get_text_config().vocab_size
        self._eos_ids = eos_token_ids(model)
        req_to_token = ReqToTokenPool(
            max_requests=self.config.max_running_requests or 1,
            max_tokens=self.max_context_tokens,
            page_size=self.config.page_size,
        )
        self._scheduler = Scheduler(self.config, self.cache, req_to_token)
        graphs = None
        if on_gpu and streaming is None:
            graphs = make_graphs(model, backend, self.config, scratch_page=num_pages)
        device_sampler = DeviceSampler(sampling_kernels(), model.device, config.seed) if on_gpu else None
        self._runner = ModelRunner(model, backend, req_to_token, graphs, streaming)
        self._sampler = Sampler()
        self._executor = Executor(self._runner, self._scheduler, self._sampler, device_sampler)
        self._seeds = np.random.default_rng(config.seed)
        self._lock = threading.RLock()
        self._busy = False  # whether somebody is inside `exclusive`
        self._abandoned: deque[Request] = deque()  # of streams that were closed or dropped
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._next_id = 0
        self._steps = self._peak_used_pages = 0

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **settings: Any) -> Engine:
        """Load "demo", a local directory or a hub id, and make an engine of it.

        `settings` are the fields of `EngineConfig`.

        Raises: ModelNotFoundError, UnsupportedModelError, UnsupportedBackendError, ConfigError.
        """
        config = EngineConfig.from_keywords(settings)
        model, tokenizer = load(name_or_path, dtype=config.dtype, device=config.device)
        return cls(model, tokenizer, config)

    @property
    def max_context_tokens(self) -> int:
        """Prompt and output of one request at most."""
        assert self.config.max_context_tokens is not None, "resolved when the engine was made"
        return self.config.max_context_tokens

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
        on_finish: Callable[[RequestOutput], object] | None = None,
    ) -> list[RequestOutput]:
        """Continue each prompt; returns the outputs in the order of the prompts.

        All prompts are checked before any runs. If a request fails while it runs, its output has the reason "error"
        and the others go on. If this call is interrupted, its requests are aborted and hold nothing.

        Args:
            prompts: one prompt or several; a prompt is text or token ids.
            params: one for all, or one for each.
            extra_key, cache_salt: the namespace; requests in different ones never share a prefix.
            priority: what the "priority" eviction policy orders by; tokens keep the highest they were given.
            keep_for_s: for so many seconds after its end, what a request leaves in the cache is evicted only if nothing
                else can be.
            on_finish: called with each output as it finishes (for progress bars).

        Raises: InvalidRequestError, InvalidTokenIdsError, TokenIdsTypeError.
        """
        prompt_list = as_list_of_prompts(prompts)
        params_list = as_list_of_params(params, len(prompt_list))
        options = checked_cache_options(extra_key, cache_salt, priority, keep_for_s)
        all_ids = self._check_all(prompt_list, params_list)
        requests: list[Request] = []
        reported: set[int] = set()
        try:
            for ids, p in zip(all_ids, params_list, strict=True):
                requests.append(self._submit(ids, p, options, streams=False))
            while not all(request.is_finished for request in requests):
                self.step()
                for request in requests:
                    if on_finish is not None and request.is_finished and request.id not in reported:
                        reported.add(request.id)
                        on_finish(request.output())
        finally:
            with self.exclusive():
                for request in requests:
                    self._abort(request)
        return [request.output() for request in requests]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        extra_key: str | None = None,
        cache_salt: str | None = None,
        priority: int = 0,
        keep_for_s: float | None = None,
    ) -> Generator[StreamChunk]:
        """Continue one prompt, piece by piece; the last chunk carries the `RequestOutput`.

        The request starts with the first `next`. Several streams may be open at once: each step serves them all.
        Closing the iterator aborts the request.

        Raises: as `generate`, at once; and the request's own error where it occurs.
        """
        params = params or SamplingParams()
        options = checked_cache_options(extra_key, cache_salt, priority, keep_for_s)
        ids = self._check(prompt, params)
        return self._stream(ids, params, options)

    def abort(self, request_id: int) -> bool:
        """End a waiting or running request now; whoever waits for it gets what it has, with the reason "abort".

        Safe to call from another thread, or from `on_finish`.

        Returns: whether there was such a request; one that has ended is none any more.
        """
        with self.exclusive():
            found = [r for r in (*self._scheduler.running, *self._scheduler.waiting) if r.id == request_id]
            for request in found:
                self._abort(request)
        return bool(found)

    def session(
        self,
        *,
        system: str | None = None,
        extra_key: str | None = None,
        cache_salt: str | None = None,
        priority: int = 0,
        keep_for_s: float | None = None,
    ) -> Session:
        """Start a conversation; the first `send` begins it with a system turn if `system` is given.

        The other arguments are those of `generate`, for each of its turns.
        """
        return Session(self, checked_cache_options(extra_key, cache_salt, priority, keep_for_s), system=system)

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
            return EngineStats(
                cache=self.cache.stats(),
                running=len(self._scheduler.running),
                waiting=len(self._scheduler.waiting),
                steps=self._steps,
                computed_tokens=self._executor.computed_tokens,
                generated_tokens=self._executor.generated_tokens,
                retractions=self._scheduler.num_retractions,
                peak_used_pages=self._peak_used_pages,
                kv_bytes_per_token=self.kv_bytes_per_token,
                pool_bytes=self.pool.num_bytes,
            )

    def reset_cache(self) -> None:
        """Forget every prefix that no running request reads."""
        with self.exclusive():
            self.cache.reset()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> NDArray[np.int32]:
        """Ids of `text`, by default as a prompt: with the tokenizer's own beginning of sequence.

        Raises: MissingTokenizerError; InvalidRequestError if `text` cannot be encoded in UTF-8.
        """
        tokenizer = self.require_tokenizer(text)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(f"the text is no valid Unicode: {error.reason} at {error.start}") from error
        return token_array(tokenizer(text, add_special_tokens=add_special_tokens).input_ids)

    def known_ids(self, ids: TokenIds) -> NDArray[np.int32]:
        """`ids` as int32, all of them in the model's vocabulary. Raises: InvalidTokenIdsError, TokenIdsTypeError."""
        array = token_array(ids)
        if len(array) and int(array.max()) >= self._vocab_size:
            position = int((array >= self._vocab_size).argmax())
            raise InvalidTokenIdsError(
                f"token id {array[position]} at position {position} is not in the vocabulary of {self._vocab_size}"
            )
        return array

    def require_tokenizer(self, what_for: str) -> Any:
        """The tokenizer. Raises: MissingTokenizerError if the model came without."""
        if self.tokenizer is None:
            raise MissingTokenizerError(
                f"the model has no tokenizer, so {what_for[:40]!r} cannot be encoded; give token ids"
            )
        return self.tokenizer

    def check_invariants(self) -> None:
        """Prove the invariants of the cache and the scheduler. For tests. Raises: InvariantError."""
        with self.exclusive():
            self.cache.check_invariants()
            self._scheduler.check_invariants()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep other threads, finalisers and the first Ctrl-C out of an operation on requests and pages."""
        with DeferredInterrupt(), self._lock:
            if self._busy:  # an operation within an operation
                yield
                return
            self._busy = True
            try:
                while self._abandoned:
                    self._abort(self._abandoned.popleft())
                yield
            finally:
                self._busy = False

    # -- one step ----------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Run one batch: schedule, compute, sample, and finish what is done."""
        with self.exclusive():
            batch = self._executor.step()
            if not batch:
                return
            self._steps += 1
            self._peak_used_pages = max(self._peak_used_pages, self.cache.allocator.num_used)
            for span in batch:
                if span.request.is_finished:
                    self._scheduler.release(span.request)

    # -- requests ----------------------------------------------------------------------------------------------------

    def _check_all(self, prompts: list[Prompt], params: list[SamplingParams]) -> list[NDArray[np.int32]]:
        """The ids of all prompts; an error says which of several it was."""
        all_ids = []
        for number, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
            try:
                all_ids.append(self._check(prompt, p))
            except RadixKVError as error:
                if len(prompts) > 1:
                    error.args = (f"prompt {number}: {error}",)
                raise
        return all_ids

    def _check(self, prompt: Prompt, params: SamplingParams) -> NDArray[np.int32]:
        """The ids of a prompt that can be served. Raises as `generate`."""
        ids = self.encode(prompt) if isinstance(prompt, str) else self.known_ids(prompt).copy()
        if len(ids) == 0:
            raise InvalidRequestError("the prompt is empty; give at least one token")
        if len(ids) >= self.max_context_tokens:
            raise PromptTooLongError(
                f"the prompt has {len(ids)} tokens, and prompt and output together may have {self.max_context_tokens}, "
                f"{self._context_limit}; shorten it{self._context_hint}"
            )
        for token_id in params.stop_token_ids:
            if token_id >= self._vocab_size:
                raise InvalidSamplingParamsError(
                    f"stop_token_ids holds {token_id}, which is outside the model's vocabulary of {self._vocab_size}"
                )
        if params.stops:
            self.require_tokenizer(params.stops[0])
        return ids

    def _submit(
        self, ids: NDArray[np.int32], params: SamplingParams, options: CacheOptions, *, streams: bool
    ) -> Request:
        eos_ids = frozenset() if params.ignore_eos else self._eos_ids
        needs_text = self.tokenizer is not None and (streams or params.stops)
        with self.exclusive():
            request = Request(
                id=self._next_id,
                prompt_ids=ids,
                params=params,
                cache_options=options,
                max_new_tokens=min(params.max_tokens, self.max_context_tokens - len(ids)),
                stop_ids=eos_ids | frozenset(params.stop_token_ids),
                generator=self._generator(params),
                tokenizer=self.tokenizer,
                detokenizer=Detokenizer(self.tokenizer, params.stops) if needs_text else None,
            )
            self._next_id += 1
            self._scheduler.add(request)
        return request

    def _generator(self, params: SamplingParams) -> torch.Generator | None:
        if params.is_greedy:
            return None
        seed = params.seed if params.seed is not None else int(self._seeds.integers(2**63))
        return torch.Generator().manual_seed(seed)

    def _abort(self, request: Request) -> None:
        """End a request that nobody waits for any more, if it has not ended, and see that it holds nothing."""
        with self.exclusive():
            request.finish("abort")
            self._scheduler.release(request)

    def _abandon(self, request: Request) -> None:
        """As `_abort`, from a finaliser too, which may run amid any operation of any thread: it never waits."""
        self._abandoned.append(request)
        if not self._busy and self._lock.acquire(blocking=False):
            try:
                with self.exclusive():
                    pass  # which aborts what was abandoned
            finally:
                self._lock.release()

    def _stream(self, ids: NDArray[np.int32], params: SamplingParams, options: CacheOptions) -> Generator[StreamChunk]:
        request = self._submit(ids, params, options, streams=True)
        num_seen = 0
        try:
            while (output := self._step_for(request)) is None:
                if len(request.output_ids) > num_seen:
                    new_ids = request.output_ids[num_seen:]
                    num_seen += len(new_ids)
                    yield StreamChunk(request.id, _take_pieces(request), new_ids, None)
            yield StreamChunk(request.id, _take_pieces(request), request.output_ids[num_seen:], output)
        finally:
            self._abandon(request)

    def _step_for(self, request: Request) -> RequestOutput | None:
        """Step on behalf of a stream; its output once it has ended. Raises: the request's own error."""
        if not request.is_finished:
            self.step()
        if request.error is not None:
            raise request.error
        return request.output() if request.is_finished else None


def _take_pieces(request: Request) -> str:
    text = "".join(request.pieces)
    request.pieces.clear()
    return text
