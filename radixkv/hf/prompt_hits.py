"""What a `RadixCache` tells of itself, and the counts of what the prompts of its calls found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from radixkv.hf.call import Call
from radixkv.tiers.tier import TierStats


class RadixCacheStats(NamedTuple):
    """What a `RadixCache` did so far and holds now.

    `hit_tokens` of `query_tokens` in the prompts of all calls were read, not computed. `stored_tokens` is what the
    pages in use have room for, of `capacity_tokens` in all, which take `pool_bytes` once the first call has ended;
    `evicted_tokens` made room for others. `tiers` tells of the disk, if there is one. Of a model with recurrent layers
    `stored_states` of at most `state_slots` states are kept, which take `state_bytes`.
    """

    query_tokens: int
    hit_tokens: int
    stored_tokens: int
    evicted_tokens: int
    capacity_tokens: int
    pool_bytes: int
    tiers: tuple[TierStats, ...] = ()
    stored_states: int = 0
    state_slots: int = 0
    state_bytes: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the prompts' tokens that were not computed; 0 before the first call."""
        return self.hit_tokens / self.query_tokens if self.query_tokens else 0.0


class PromptHits:
    """How much of the prompts was read, not computed: of the last call by row, and of all calls.

    Attributes:
        query_tokens, hit_tokens: of all prompts so far.
        cached_tokens: of each row of the last call.
        disk_tokens: how many of these had to come from the disk.
    """

    def __init__(self) -> None:
        self.query_tokens = self.hit_tokens = 0
        self.cached_tokens: tuple[int, ...] = ()
        self.disk_tokens: tuple[int, ...] = ()

    def note(self, call: Call, first: int, last: int, from_disk: Sequence[range]) -> None:
        """The call's columns `[first, last)` were read, those from there on are computed.

        Columns `[0, first)` were noted before: a prompt may come in chunks.

        Args:
            from_disk: the tokens of each row that were loaded from the disk.
        """
        loaded = [max(0, last - max(first, padding)) for padding in call.padding]
        used = [range(max(0, first - padding), max(0, last - padding)) for padding in call.padding]
        loaded_from_disk = map(_num_common, used, from_disk)
        nothing = (0,) * len(loaded)
        before, disk_before = (self.cached_tokens, self.disk_tokens) if first else (nothing, nothing)
        self.cached_tokens = tuple(map(sum, zip(before, loaded, strict=True)))
        self.disk_tokens = tuple(map(sum, zip(disk_before, loaded_from_disk, strict=True)))
        self.hit_tokens += sum(loaded)
        self.query_tokens += sum(call.num_columns - max(first, padding) for padding in call.padding)


def _num_common(a: range, b: range) -> int:
    return max(0, min(a.stop, b.stop) - max(a.start, b.start))
