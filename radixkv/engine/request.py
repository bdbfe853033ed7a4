"""A request: what was asked, and how far it is."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from radixkv.cache.lease import Lease
from radixkv.engine.arguments import CacheOptions
from radixkv.engine.detokenizer import Detokenizer, decode
from radixkv.engine.logit_edits import LogitEdits
from radixkv.engine.outputs import FinishReason, Progress, RequestMetrics, RequestOutput, Usage, below_the_pool
from radixkv.engine.sampling import SamplingParams, TokenLogprobs
from radixkv.tiers.page_chain import PageChain
from radixkv.tiers.prefix_load import PrefixLoad

if TYPE_CHECKING:
    from radixkv.engine.loading import RequestLookup


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
    choice_index: int = 0  # of the choice
    choice_ids: range = range(0)  # of all choices of the request, this one's among them
    edits: LogitEdits | None = None
    arrived_at: float = field(default_factory=time.perf_counter)
    lease: Lease | None = None
    row: int | None = None
    num_computed: int = 0
    num_shared: int = 0  # leading tokens that were found in the cache, or committed to it since
    cached_tokens: int | None = None  # of the first admission
    cache_write_tokens: int = 0
    num_accounted: int = 0  # prompt tokens that are counted as cached, as written, or as stored by others
    cached_by: dict[str, int] = field(default_factory=dict)  # of `cached_tokens`, by where they were
    load: PrefixLoad | RequestLookup | None = None  # what it waits for from a tier below the pool
    chain: PageChain | None = None  # the keys of its pages, if a tier wants them
    handed_pages: dict[str, int] = field(default_factory=dict)  # by tier: leading pages that are stored or will be
    handed_states: dict[str, int] = field(default_factory=dict)  # by tier: leading tokens after which states went down
    stored_pages: dict[str, int] = field(default_factory=dict)  # by tier: leading pages that were stored before
    awaited: tuple[Request, int] | None = None  # one that computes what both begin with, and how many tokens that is
    drafted_by: dict[str, int] = field(default_factory=dict)  # tokens that were guessed and checked, by source
    accepted_by: dict[str, int] = field(default_factory=dict)  # those that were right
    num_forced: int = 0  # of the last tokens: those that were forced, after one that was chosen
    forced_tokens: int = 0  # of the output
    retractions: int = 0
    started_at: float | None = None
    first_token_at: float | None = None
    finished_at: float | None = None
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # of the first prompt tokens, if they are asked for
    text: str | None = None  # once it has ended
    pieces: list[str] = field(default_factory=list)  # text that is certain and not reported yet
    num_reported: int = 0  # of `output_ids`
    has_reported_prompt: bool = False
    has_reported_end: bool = False
    _tokens: NDArray[np.int32] = field(init=False)
    num_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_tokens = len(self.prompt_ids)
        self._tokens = np.empty(self.num_tokens + self.max_new_tokens, np.int32)
        self._tokens[: self.num_tokens] = self.prompt_ids
        self.choice_ids = self.choice_ids or range(self.id, self.id + 1)
        if self.params.prompt_logprobs is not None and self.choice_index == 0:
            self.prompt_logprobs = [None]

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """Prompt and output so far; a view."""
        return self._tokens[: self.num_tokens]

    def tokens_between(self, first: int, last: int) -> NDArray[np.int32]:
        """The tokens `[first, last)`; a view. Those from `num_tokens` on are guesses."""
        return self._tokens[first:last]

    def guess(self, token_ids: NDArray[np.int32]) -> None:
        """Write guesses of the next tokens behind those that are known, where `append` overwrites them."""
        assert self.num_tokens + len(token_ids) < len(self._tokens), "more guesses than tokens that it wants"
        self._tokens[self.num_tokens : self.num_tokens + len(token_ids)] = token_ids

    @property
    def computed_ids(self) -> NDArray[np.int32]:
        """The tokens whose KV is in the pages; a view."""
        return self._tokens[: self.num_computed]

    @property
    def num_pending(self) -> int:
        """Tokens known and not yet computed: 1 while decoding, and those forced after it; more during prefill."""
        return self.num_tokens - self.num_computed

    @property
    def is_prefilling(self) -> bool:
        """Whether there is more to compute than the token that was chosen last and those that were forced after it."""
        return self.num_pending > 1 + self.num_forced

    @property
    def findable_ids(self) -> NDArray[np.int32]:
        """The leading tokens whose KV it may find cached; a view. It computes the rest, for their logits.

        The last token's logits choose the next one; with `prompt_logprobs` those of a prompt token give the next one's.
        """
        if not self.cache_options.prefix_cache:
            return self._tokens[:0]
        num_findable = self.num_tokens - 1
        if self.prompt_logprobs is not None and len(self.prompt_logprobs) < len(self.prompt_ids):
            num_findable = len(self.prompt_logprobs) - 1
        return self._tokens[:num_findable]

    def positions_for_prompt(self, first: int, last: int) -> range:
        """Which of the tokens `[first, last)` have logits that `prompt_logprobs` still lacks."""
        if self.prompt_logprobs is None:
            return range(0)
        return range(max(first, len(self.prompt_logprobs) - 1), min(last, len(self.prompt_ids) - 1))

    def wrote(self, held_tokens: int, shared_tokens: int) -> None:
        """Count prompt tokens as written, of which the cache held `held_tokens` before, and holds `shared_tokens` now.

        No token counts twice: what was stored, evicted and stored again was written once.
        """
        last = min(shared_tokens, len(self.prompt_ids))
        first = max(held_tokens, self.num_accounted)
        self.cache_write_tokens += max(0, last - first)
        self.num_accounted = max(self.num_accounted, last)

    def was_found(self, cached_tokens: int) -> None:
        """Count prompt tokens as found in the pool, at its first admission. Tokens of its output do not count."""
        self.cached_tokens = self.num_accounted = min(cached_tokens, len(self.prompt_ids))
        self.cached_by["pool"] = self.cached_tokens

    def was_loaded(self, tier: str, first_token: int) -> None:
        """Count prompt tokens as found in `tier`: those from `first_token` to what is computed now.

        No token counts twice: what it had computed before it was retracted is not found.
        """
        first = max(first_token, self.num_accounted)
        last = min(self.num_computed, len(self.prompt_ids))
        if last > first:
            assert self.cached_tokens is not None, self
            self.cached_tokens += last - first
            self.cached_by[tier] = self.cached_by.get(tier, 0) + last - first
            self.num_accounted = last

    def running(self) -> tuple[Lease, int]:
        """Its lease and its row in the table of pages; only for a request that runs or loads."""
        assert self.lease is not None, self
        assert self.row is not None, self
        return self.lease, self.row

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    def append(self, token_id: int, *, is_forced: bool = False) -> None:
        """Take a new token, and finish if it is the last one.

        Args:
            is_forced: whether it is the only one that could come, so that no step computed logits for it.
        """
        self.num_forced = self.num_forced + 1 if is_forced else 0
        self.forced_tokens += is_forced
        if self.first_token_at is None:
            self.first_token_at = time.perf_counter()
        self._tokens[self.num_tokens] = token_id
        self.num_tokens += 1
        self.output_ids.append(token_id)
        if self.edits is not None:
            self.edits.append(token_id)
        if self.detokenizer is not None and (piece := self.detokenizer.push(token_id)):
            self.pieces.append(piece)
        stopped = token_id in self.stop_ids or (self.detokenizer is not None and self.detokenizer.stopped)
        if stopped or len(self.output_ids) == self.max_new_tokens:
            self._settle()  # before it counts as finished: decoding may fail
            self.finish("stop" if stopped else "length")

    def was_drafted(self, source: str, drafted: int, accepted: int) -> None:
        """Count a draft of so many tokens, the first of which were accepted."""
        self.drafted_by[source] = self.drafted_by.get(source, 0) + drafted
        self.accepted_by[source] = self.accepted_by.get(source, 0) + accepted

    def finish_without_tokens(self) -> None:
        """Finish a request that asks for none, now that its prompt is computed."""
        assert self.max_new_tokens == 0, self
        self._settle()
        self.finish("length")

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
        logprobs = self.logprobs[self.num_reported :] if self.params.logprobs is not None else None
        prompt_logprobs = None if self.has_reported_prompt else self.prompt_logprobs
        usage = None if self.has_reported_prompt or self.choice_index else self._usage()
        self.num_reported, self.has_reported_end = len(self.output_ids), output is not None
        self.has_reported_prompt = True
        self.pieces.clear()
        return Progress(self.id, token_ids, text, output, self.choice_index, logprobs, prompt_logprobs, usage)

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
            cached_by=dict(self.cached_by),
            finish_reason=self.finish_reason,
            metrics=self.metrics(),
            error=self.error,
            logprobs=list(self.logprobs) if self.params.logprobs is not None else None,
            prompt_logprobs=self.prompt_logprobs,
            stopped_by=self._stopped_by(),
            cache_write_tokens=self.cache_write_tokens,
            choice_index=self.choice_index,
            drafted_by=dict(self.drafted_by),
            accepted_by=dict(self.accepted_by),
            forced_tokens=self.forced_tokens,
        )

    def _usage(self) -> Usage:
        """What it used so far."""
        return Usage(
            len(self.prompt_ids),
            self.cached_tokens or 0,
            self.cache_write_tokens,
            len(self.output_ids),
            below_the_pool(self.cached_by),
            sum(self.drafted_by.values()),
            sum(self.accepted_by.values()),
        )

    def _stopped_by(self) -> str | int | None:
        if self.finish_reason != "stop":
            return None
        if self.detokenizer is not None and self.detokenizer.stopped:
            return self.detokenizer.stopped_by
        last = self.output_ids[-1]
        return last if last in self.params.stop_token_ids else None

    def _settle(self) -> None:
        """Decode the whole output, and give out the text that was held back."""
        if self.detokenizer is not None:
            if rest := self.detokenizer.flush():
                self.pieces.append(rest)
            self.text = self.detokenizer.text
        elif self.tokenizer is not None:
            self.text = decode(self.tokenizer, self.output_ids)
