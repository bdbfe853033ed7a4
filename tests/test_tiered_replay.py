"""A replay through tiers, against figures that a dull model of each mode gives."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from radixkv.config import TierWrites
from radixkv.errors import ConfigError
from radixkv.replay.simulation import replay_trace
from radixkv.replay.tiered import TierSize, replay_tiers
from radixkv.replay.traces import Request

PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=25)


def requests_of(prompts: list[list[int]]) -> list[Request]:
    return [Request.of_tokens(prompt, output=[7, 8], time_s=float(number)) for number, prompt in enumerate(prompts)]


class DullStore:
    """Prefixes of one token more each, in the order of their last use; the longest of a chain is the oldest."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.prefixes = capacity, OrderedDict[tuple[int, ...], None]()

    def found(self, keys: tuple[int, ...]) -> int:
        return sum(keys[: end + 1] in self.prefixes for end in range(len(keys)))

    def store(self, keys: tuple[int, ...]) -> list[tuple[int, ...]]:
        chain = [keys[: end + 1] for end in range(min(len(keys), self.capacity))]
        for prefix in reversed(chain):
            self.prefixes.pop(prefix, None)
            self.prefixes[prefix] = None
        return [self.prefixes.popitem(last=False)[0] for _ in range(len(self.prefixes) - self.capacity)]


def dull_hits(requests: list[Request], sizes: list[TierSize], writes: TierWrites) -> list[int]:
    """Hit tokens of each tier, with the pool in LRU order, too."""
    stores = [DullStore(size.capacity_tokens) for size in sizes]
    hits = [0] * len(stores)
    for request in requests:
        keys, stored = tuple(request.keys.tolist()), tuple(request.stored.tolist())
        so_far = 0
        for number, store in enumerate(stores):
            here = max(so_far, store.found(keys))
            hits[number] += here - so_far
            so_far = here
        evicted = stores[0].store(stored)
        going_down = {"through": [stored], "selective": [keys[:so_far]], "back": evicted}[writes]
        for store in stores[1:]:
            for sequence in going_down:
                store.store(sequence)
    return hits


@given(PROMPTS, st.integers(1, 40), st.integers(1, 60))
def test_what_was_computed_or_found_twice_goes_down(prompts: list[list[int]], pool: int, disk: int) -> None:
    # The tree takes a use of the start of a leaf for one of all of it; so it is as the model where nothing gives way.
    requests, sizes = requests_of(prompts), [TierSize("pool", 10 + pool), TierSize("disk", 10 + disk)]
    modes: list[TierWrites] = ["through", "selective"]
    for writes in modes:
        result = replay_tiers(requests, sizes, writes=writes, page_size=1)
        assert result.tiers[0].hit_tokens == replay_trace(requests, "lru", 10 + pool, 1).hit_tokens
        if result.tiers[1].evicted_tokens == 0:
            both = sum(tier.hit_tokens for tier in result.tiers)
            assert both == sum(dull_hits(requests, sizes, writes))


@pytest.mark.parametrize("writes", ["through", "back"])
@given(PROMPTS, st.integers(1, 40))
def test_a_tier_that_loses_nothing_makes_any_pool_hit_what_one_without_limit_hits(
    writes: TierWrites, prompts: list[list[int]], pool: int
) -> None:
    requests = requests_of(prompts)
    result = replay_tiers(requests, [TierSize("pool", 10 + pool), TierSize("disk", 10**6)], "fifo", writes, 1)
    ceiling = replay_trace(requests, "lru", 10**6, 1)
    assert sum(tier.hit_tokens for tier in result.tiers) == ceiling.hit_tokens
    assert result.hit_rate == pytest.approx(ceiling.hit_rate)
    assert result.tiers[1].evicted_tokens == 0


@given(PROMPTS, st.integers(10, 50))
def test_pages_that_come_are_there_or_gave_way(prompts: list[list[int]], capacity: int) -> None:
    requests = requests_of(prompts)
    modes: list[TierWrites] = ["through", "selective", "back"]
    for writes in modes:
        sizes = [TierSize("pool", capacity), TierSize("host", capacity), TierSize("disk", 2 * capacity)]
        result = replay_tiers(requests, sizes, writes=writes, page_size=2)
        for tier in result.tiers:
            assert 0 <= tier.written_tokens - tier.evicted_tokens <= tier.capacity_tokens


def test_each_mode_by_hand() -> None:
    first, other = [1, 2, 3, 4], [5, 6, 7, 8]
    requests = [Request(np.array(ids, np.int32), np.array(ids, np.int32), 4) for ids in (first, other, first, first)]
    hits: dict[TierWrites, tuple[int, int]] = {"through": (4, 4), "back": (4, 4), "selective": (4, 0)}
    for writes, expected in hits.items():
        result = replay_tiers(requests, [TierSize("pool", 4), TierSize("disk", 4)], writes=writes, page_size=2)
        found = tuple(tier.hit_tokens for tier in result.tiers)
        if writes == "through":
            assert found == (4, 0)  # the disk is as small as the pool: `other` drove `first` out of both
        else:
            assert found == expected


def test_without_a_tier_there_is_nothing_to_replay() -> None:
    with pytest.raises(ConfigError, match="a replay needs one tier at least, the pool"):
        replay_tiers([], [])
