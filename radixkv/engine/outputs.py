"""What requests give: progress, outputs, and what they used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from radixkv.engine.sampling import TokenLogprobs

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


class Usage(NamedTuple):
    """How many tokens a request took, all its choices together.

    `cached_tokens` of the `prompt_tokens` were found in the cache when the request came; `cache_write_tokens` others
    were stored there by it. Choices that find what the first one computed count neither. Of the `cached_tokens`,
    `loaded_by` tells those that tiers below the pool had: their names and numbers. `drafted_tokens` were guessed, and
    `accepted_tokens` of these turned out to be right: they are among the `output_tokens`.
    """

    prompt_tokens: int
    cached_tokens: int
    cache_write_tokens: int
    output_tokens: int
    loaded_by: tuple[tuple[str, int], ...] = ()
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def cached_by(self) -> dict[str, int]:
        """`cached_tokens` by where they were found: "pool", and the tiers that had some."""
        in_pool = self.cached_tokens - sum(num_tokens for _, num_tokens in self.loaded_by)
        return {"pool": in_pool, **dict(self.loaded_by)}

    @classmethod
    def of(cls, choices: Sequence[RequestOutput]) -> Usage:
        """The usage of a request, from the outputs of its choices in any order; also if some were not finished."""
        first = min(choices, key=lambda output: output.choice_index)
        written = sum(output.cache_write_tokens for output in choices)
        return cls(
            first.prompt_tokens,
            first.cached_tokens,
            min(written, first.prompt_tokens - first.cached_tokens),
            sum(len(output.token_ids) for output in choices),
            below_the_pool(first.cached_by),
            sum(output.drafted_tokens for output in choices),
            sum(output.accepted_tokens for output in choices),
        )

    @classmethod
    def total(cls, usages: Iterable[Usage]) -> Usage:
        """What several requests took together."""
        usages = list(usages)
        loaded_by: Counter[str] = Counter()
        for usage in usages:
            loaded_by.update(dict(usage.loaded_by))
        return cls(
            sum(usage.prompt_tokens for usage in usages),
            sum(usage.cached_tokens for usage in usages),
            sum(usage.cache_write_tokens for usage in usages),
            sum(usage.output_tokens for usage in usages),
            below_the_pool(loaded_by),
            sum(usage.drafted_tokens for usage in usages),
            sum(usage.accepted_tokens for usage in usages),
        )


def below_the_pool(cached_by: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    """What of `cached_by` the tiers below the pool had."""
    return tuple(sorted((name, num_tokens) for name, num_tokens in cached_by.items() if name != "pool"))


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """What a finished request gave; of several choices, what one of them gave.

    Attributes:
        request_id: the engine's number for it; each choice has one of its own.
        text: the new text, without special tokens and without the stop string; None if there is no tokenizer.
        token_ids: the new ids, with the one that ended it.
        prompt_token_ids: the ids of the prompt.
        cached_tokens: leading prompt tokens whose KV was found, not computed. Choices after the first find what it
            computed; `usage` counts the prompt once.
        cached_by: `cached_tokens` by where they were found: "pool", and the tiers below it, "host", "disk", "shared".
        cache_write_tokens: prompt tokens that this output stored in the cache, and that were not there before.
        finish_reason: "stop" (end of sequence, stop id or stop string), "length" (max_tokens, context or pool),
            "abort" or "error".
        error: what went wrong, if the reason is "error".
        stopped_by: the stop text, or the id of `stop_token_ids`, that ended it; None if something else did.
        logprobs: one entry an output token, if they were asked for.
        prompt_logprobs: one entry a prompt token, if they were asked for; None for the first token, which nothing
            precedes. Of several choices the first has them.
        choice_index: number of the choice, from 0.
        others: the choices after this one, if it is the first and `generate` returns it.
        drafted_by: tokens that were guessed and checked, by the source of the draft.
        accepted_by: those of them that were right, and are in `token_ids`.
        forced_tokens: how many of `token_ids` were the only ones that the request's transform allowed, and so were not
            waited for.
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
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    stopped_by: str | int | None = None
    cache_write_tokens: int = 0
    choice_index: int = 0
    others: tuple[RequestOutput, ...] = ()
    cached_by: Mapping[str, int] = field(default_factory=dict)
    drafted_by: Mapping[str, int] = field(default_factory=dict)
    accepted_by: Mapping[str, int] = field(default_factory=dict)
    forced_tokens: int = 0

    @property
    def drafted_tokens(self) -> int:
        """Tokens that were guessed and checked."""
        return sum(self.drafted_by.values())

    @property
    def accepted_tokens(self) -> int:
        """Guessed tokens that were right; each spared a step."""
        return sum(self.accepted_by.values())

    @property
    def choices(self) -> tuple[RequestOutput, ...]:
        """The output of each choice in order, this one first."""
        return (self, *self.others)

    @property
    def usage(self) -> Usage:
        """The tokens of all choices."""
        return Usage.of(self.choices)

    @property
    def prompt_tokens(self) -> int:
        """Tokens in the prompt."""
        return len(self.prompt_token_ids)


class Progress(NamedTuple):
    """What a request gained: new tokens, new text that is certain by now, and its output in the last one.

    `choice_index` is the number of the choice. `logprobs` has an entry for each of `token_ids`, if they were asked for;
    `prompt_logprobs` come with the first progress of the first choice, and so does `usage`: what the request used until
    then. Its prompt is computed by then, so its `cached_tokens` are final.
    """

    request_id: int
    token_ids: list[int]
    text: str
    output: RequestOutput | None
    choice_index: int = 0
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    usage: Usage | None = None
