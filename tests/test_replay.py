"""Replaying traces: the figures against dull simulations."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import count, islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from radixkv import RadixTree
from radixkv.cache.eviction.policies import POLICIES, LRUPolicy
from radixkv.cache.tree.node import TreeNode
from radixkv.errors import ConfigError
from radixkv.replay import simulation as replay_module
from radixkv.replay.belady import measure_reuse
from radixkv.replay.simulation import ReplayResult, replay_optimum, replay_trace
from radixkv.replay.traces import Request
from strategies import spell

words = st.tuples(st.text("abc", min_size=1, max_size=6), st.text("ab", max_size=2))


def request(word: tuple[str, str], page_size: int, tail_tokens: int) -> Request:
    """A request of pages, a letter each: a prompt and its output."""
    prompt, output = word
    keys = spell(prompt, page_size, 0 if output else tail_tokens)
    return Request.of_tokens(keys, [*spell(output, page_size, tail_tokens), 0])


def step_by_step(requests: Sequence[Request], policy: str, capacity: int, page_size: int) -> tuple[int, int]:
    """Tokens hit and evicted, with pages of their own and a proof after each step; `capacity` is in tokens."""
    tree, new_pages = RadixTree(page_size, policy, clock=lambda: 0.0), count()
    hit_tokens = evicted_tokens = 0
    for keys, stored, _, _ in requests:
        found = tree.match_prefix(keys)
        hit_tokens += found.length
        tree.inc_lock_ref(found.node)
        needed = len(stored) // page_size * page_size - found.length
        evicted_tokens += page_size * len(tree.evict(tree.total_size + needed - capacity))
        fitting = min(needed, (capacity - tree.total_size) // page_size * page_size)
        pages = list(islice(new_pages, (found.length + fitting) // page_size))
        tree.insert(stored[: found.length + fitting], pages)
        tree.dec_lock_ref(found.node)
        tree.check_invariants()
        assert tree.total_size <= capacity
    return hit_tokens, evicted_tokens


@given(
    st.lists(words, min_size=1, max_size=20),
    st.sampled_from(list(POLICIES)),
    st.integers(1, 12),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 3),
)
def test_every_policy_step_by_step(
    drawn: list[tuple[str, str]], policy: str, num_pages: int, page_size: int, tail_tokens: int
) -> None:
    requests = [request(word, page_size, tail_tokens) for word in drawn]
    capacity = num_pages * page_size
    result = replay_trace(requests, policy, capacity + page_size - 1, page_size)  # what is no whole page does not count
    assert (result.hit_tokens, result.evicted_tokens) == step_by_step(requests, policy, capacity, page_size)
    assert (result.policy, result.num_requests) == (policy, len(requests))
    assert result.query_tokens == sum(len(request.keys) for request in requests)


@given(st.lists(st.integers(0, 7), min_size=1, max_size=60), st.integers(1, 8))
def test_lru_of_single_pages(items: list[int], capacity: int) -> None:
    cached: OrderedDict[int, None] = OrderedDict()
    hits = evicted = 0
    for item in items:
        hits += item in cached
        cached[item] = None
        cached.move_to_end(item)
        if len(cached) > capacity:
            cached.popitem(last=False)
            evicted += 1
    result = replay_trace([Request.of_tokens([item]) for item in items], "lru", capacity, page_size=1)
    assert (result.hit_tokens, result.evicted_tokens) == (hits, evicted)


def test_a_block_counts_its_tokens_and_takes_room_as_a_whole() -> None:
    blocks = [np.array(ids, np.int32) for ids in ([1, 2], [3], [1, 2])]
    requests = [Request(ids, ids, num_tokens) for ids, num_tokens in zip(blocks, (7, 4, 7), strict=True)]
    enough = replay_trace(requests, "lru", 12, 1, key_tokens=4)
    assert (enough.hit_tokens, enough.query_tokens, enough.evicted_tokens) == (7, 18, 0)
    # 2 goes for 3, and 3 for 2
    assert replay_trace(requests, "lru", 11, 1, key_tokens=4).evicted_tokens == 8


def test_of_what_is_too_large_the_beginning_is_kept() -> None:
    requests = [Request.of_tokens(ids) for ids in ([9, 9], range(7), range(3), [9, 9], range(4))]
    result = replay_trace(requests, "lru", capacity_tokens=4, page_size=2)
    # 0-3 replace 9 9, which replace 2 3, and are replaced once more
    assert result.hit_tokens == len([0, 1, 0, 1])
    assert result.evicted_tokens == len([9, 9, 2, 3, 9, 9])


class Watch(LRUPolicy):
    """Notes the time at which leaves are added."""

    name = "watch"

    def __init__(self) -> None:
        self.times: list[float] = []

    def added(self, node: TreeNode) -> None:
        self.times.append(self.tree.clock())


def test_policies_see_the_time_of_the_trace() -> None:
    policy = Watch()
    times = [1.5, 2.0, 0.5, 4.0]
    requests = [Request.of_tokens([item], time_s=time_s) for item, time_s in enumerate(times)]
    result = replay_trace(requests, policy, 10, page_size=1)
    assert policy.times == [1.5, 2.0, 2.0, 4.0]  # never back
    assert result.policy == "watch"


def test_the_optimum_is_a_policy_like_others() -> None:
    requests = [Request.of_tokens(ids, [7, 7, 7]) for ids in ([1, 1, 2, 2], [3, 3], [1, 1, 2, 2, 5])]
    result = replay_trace(requests, "belady", 9, page_size=2)
    reuse = measure_reuse(requests, 2)
    again = replay_optimum(reuse, 9, 2)
    assert (result.policy, result.num_requests, result.query_tokens) == ("belady", 3, 11)
    assert (result.hit_tokens, result.evicted_tokens) == (again.hit_tokens, again.evicted_tokens)
    assert result.hit_tokens == 4
    assert result.evicted_tokens == (6 + 4 + 6) - 4 - 8  # computed, but for what is left at the end


def test_rates() -> None:
    result = ReplayResult("lru", 10, num_requests=4, query_tokens=50, hit_tokens=20, evicted_tokens=3, elapsed_s=0.002)
    assert result.hit_rate == 0.4
    assert result.us_per_request == pytest.approx(500.0)
    for policy in ("lru", "belady"):
        nothing = replay_trace([], policy, 10, page_size=1)
        assert (nothing.hit_rate, nothing.us_per_request, nothing.evicted_tokens) == (0.0, 0.0, 0)


@pytest.mark.parametrize("policy", ["lru", "belady"])
def test_progress_counts_requests(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay_module, "BATCH", 4)
    done: list[int] = []
    result = replay_trace((Request.of_tokens([item]) for item in range(10)), policy, 5, 1, on_progress=done.append)
    assert sum(done) == result.num_requests == 10
    assert len(done) > 1


@pytest.mark.parametrize("policy", ["lru", "belady"])
def test_a_capacity_holds_at_least_a_page(policy: str) -> None:
    requests = [Request.of_tokens([1, 2, 3])]
    for capacity in (-1, 0, 7):
        with pytest.raises(ConfigError, match=f"a capacity of {capacity} tokens holds no page or block of 8"):
            replay_trace(requests, policy, capacity, page_size=2, key_tokens=4)


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match="unknown eviction policy 'mru'"):
        replay_trace([], "mru", 10)
    for policy in ("lru", "belady"):
        with pytest.raises(ConfigError, match="page_size must be an integer of at least 1, not 0"):
            replay_trace([], policy, 10, page_size=0)
