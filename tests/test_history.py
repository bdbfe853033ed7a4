"""The eviction history and the timeline against lists that remember everything."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from radixkv.cache.insight.history import Eviction, EvictionHistory, Timeline
from radixkv.errors import ConfigError

HERE = ("tenant a", None)  # a namespace


def hashes(*values: int) -> NDArray[np.uint64]:
    return np.array(values, np.uint64)


def evict(history: EvictionHistory, page_hashes: NDArray[np.uint64], number: int) -> None:
    """Eviction `number`, told apart by its times."""
    history.record(
        page_hashes,
        HERE,
        policy=f"policy {number}",
        evicted_at_s=10.0 * number,
        last_used_at_s=None if number % 5 == 0 else 7.0 * number,
        evicted_tick=3 * number,
        last_use_tick=2 * number,
    )


class Remembered:
    """The oracle: every eviction in a list, cut to the last `capacity_pages` pages and `capacity_pages / 8` nodes."""

    def __init__(self, capacity_pages: int) -> None:
        self.capacity_pages = capacity_pages
        self.nodes: list[tuple[int, list[int]]] = []

    def evict(self, page_hashes: list[int], number: int) -> None:
        self.nodes = [*self.nodes, (number, page_hashes)][-math.ceil(self.capacity_pages / 8) :]
        excess = sum(len(pages) for _, pages in self.nodes) - self.capacity_pages
        for i, (node, pages) in enumerate(self.nodes):
            self.nodes[i] = node, pages[max(excess, 0) :]
            excess -= len(pages)

    def find(self, page_hashes: list[int]) -> tuple[int, int] | None:
        """The number of the eviction that took the first page last, and how many leading pages are gone."""
        ghosts = {page for _, pages in self.nodes for page in pages}
        leading = next((i for i, page in enumerate(page_hashes) if page not in ghosts), len(page_hashes))
        numbers = [number for number, pages in self.nodes if page_hashes and page_hashes[0] in pages]
        return (numbers[-1], leading) if numbers else None


@pytest.mark.parametrize("capacity_pages", [1, 2, 7, 8, 40, 100])
@pytest.mark.parametrize("pages_a_node", [1, 12, 60])
def test_agrees_with_a_list_of_everything(capacity_pages: int, pages_a_node: int) -> None:
    rng = np.random.default_rng(capacity_pages)
    history, oracle = EvictionHistory(capacity_pages), Remembered(capacity_pages)
    for number in range(150):
        first, num_pages = int(rng.integers(0, 200)), int(rng.integers(1, pages_a_node + 1))
        node = list(range(first, first + num_pages))  # page 0 too: what was never written must not look like it
        evict(history, hashes(*node), number)
        oracle.evict(node, number)
        assert len(history) == sum(len(pages) for _, pages in oracle.nodes)
        start = int(rng.integers(0, 260))
        asked = list(range(start, start + int(rng.integers(0, 100))))
        found, expected = history.find(hashes(*asked), HERE), oracle.find(asked)
        if expected is None:
            assert found is None
        else:
            assert found is not None
            assert (found.policy, found.num_pages) == (f"policy {expected[0]}", expected[1])


def test_tells_when_why_and_how_long_after_the_last_use() -> None:
    history = EvictionHistory(100)
    history.record(
        hashes(1, 2), HERE, policy="slru", evicted_at_s=12.5, last_used_at_s=2.5, evicted_tick=40, last_use_tick=30
    )
    found = history.find(hashes(2, 3), HERE)
    assert found == Eviction(
        num_pages=1, policy="slru", evicted_at_s=12.5, last_used_at_s=2.5, evicted_tick=40, last_use_tick=30
    )
    assert (found.unused_s, found.unused_ticks) == (10.0, 10)


def test_last_use_may_be_untimed() -> None:
    history = EvictionHistory(100)
    evict(history, hashes(1), 5)
    found = history.find(hashes(1), HERE)
    assert found is not None
    assert (found.last_used_at_s, found.unused_s, found.unused_ticks) == (None, None, 5)


def test_pages_of_several_evictions_follow_each_other() -> None:
    """A path leaves leaf by leaf, so its first pages were evicted last."""
    history = EvictionHistory(100)
    for number, node in enumerate([hashes(5, 6), hashes(3, 4), hashes(1, 2)]):
        evict(history, node, number)
    found = history.find(hashes(1, 2, 3, 4, 5, 9, 6), HERE)
    assert found is not None
    assert (found.policy, found.num_pages) == ("policy 2", 5)


def test_of_two_evictions_the_newest_counts() -> None:
    history = EvictionHistory(100)
    evict(history, hashes(1, 2, 3), 1)
    evict(history, hashes(1, 2), 2)
    assert [history.find(hashes(page), HERE).policy for page in (1, 2, 3)] == ["policy 2", "policy 2", "policy 1"]  # type: ignore[union-attr]


def test_never_seen_and_forgotten_pages_are_not_found() -> None:
    history = EvictionHistory(16)
    assert history.find(hashes(0), HERE) is None
    assert history.find(hashes(), HERE) is None
    evict(history, hashes(1, 2), 1)
    assert history.find(hashes(0), HERE) is None
    assert history.find(hashes(3, 1), HERE) is None
    evict(history, np.arange(10, 26, dtype=np.uint64), 2)
    assert history.find(hashes(2), HERE) is None
    assert len(history) == 16


def test_what_was_never_evicted_is_mostly_known_without_looking_at_all_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    history, rng, looks = EvictionHistory(1000), np.random.default_rng(0), 0
    look = np.flatnonzero

    def counted(found: NDArray[np.bool_]) -> NDArray[np.int64]:
        nonlocal looks
        looks += 1
        return look(found)

    monkeypatch.setattr(np, "flatnonzero", counted)
    for number in range(100):
        newest = rng.integers(0, 2**63, 30).astype(np.uint64)
        evict(history, newest, number)
    asked = rng.integers(0, 2**63, 1000).astype(np.uint64)
    assert all(history.find(asked[i : i + 1], HERE) is None for i in range(1000))
    assert looks < 300, "1,000 pages share 4,096 slots with the questions"
    looks = 0
    assert all(history.find(newest[i : i + 1], HERE) is not None for i in range(30))
    assert looks <= 2, "those that were evicted last are found where they lie"


def test_a_hash_that_another_namespace_also_has_is_not_found() -> None:
    """Hashes of 64 bits can be made to collide: the namespace decides, also for the pages that follow."""
    history, there = EvictionHistory(100), ("tenant b", None)
    evict(history, hashes(1, 2), 1)
    history.record(
        hashes(3, 2, 1), there, policy="theirs", evicted_at_s=0.0, last_used_at_s=None, evicted_tick=9, last_use_tick=9
    )
    for asked, num_pages in ((hashes(1, 2, 3), 2), (hashes(2, 1, 3), 2), (hashes(2, 3, 1), 1)):
        found = history.find(asked, HERE)
        assert found is not None
        assert (found.policy, found.num_pages) == ("policy 1", num_pages)
    assert history.find(hashes(3, 2), HERE) is None
    found = history.find(hashes(3, 2, 1, 1), there)
    assert found is not None
    assert (found.policy, found.num_pages) == ("theirs", 4)
    assert history.find(hashes(1), ("tenant a", "salt")) is None


def test_clear_forgets_everything() -> None:
    history = EvictionHistory(16)
    evict(history, hashes(1, 2), 1)
    history.clear()
    assert (len(history), history.find(hashes(1), HERE)) == (0, None)
    evict(history, hashes(2), 2)
    assert history.find(hashes(1), HERE) is None
    assert history.find(hashes(2), HERE) is not None


def test_memory_is_bounded_for_single_pages() -> None:
    history = EvictionHistory(80)
    for number in range(1000):
        evict(history, hashes(number), number)
    assert (len(history), history.num_nodes) == (10, 10)
    assert history.find(hashes(990), HERE) is not None
    assert history.find(hashes(989), HERE) is None


@pytest.mark.parametrize("capacity_pages", [0, -1])
def test_capacity_below_one_is_refused(capacity_pages: int) -> None:
    with pytest.raises(ConfigError, match=f"capacity_pages must be an integer of at least 1, not {capacity_pages}"):
        EvictionHistory(capacity_pages)


# -- timeline --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest_step", [1, 50])
def test_remembered_ticks_lie_near_for_their_age(largest_step: int) -> None:
    rng = np.random.default_rng(largest_step)
    ticks = np.cumsum(rng.integers(1, largest_step + 1, 20_000))
    seconds = np.cumsum(rng.exponential(size=20_000))
    timeline = Timeline()
    for now, (tick, now_s) in enumerate(zip(ticks.tolist(), seconds.tolist(), strict=True)):
        timeline.add(tick, now_s)
        if now % 1999 == 0:
            thens = np.arange(0, now + 1, 7)
            near = (tick - ticks[thens]) // 64 + largest_step
            earliest_s = seconds[ticks.searchsorted(ticks[thens] - near)]
            latest_s = seconds[np.minimum(ticks.searchsorted(ticks[thens] + near), now)]
            found_s = np.array([timeline.seconds_at(then) for then in ticks[thens].tolist()])
            assert (earliest_s <= found_s + 1e-9).all()
            assert (found_s <= latest_s + 1e-9).all()
    assert len(timeline) <= 256 * np.log(ticks[-1])
    assert timeline.seconds_at(int(ticks[-1])) == seconds[-1]


def test_timeline_is_exact_while_it_is_short() -> None:
    timeline = Timeline()
    for tick in range(60):
        timeline.add(tick, tick * tick)
    assert [timeline.seconds_at(tick) for tick in range(60)] == [tick * tick for tick in range(60)]


def test_ticks_between_before_and_after() -> None:
    timeline = Timeline()
    assert timeline.seconds_at(5) is None
    timeline.add(10, 1.0)
    timeline.add(14, 3.0)
    assert [timeline.seconds_at(tick) for tick in (9, 10, 11, 13, 14, 99)] == [None, 1.0, 1.5, 2.5, 3.0, 3.0]


def test_ticks_only_grow() -> None:
    timeline = Timeline()
    timeline.add(10, 1.0)
    with pytest.raises(AssertionError):
        timeline.add(10, 2.0)
