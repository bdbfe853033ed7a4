"""Turns what callers ask into requests, and refuses what cannot be served."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from radixkv.cache.namespace import SHARED, Namespace
from radixkv.cache.token_ids import TokenIds, token_array
from radixkv.config.checks import shown
from radixkv.engine.arguments import CacheOptions, Prompt
from radixkv.engine.detokenizer import Detokenizer
from radixkv.engine.interrupts import DeferredInterrupt
from radixkv.engine.logit_edits import LogitEdits, LogitsTransform
from radixkv.engine.request import Request
from radixkv.engine.sampling import SamplingParams
from radixkv.engine.token_bytes import TokenBytes
from radixkv.errors import (
    InvalidRequestError,
    InvalidSamplingParamsError,
    InvalidTokenIdsError,
    MissingTokenizerError,
    PromptTooLongError,
    RadixKVError,
)

NO_IDS: NDArray[np.int32] = np.empty(0, np.int32)


class ContextLimit(NamedTuple):
    """The most tokens that prompt and output of one request may have, what sets this limit, and how to raise it."""

    tokens: int
    reason: str
    hint: str


class Intake:
    """Checks prompts and makes requests of them; nothing runs and nothing is held before a core takes them.

    Thread-safe: request ids grow with each request made, whichever thread asks.
    """

    def __init__(
        self,
        tokenizer: Any | None,
        *,
        vocab_size: int,
        eos_ids: frozenset[int],
        limit: ContextLimit,
        seed: int,
        most_pool_tokens: Callable[[Namespace], int] | None = None,
    ) -> None:
        """most_pool_tokens: those that a request of a namespace can have pages for; any thread may ask it."""
        self._tokenizer = tokenizer
        self._token_bytes = TokenBytes.of(tokenizer)
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids
        self._limit = limit
        self._most_pool_tokens = most_pool_tokens
        self._seeds = np.random.default_rng(seed)
        self._ids = itertools.count()
        self._lock = threading.Lock()  # of ids and seeds
        self._encoding = threading.Lock()  # fast tokenizers are not safe to share: "Already borrowed"

    def require_tokenizer(self, what_for: str) -> Any:
        """The tokenizer. Raises: MissingTokenizerError if the model came without one."""
        if self._tokenizer is None:
            raise MissingTokenizerError(
                f"the model has no tokenizer, so {what_for[:40]!r} cannot be encoded; give token ids"
            )
        return self._tokenizer

    def encode(self, text: str, *, add_special_tokens: bool = True) -> NDArray[np.int32]:
        """Ids of `text`, by default as a prompt: with the tokenizer's own beginning of sequence.

        Raises: MissingTokenizerError; InvalidRequestError if `text` cannot be encoded in UTF-8; InvalidTokenIdsError if
            the tokenizer has ids that the model has no embedding for.
        """
        self._check_text(text)
        with DeferredInterrupt(), self._encoding:
            ids = self._encode(text, add_special_tokens=add_special_tokens)
        return self.known_ids(ids)

    def encode_unless_busy(self, text: str, *, add_special_tokens: bool = True) -> NDArray[np.int32] | None:
        """As `encode`, but None if it had to wait for another thread that encodes something."""
        self._check_text(text)
        with DeferredInterrupt():
            if not self._encoding.acquire(blocking=False):
                return None
            try:
                ids = self._encode(text, add_special_tokens=add_special_tokens)
            finally:
                self._encoding.release()
        return self.known_ids(ids)

    def known_ids(self, ids: TokenIds) -> NDArray[np.int32]:
        """`ids` as int32, all of them in the model's vocabulary. Raises: InvalidTokenIdsError, TokenIdsTypeError."""
        array = token_array(ids)
        if len(array) and int(array.max()) >= self._vocab_size:
            position = int((array >= self._vocab_size).argmax())
            raise InvalidTokenIdsError(
                f"token id {array[position]} at position {position} is not in the vocabulary of {self._vocab_size}"
            )
        return array

    def ids_of(self, prompt: Prompt) -> NDArray[np.int32]:
        """The ids of text, or a copy of ids. Raises: as `encode` and `known_ids`."""
        return self.encode(prompt) if isinstance(prompt, str) else self.known_ids(prompt).copy()

    def limit_of(self, namespace: Namespace) -> ContextLimit:
        """The limit of a request of `namespace`: that of all requests, or what quotas of others leave to it. O(1)."""
        tokens = self._limit.tokens if self._most_pool_tokens is None else self._most_pool_tokens(namespace)
        if tokens >= self._limit.tokens:
            return self._limit
        return ContextLimit(
            tokens,
            "as the KV pool has room for beside what quotas guarantee to others",
            ", or raise kv_cache_tokens or the quota of its namespace",
        )

    def check_all(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams], namespace: Namespace = SHARED
    ) -> list[NDArray[np.int32]]:
        """The ids of all prompts; an error says which of several it was. Raises as `check`."""
        all_ids = []
        for number, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
            try:
                all_ids.append(self.check(prompt, p, namespace))
            except RadixKVError as error:
                if len(prompts) > 1:
                    error.args = (f"prompt {number}: {error}",)
                raise
        return all_ids

    def check(self, prompt: Prompt, params: SamplingParams, namespace: Namespace = SHARED) -> NDArray[np.int32]:
        """The ids of a prompt that can be served in `namespace`.

        Raises: InvalidRequestError, InvalidTokenIdsError, TokenIdsTypeError.
        """
        ids = self.ids_of(prompt)
        if len(ids) == 0:
            raise InvalidRequestError("the prompt is empty; give at least one token")
        limit = self.limit_of(namespace)
        if len(ids) + (params.max_tokens > 0) > limit.tokens:
            raise PromptTooLongError(
                f"the prompt has {len(ids)} tokens, and prompt and output together may have {limit.tokens}, "
                f"{limit.reason}; shorten it{limit.hint}"
            )
        for name, token_ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias or ())):
            for token_id in token_ids:
                if token_id >= self._vocab_size:
                    raise InvalidSamplingParamsError(
                        f"{name} holds {token_id}, which is outside the model's vocabulary of {self._vocab_size}"
                    )
        if params.stops:
            self.require_tokenizer(params.stops[0])
        return ids

    def check_output(self, ids: NDArray[np.int32], params: SamplingParams, output_ids: TokenIds) -> NDArray[np.int32]:
        """The first ids of an output to checked `ids`, which another engine made and this one is to go on from.

        Raises: InvalidRequestError if the output cannot be taken up there; InvalidTokenIdsError, TokenIdsTypeError.
        """
        known = self.known_ids(output_ids)
        if len(known) == 0:
            return known
        if params.n > 1 or params.logprobs is not None or params.prompt_logprobs is not None:
            raise InvalidRequestError("output_ids need n=1 and no logprobs, which are not known of them")
        if params.logits_transform is not None:
            raise InvalidRequestError("output_ids cannot be given with logits_transform, which has not seen them")
        if len(known) > params.max_tokens:
            raise InvalidRequestError(
                f"output_ids may hold max_tokens={params.max_tokens} tokens at most; got {len(known)}"
            )
        if len(ids) + len(known) > self._limit.tokens:
            raise PromptTooLongError(
                f"prompt and output_ids have {len(ids) + len(known)} tokens, and a request may have "
                f"{self._limit.tokens}, {self._limit.reason}; shorten them{self._limit.hint}"
            )
        return known

    def make(
        self,
        ids: NDArray[np.int32],
        params: SamplingParams,
        options: CacheOptions,
        *,
        streams: bool,
        output_ids: NDArray[np.int32] = NO_IDS,
    ) -> list[Request]:
        """A request for each choice of checked `ids`; `streams` if their text is wanted piece by piece.

        It begins with checked `output_ids`, which count as its output; they may be all of it, and then it has ended.

        Raises: InvalidSamplingParamsError if `logits_transform` returns something else than a LogitsTransform; what it
            raises itself.
        """
        transforms = [_new_transform(params) for _ in range(params.n)]
        with DeferredInterrupt(), self._lock:
            request_ids = [next(self._ids) for _ in transforms]
            generators = [self._generator(params, index) for index in range(params.n)]
        eos_ids = frozenset() if params.ignore_eos else self._eos_ids
        stop_ids = eos_ids | frozenset(params.stop_token_ids)
        end_ids = [token_id for token_id in stop_ids if token_id < self._vocab_size]
        limit = self.limit_of(options.namespace)
        needs_text = self._tokenizer is not None and (streams or params.stops)
        requests = [
            Request(
                id=request_ids[index],
                choice_index=index,
                choice_ids=range(request_ids[0], request_ids[-1] + 1),
                prompt_ids=ids,
                params=params,
                cache_options=options,
                max_new_tokens=min(params.max_tokens, max(1, limit.tokens - len(ids))),
                stop_ids=stop_ids,
                generator=generators[index],
                edits=LogitEdits.of(params, ids, end_ids, transform),
                tokenizer=self._tokenizer,
                detokenizer=self._detokenizer(params) if needs_text else None,
            )
            for index, transform in enumerate(transforms)
        ]
        for request in requests:
            for token_id in output_ids.tolist():
                if not request.is_finished:
                    request.append(token_id)
        return requests

    def _check_text(self, text: str) -> None:
        """Raises: MissingTokenizerError, InvalidRequestError: as `encode`."""
        self.require_tokenizer(text)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"text must be valid Unicode; got a character that is not, at {error.start}: {error.reason}"
            ) from error

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self.require_tokenizer(text)(text, add_special_tokens=add_special_tokens).input_ids
        return ids

    def _detokenizer(self, params: SamplingParams) -> Detokenizer:
        return Detokenizer(self._tokenizer, params.stops, params.min_tokens, self._token_bytes)

    def _generator(self, params: SamplingParams, index: int) -> torch.Generator | None:
        """What choice `index` draws from."""
        if params.is_greedy:
            return None
        if params.seed is None:
            seed = int(self._seeds.integers(2**63))
        elif index == 0:
            seed = params.seed
        else:
            seed = int(np.random.SeedSequence([params.seed, index]).generate_state(1, np.uint64)[0] >> np.uint64(1))
        return torch.Generator(device="cpu").manual_seed(seed)


def _new_transform(params: SamplingParams) -> LogitsTransform | None:
    if params.logits_transform is None:
        return None
    transform = params.logits_transform()
    if not callable(getattr(transform, "start", None)) or not callable(getattr(transform, "apply", None)):
        raise InvalidSamplingParamsError(
            f"logits_transform must return an object with the methods start and apply, not {shown(transform)}"
        )
    made: LogitsTransform = transform
    return made
