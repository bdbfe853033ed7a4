"""What an engine reports: the progress of requests, and statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

from radixkv.cache.cache_stats import CacheStats, SizeEstimate
from radixkv.engine.drafts.speculation import SpeculationStats
from radixkv.engine.outputs import Progress, RequestOutput
from radixkv.engine.request import Request
from radixkv.tiers.tier import TierStats


class Outbox:
    """Collects the progress of one request, or of its choices, until its reader takes it.

    What was not taken yet is joined, choice by choice, so a slow reader costs no more memory than the output itself.
    Not thread-safe.

    >>> outbox = Outbox()
    >>> outbox.put(Progress(3, [7], "to", None)), outbox.put(Progress(3, [8], " be", None))
    (None, None)
    >>> outbox.take()[:4]
    (3, [7, 8], 'to be', None)
    >>> outbox.take() is None
    True
    """

    def __init__(self) -> None:
        self._pending: dict[int, list[Progress]] = {}  # by choice, the one that waits longest first

    def put(self, progress: Progress) -> None:
        """Add what a step brought. O(1)."""
        self._pending.setdefault(progress.choice_index, []).append(progress)

    def take(self) -> Progress | None:
        """All progress of one choice since it was last taken, joined; None if there is none. O(tokens)."""
        if not self._pending:
            return None
        pending = self._pending.pop(next(iter(self._pending)))
        return pending[0] if len(pending) == 1 else _joined(pending)


def _joined(pending: Sequence[Progress]) -> Progress:
    usage = pending[0].usage
    if usage is not None:
        later_tokens = sum(len(progress.token_ids) for progress in pending[1:])
        usage = usage._replace(output_tokens=usage.output_tokens + later_tokens)
    logprobs = [progress.logprobs for progress in pending if progress.logprobs is not None]
    return Progress(
        pending[0].request_id,
        [token_id for progress in pending for token_id in progress.token_ids],
        "".join(progress.text for progress in pending),
        pending[-1].output,
        pending[0].choice_index,
        list(chain.from_iterable(logprobs)) if logprobs else None,
        pending[0].prompt_logprobs,
        usage,
    )


class FinishedOutbox:
    """Collects the outputs of several requests, in the order in which they end. Not thread-safe."""

    def __init__(self) -> None:
        self._outputs: list[RequestOutput] = []

    def put(self, progress: Progress) -> None:
        """Keep the output if this is the request's last progress. O(1)."""
        if progress.output is not None:
            self._outputs.append(progress.output)

    def take(self) -> list[RequestOutput]:
        """The outputs that came since the last call."""
        outputs, self._outputs = self._outputs, []
        return outputs


class GatheredOutputs:
    """Puts the outputs of choices together to one for each prompt.

    Args:
        requests: the choices of each prompt, in order.
    """

    def __init__(self, requests: Sequence[Sequence[Request]]) -> None:
        self._place = {choice.id: place for place, choices in enumerate(requests) for choice in choices}
        self._missing = [len(choices) for choices in requests]
        self._choices: list[list[RequestOutput]] = [[] for _ in requests]
        self._whole: list[RequestOutput | None] = [None for _ in requests]

    def add(self, output: RequestOutput) -> RequestOutput | None:
        """Take the output of a choice; returns that of its prompt if it was the last one missing."""
        place = self._place[output.request_id]
        self._choices[place].append(output)
        self._missing[place] -= 1
        if self._missing[place]:
            return None
        first, *others = sorted(self._choices[place], key=lambda choice: choice.choice_index)
        self._whole[place] = whole = replace(first, others=tuple(others)) if others else first
        return whole

    def take(self) -> list[RequestOutput] | None:
        """The output of each prompt in order; None while some are missing."""
        whole = [output for output in self._whole if output is not None]
        return whole if len(whole) == len(self._whole) else None


class ResetCache(NamedTuple):
    """What emptying the cache brought: the tokens forgotten, and those kept because running requests read them."""

    freed_tokens: int
    kept_by_running_tokens: int


class EngineStats(NamedTuple):
    """What the engine holds now, and what it did since it was made.

    `computed_tokens` went through the model; `generated_tokens` are of outputs; `retractions` counts how often a
    running request had its pages taken back. `peak_used_pages` includes unused prefixes that are kept.
    `kv_bytes_per_token` counts a token that every layer keeps; `pool_bytes` is the size of the KV pool, and
    `state_pool_bytes` that of the states of recurrent layers, of which `cache` tells how many there are (0 without).
    `sampled_steps` counts, for each request, the steps that gave it tokens: without drafts and grammars, each of them
    gave one. `speculation` tells what drafts did; None without them. `forced_tokens` of the `generated_tokens` were the
    only ones that a grammar allowed.
    `loading` requests have their pages and wait for what a tier below the pool has of their prompts; `tiers` tell of
    each of these, and `tiers_busy_s` is the part of the engine's own time that copying to and from them took.
    """

    cache: CacheStats
    running: int
    waiting: int
    steps: int
    computed_tokens: int
    generated_tokens: int
    retractions: int
    peak_used_pages: int
    kv_bytes_per_token: int
    pool_bytes: int
    loading: int = 0
    tiers: tuple[TierStats, ...] = ()
    tiers_busy_s: float = 0.0
    sampled_steps: int = 0
    speculation: SpeculationStats | None = None
    state_pool_bytes: int = 0
    forced_tokens: int = 0

    @property
    def bytes_per_state(self) -> int:
        """Size of what the recurrent layers keep of one sequence; 0 without such layers."""
        return self.state_pool_bytes // self.cache.states if self.cache.states else 0

    @property
    def tokens_per_step(self) -> float:
        """How many tokens a step gave each request in it, on average; 0 before the first step.

        1 without drafts, and without grammars that force tokens.
        """
        return self.generated_tokens / self.sampled_steps if self.sampled_steps else 0.0

    @property
    def loaded_tokens(self) -> int:
        """Tokens that were loaded from tiers below the pool in place of being computed."""
        return sum(tier.loaded_tokens for tier in self.tiers)

    @property
    def hit_rate(self) -> float:
        """Share of the prompt tokens that were found in the pool."""
        return self.cache.hit_rate

    @property
    def estimated_hit_rates(self) -> tuple[SizeEstimate, ...]:
        """The hit rates that this traffic would have had with pools of other sizes."""
        return self.cache.estimated_hit_rates

    @property
    def free_pages(self) -> int:
        """Pages that hold nothing."""
        return self.cache.free_pages

    @property
    def evictable_pages(self) -> int:
        """Pages of cached prefixes that no request reads."""
        return self.cache.evictable_tokens // self.cache.page_size

    @property
    def protected_pages(self) -> int:
        """Pages of cached prefixes that running requests read."""
        return self.cache.protected_tokens // self.cache.page_size
