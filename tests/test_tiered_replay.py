"""A replay through tiers, against figures that a dull model of each mode gives."""

from __future__ import annotations

from itertools import pairwise

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


def found_in_pool(requests: list[Request], capacity: int) -> list[int]:
    """What each request finds in a pool of `capacity` tokens in LRU order."""
    runs = [replay_trace(requests[:end], "lru", capacity, 1).hit_tokens for end in range(len(requests) + 1)]
    return [after - before for before, after in pairwise(runs)]


@pytest.mark.parametrize("writes", ["through", "selective"])
@given(PROMPTS, st.integers(10, 50))
def test_what_was_computed_or_found_twice_is_found_below(
    writes: TierWrites, prompts: list[list[int]], capacity: int
) -> None:
    requests = requests_of(prompts)
    result = replay_tiers(requests, [TierSize("pool", capacity), TierSize("disk", 10**6)], "lru", writes, 1)
    below: set[tuple[int, ...]] = set()
    from_below = 0
    for request, in_pool in zip(requests, found_in_pool(requests, capacity), strict=True):
        keys, stored = tuple(request.keys.tolist()), tuple(request.stored.tolist())
        found = in_pool
        while found < len(keys) and keys[: found + 1] in below:
            found += 1
        from_below += found - in_pool
        going_down = stored if writes == "through" else keys[:found]
        below |= {going_down[: end + 1] for end in range(len(going_down))}
    assert result.tiers[1].hit_tokens == from_below
    assert result.tiers[0].hit_tokens == replay_trace(requests, "lru", capacity, 1).hit_tokens
    assert result.tiers[1].written_tokens == len(below)


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


@pytest.mark.parametrize(("writes", "hits"), [("through", [4, 0]), ("back", [4, 4]), ("selective", [4, 0])])
def test_each_mode_by_hand(writes: TierWrites, hits: list[int]) -> None:
    first, other = [1, 2, 3, 4], [5, 6, 7, 8]
    requests = [Request(np.array(ids, np.int32), np.array(ids, np.int32), 4) for ids in (first, other, first, first)]
    result = replay_tiers(requests, [TierSize("pool", 4), TierSize("disk", 4)], writes=writes, page_size=2)
    # "through": the disk is as small as the pool, so `other` drives `first` out of both
    assert [tier.hit_tokens for tier in result.tiers] == hits


def test_without_a_tier_there_is_nothing_to_replay() -> None:
    with pytest.raises(ConfigError, match="a replay needs one tier at least, the pool"):
        replay_tiers([], [])
