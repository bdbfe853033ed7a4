"""A request: what was asked, how far it is, and what it gave."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from radixkv.cache.lease import Lease
from radixkv.engine.arguments import CacheOptions
from radixkv.engine.detokenizer import Detokenizer, decode
from radixkv.engine.sampling import SamplingParams, TokenLogprobs

FinishReason = Literal["stop", "length", "abort", "error"]


class RequestMetrics(NamedTuple):
    """Timings of one request, in seconds.

    `queue_s`: from arrival to the first step that computed for it. `ttft_s`: from arrival to its first token.
    `tpot_s`: mean time between tokens after the first. `total_s`: from arrival to its end. A request that ended
    before its first token (or step) reports its total time there.
    `retractions`: how often its pages were taken back while it ran.
    """

    queue_s: float
    ttft_s: float
    tpot_s: float
    total_s: float
    retractions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """What a finished request gave.

    Attributes:
        request_id: the engine's number for it.
        text: the new text, without special tokens and without the stop string; None if there is no tokenizer.
        token_ids: the new ids, with the one that ended it.
        prompt_token_ids: the ids of the prompt.
        cached_tokens: leading prompt tokens whose KV was found, not computed.
        finish_reason: "stop" (end of sequence, stop id or stop string), "length" (max_tokens, context or pool),
            "abort" or "error".
        error: what went wrong, if the reason is "error".
        logprobs: one entry an output token, if they were asked for.
    """

    request_id: int
    text: str | None
    token_ids: list[int]
    prompt_token_ids: list[int]
    cached_tokens: int
    finish_reason: FinishReason
    metrics: RequestMetrics
    error: Exception | None = None
    logprobs: list[TokenLogprobs] | None = None

    @property
    def prompt_tokens(self) -> int:
        """Tokens in the prompt."""
        return len(self.prompt_token_ids)


class Progress(NamedTuple):
    """What a request gained: new tokens, new text that is certain by now, and its output in the last one."""

    request_id: int
    token_ids: list[int]
    text: str
    output: RequestOutput | None


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """A request while it waits or runs. Its tokens are prompt and output in one array.

    `[0, num_computed)` have their KV in the lease's pages; `[num_computed, num_tokens)` are to be computed next.
    """

    id: int
    prompt_ids: NDArray[np.int32]
    params: SamplingParams
    cache_options: CacheOptions
    max_new_tokens: int
    stop_ids: frozenset[int]
    generator: torch.Generator | None
    tokenizer: Any | None
    detokenizer: Detokenizer | None  # only where text is needed before the end: streams and stop strings
    arrived_at: float = field(default_factory=time.perf_counter)
    lease: Lease | None = None
    row: int | None = None
    num_computed: int = 0
    cached_tokens: int | None = None  # of the first admission
    awaited: tuple[Request, int] | None = None  # one that computes what both begin with, and how many tokens that is
    retractions: int = 0
    started_at: float | None = None
    first_token_at: float | None = None
    finished_at: float | None = None
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    text: str | None = None  # once it has ended
    pieces: list[str] = field(default_factory=list)  # text that is certain and not reported yet
    num_reported: int = 0  # of `output_ids`
    has_reported_end: bool = False
    _tokens: NDArray[np.int32] = field(init=False)
    num_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_tokens = len(self.prompt_ids)
        self._tokens = np.empty(self.num_tokens + self.max_new_tokens, np.int32)
        self._tokens[: self.num_tokens] = self.prompt_ids

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """Prompt and output so far; a view."""
        return self._tokens[: self.num_tokens]

    @property
    def computed_ids(self) -> NDArray[np.int32]:
        """The tokens whose KV is in the pages; a view."""
        return self._tokens[: self.num_computed]

    @property
    def num_pending(self) -> int:
        """Tokens known and not yet computed: 1 while decoding, more during prefill."""
        return self.num_tokens - self.num_computed

    def running(self) -> tuple[Lease, int]:
        """Its lease and its row in the table of pages; only for a running request."""
        assert self.lease is not None, self
        assert self.row is not None, self
        return self.lease, self.row

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    def append(self, token_id: int) -> None:
        """Take a new token, and finish if it is the last one."""
        if self.first_token_at is None:
            self.first_token_at = time.perf_counter()
        self._tokens[self.num_tokens] = token_id
        self.num_tokens += 1
        self.output_ids.append(token_id)
        if self.detokenizer is not None and (piece := self.detokenizer.push(token_id)):
            self.pieces.append(piece)
        stopped = token_id in self.stop_ids or (self.detokenizer is not None and self.detokenizer.stopped)
        if stopped or len(self.output_ids) == self.max_new_tokens:
            self._settle()  # before it counts as finished: decoding may fail
            self.finish("stop" if stopped else "length")

    def finish(self, reason: FinishReason, error: Exception | None = None) -> None:
        """End it, for `reason`. What comes second changes nothing."""
        if self.finish_reason is None:
            self.finish_reason, self.error = reason, error
            self.finished_at = time.perf_counter()

    def take_progress(self) -> Progress | None:
        """What is new since the last call; None if nothing is. The last one carries the output, and none follows it."""
        if self.has_reported_end:
            return None
        output = self.output() if self.is_finished else None  # settles the text first
        token_ids, text = self.output_ids[self.num_reported :], "".join(self.pieces)
        if not token_ids and not text and output is None:
            return None
        self.num_reported, self.has_reported_end = len(self.output_ids), output is not None
        self.pieces.clear()
        return Progress(self.id, token_ids, text, output)

    def metrics(self) -> RequestMetrics:
        """Timings of the finished request."""
        assert self.finished_at is not None, "not finished"
        first_token_at = self.first_token_at or self.finished_at
        later_tokens = max(1, len(self.output_ids) - 1)
        return RequestMetrics(
            queue_s=(self.started_at or self.finished_at) - self.arrived_at,
            ttft_s=first_token_at - self.arrived_at,
            tpot_s=(self.finished_at - first_token_at) / later_tokens,
            total_s=self.finished_at - self.arrived_at,
            retractions=self.retractions,
        )

    def output(self) -> RequestOutput:
        """What the finished request gave."""
        assert self.finish_reason is not None, "not finished"
        if self.text is None and self.finish_reason == "abort":
            try:
                self._settle()
            except Exception as error:  # of the tokenizer
                self.finish_reason, self.error = "error", error
        return RequestOutput(
            request_id=self.id,
            text=self.text,
            token_ids=list(self.output_ids),
            prompt_token_ids=self.prompt_ids.tolist(),
            cached_tokens=self.cached_tokens or 0,
            finish_reason=self.finish_reason,
            metrics=self.metrics(),
            error=self.error,
            logprobs=list(self.logprobs) if self.params.logprobs is not None else None,
        )

    def _settle(self) -> None:
        """Decode the whole output, and give out the text that was held back."""
        if self.detokenizer is not None:
            if rest := self.detokenizer.flush():
                self.pieces.append(rest)
            self.text = self.detokenizer.text
        elif self.tokenizer is not None:
            self.text = decode(self.tokenizer, self.output_ids)
