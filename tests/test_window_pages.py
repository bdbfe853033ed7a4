"""Window pages: what each lease sees is there, the rest can be taken back, and hits end where all layers can go on."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from radixkv import Lease, PrefixCache
from radixkv.cache.residency.window_pages import WindowPages
from radixkv.errors import ConfigError, InvalidRequestError, InvariantError, OutOfPagesError

NOTHING = -1
Value = tuple[int, ...]


def brute_force_valid(has: list[bool], page_size: int, window: int, sinks: int) -> int:
    """The longest hit in whole pages after which every token that the next one sees lies in a page that has one."""
    for num_pages in range(len(has), 0, -1):
        position = num_pages * page_size
        seen = [j for j in range(position) if j > position - window or j < sinks]
        if all(has[j // page_size] for j in seen):
            return num_pages
    return 0


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    has=st.lists(st.sampled_from([True, True, True, False]), max_size=14),
    page_size=st.sampled_from([1, 2, 4]),
    window=st.integers(1, 12),
    sinks=st.integers(0, 6),
)
def test_the_longest_usable_hit(has: list[bool], page_size: int, window: int, sinks: int) -> None:
    windows = WindowPages(20, num_window_pages=40, page_size=page_size, window_tokens=window, sink_tokens=sinks)
    pages = np.arange(3, 3 + len(has), dtype=np.int32)
    windows.take(pages[np.array(has, bool)])
    expected = brute_force_valid(has, page_size, window, -(-sinks // page_size) * page_size)
    assert windows.usable_pages(pages) == expected


def make_cache(num_pages: int = 32, num_window_pages: int = 6, window: int = 6, sinks: int = 0) -> PrefixCache:
    """Pages of 2 tokens; without KV to copy."""
    windows = WindowPages(
        num_pages, num_window_pages=num_window_pages, page_size=2, window_tokens=window, sink_tokens=sinks
    )
    return PrefixCache(num_pages, 2, residency=windows)


def serve(cache: PrefixCache, ids: list[int], *, chunk: int = 4) -> int:
    """Run a request to its end; returns its cached tokens."""
    with cache.acquire(ids, max_cached_tokens=len(ids) - 1) as lease:
        cached = lease.cached_tokens
        for first in range(cached, len(ids), chunk):
            lease.cover(first, min(first + chunk, len(ids)))
            cache.check_invariants()
            lease.commit(ids[: first + chunk])
            cache.check_invariants()
    cache.check_invariants()
    return cached


def test_a_long_sequence_needs_its_window_alone() -> None:
    cache = make_cache()
    ids = list(range(50))
    assert serve(cache, ids) == 0
    stats = cache.stats()
    assert (stats.window_pages, stats.free_window_pages, stats.evictable_window_pages) == (6, 0, 6)
    assert stats.total_tokens == 50
    assert serve(cache, [*ids, 100, 101]) == 50, "where it ended the next turn goes on"
    assert cache.peek([*ids[:20], 300, 301]) == 0, "what it passed is gone"


def test_what_a_request_ends_with_outlives_what_others_passed() -> None:
    cache = make_cache(num_window_pages=9)
    serve(cache, list(range(8)))
    serve(cache, list(range(100, 140)))
    assert cache.peek([*range(8), 300]) == 8


def test_where_prompts_branch_window_pages_are_kept_like_those_of_ends() -> None:
    cache = make_cache(num_pages=96, num_window_pages=14)
    shared = list(range(12))
    serve(cache, [*shared, *range(100, 112)])
    serve(cache, list(range(500, 530)))
    assert serve(cache, [*shared, *range(200, 212)]) == 0, "passed, and taken back"
    for tenant in range(3, 6):
        serve(cache, list(range(1000 * tenant, 1000 * tenant + 12)))
        assert serve(cache, [*shared, *range(100 * tenant, 100 * tenant + 12)]) == 12


def test_a_prefix_that_lost_its_window_gets_it_again() -> None:
    cache = make_cache(num_pages=64)
    ids = list(range(30))
    serve(cache, ids)
    serve(cache, list(range(100, 130)))
    pages_before = cache.stats().total_tokens
    assert cache.peek([*ids, 99]) == 0
    assert serve(cache, [*ids, 99, 98]) == 0
    assert cache.stats().total_tokens == pages_before + 2, "the cached pages took up the new window pages"
    assert cache.peek([*ids, 99]) == 30


def test_sinks_stay() -> None:
    cache = make_cache(sinks=3, num_window_pages=8)
    with cache.acquire(list(range(40))) as lease:
        for position in range(40):
            lease.cover(position, position + 1)
            assert set(range(min(2, position // 2 + 1))) <= {
                lease.pages.tolist().index(page) for page in lease.seen_pages
            }
            assert len(lease.seen_pages) <= 2 + 4
            cache.check_invariants()


def test_too_few_window_pages_take_nothing() -> None:
    cache = make_cache()
    first, second = cache.acquire(list(range(8))), cache.acquire(list(range(50, 58)))
    first.cover(0, 8)
    before = cache.stats()
    with pytest.raises(OutOfPagesError, match="4 pages of the layers that see a window are needed, but only 2 of 6"):
        second.cover(0, 8)
    assert cache.stats() == before
    assert second.coverable_tokens() == 4
    second.cover(0, 4)
    first.release()
    second.cover(4, 8)
    second.release()
    cache.check_invariants()
    assert cache.stats().free_window_pages == 6


def test_what_was_given_up_cannot_be_seen_again() -> None:
    cache = make_cache()
    with cache.acquire(list(range(30))) as lease:
        lease.cover(0, 10)
        lease.cover(10, 12)
        with pytest.raises(InvalidRequestError, match="tokens 3 to 4 cannot be computed"):
            lease.cover(3, 4)
        with pytest.raises(InvalidRequestError, match="tokens 12 to 31 cannot be computed"):
            lease.cover(12, 31)


def test_tokens_that_were_never_covered_cannot_be_skipped() -> None:
    cache = make_cache()
    with cache.acquire(list(range(12))) as lease:
        lease.cover(0, 4)
        with pytest.raises(InvalidRequestError, match="tokens 5 to 8 cannot be computed: those from 4 on come first"):
            lease.cover(5, 8)
        cache.check_invariants()
        lease.cover(4, 8)
        cache.check_invariants()


def test_windows_of_another_cache_are_refused() -> None:
    windows = WindowPages(32, num_window_pages=8, page_size=2, window_tokens=6)
    with pytest.raises(ConfigError, match="windows are for 32 pages of 2 tokens, and the cache has 64 of 2"):
        PrefixCache(64, 2, residency=windows)


def test_explain_tells_of_windows() -> None:
    cache = make_cache()
    ids = list(range(30))
    serve(cache, ids)
    found = cache.explain([*ids[:20], 300])
    assert (found.cached_tokens, found.reason, found.given_up_tokens) == (0, "window", 20)
    assert str(found) == (
        "0 of 21 tokens are cached; 20 more are, but not in the layers that see a window of tokens: their pages made "
        "room for others"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_window_pages": 4}, "4 window pages of 2 tokens are too few: one request needs 5 for its window of 6"),
        ({"num_window_pages": 6, "sink_tokens": 3}, "needs 7 for its window of 6 tokens and 3 sinks"),
        ({"window_tokens": 0}, "window_tokens must be at least 1 and sink_tokens at least 0; got 0 and 0"),
    ],
)
def test_what_cannot_be(change: dict[str, int], message: str) -> None:
    settings = {"num_window_pages": 8, "page_size": 2, "window_tokens": 6}
    with pytest.raises(ConfigError, match=message):
        WindowPages(32, **{**settings, **change})


def add_pin(windows: WindowPages, page: NDArray[np.int32]) -> None:
    windows.pin(page)


def lose(windows: WindowPages, page: NDArray[np.int32]) -> None:
    windows.window_page_of[page] = windows.scratch


def lend_twice(windows: WindowPages, page: NDArray[np.int32]) -> None:
    windows.window_page_of[page] = windows.window_page_of[page + 1]


def miscount(windows: WindowPages, page: NDArray[np.int32]) -> None:
    windows.num_evictable += 1


def keep_for_nobody(windows: WindowPages, page: NDArray[np.int32]) -> None:
    unused = np.array([windows.num_pages - 1], np.int32)
    windows.take(unused)
    windows.unpin_passed(unused)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (add_pin, "are pinned"),
        (lose, "lost or lent twice"),
        (lend_twice, "lost or lent twice"),
        (miscount, "are counted"),
        (keep_for_nobody, "keep window pages for nobody"),
    ],
)
def test_broken_invariants_are_found(damage: Callable[[WindowPages, NDArray[np.int32]], None], message: str) -> None:
    windows = WindowPages(32, num_window_pages=6, page_size=2, window_tokens=6)
    pages = np.arange(4, dtype=np.int32)
    windows.take(pages)
    pins = np.array([1] * 4 + [0] * 28)
    in_tree = np.zeros(32, bool)
    windows.check_invariants(pins, in_tree, [])
    damage(windows, pages[:1])
    with pytest.raises(InvariantError, match=message):
        windows.check_invariants(pins, in_tree, [])


# -- a cache with simulated KV ------------------------------------------------------------------------------------


@dataclass
class Running:
    lease: Lease
    ids: list[int]
    computed: int
    loading: int | None = None  # up to which token


class Simulation:
    """Requests over two kinds of layers. KV of a token is the tuple of all tokens up to it; each query checks that what
    it sees is there in both kinds of layers."""

    def __init__(self, seed: int, page_size: int, window: int, sinks: int, num_window_pages: int) -> None:
        self.rng = random.Random(seed)
        self.page_size, self.window, self.sinks = page_size, window, sinks
        num_pages = 40
        self.windows = WindowPages(
            num_pages,
            num_window_pages=num_window_pages,
            page_size=page_size,
            window_tokens=window,
            sink_tokens=sinks,
        )
        self.cache = PrefixCache(num_pages, page_size, copy_page=self.copy_page, residency=self.windows)
        self.full: dict[tuple[int, int], Value] = {}
        self.windowed: dict[tuple[int, int], Value] = {}
        self.running: list[Running] = []
        self.fails_to_copy = False
        self.hits = self.copies = self.shortages = self.loads = 0

    def copy_page(self, source: int, target: int, num_tokens: int) -> None:
        if self.fails_to_copy:
            raise RuntimeError("the device is gone")
        self.copies += 1
        of_page = self.windows.window_page_of
        for i in range(num_tokens):
            self.full[target, i] = self.full[source, i]
            self.windowed[int(of_page[target]), i] = self.windowed[int(of_page[source]), i]

    def start(self) -> None:
        length = self.rng.randint(1, 9 * self.page_size)
        ids = [int(self.rng.random() < 0.08) for _ in range(length)]
        limit = self.rng.choice([None, length - 1])
        expected = self.cache.peek(ids[:limit])
        self.fails_to_copy = self.rng.random() < 0.1
        try:
            lease = self.cache.acquire(ids, max_cached_tokens=limit)
        except (OutOfPagesError, RuntimeError):
            return
        finally:
            self.fails_to_copy = False
        assert lease.cached_tokens in (expected, expected // self.page_size * self.page_size)
        self.hits += lease.cached_tokens > 0
        self.running.append(Running(lease, ids, lease.cached_tokens))

    def compute(self, request: Running) -> None:
        if request.loading is not None:
            self.end_load(request, request.loading)
        first = request.computed
        last = min(len(request.ids), first + self.rng.randint(1, 2 * self.page_size))
        if first == last:
            return
        try:
            request.lease.cover(first, last)
        except OutOfPagesError:
            self.shortages += 1
            return
        for position in range(first, last):
            page, offset = int(request.lease.pages[position // self.page_size]), position % self.page_size
            value = tuple(request.ids[: position + 1])
            self.full[page, offset] = value
            self.windowed[int(self.windows.window_page_of[page]), offset] = value
            self.check_sight(request, position)
        request.computed = last

    def begin_load(self, request: Running) -> None:
        """As if a tier had more of the prompt; one may begin after another that has failed, or brought less."""
        if request.loading is not None:
            self.end_load(request, request.loading)
        if self.sinks or request.computed == len(request.ids):
            return
        last = self.rng.randint(request.computed + 1, len(request.ids))
        try:
            request.lease.prepare_load(request.computed, last)
        except OutOfPagesError:
            return
        request.loading = last

    def end_load(self, request: Running, last: int) -> None:
        """It has come, where there is a page for it; or it has failed, and what was there before is there still."""
        request.loading = None
        if self.rng.random() < 0.4:
            return
        for position in range(request.computed, last):
            page, offset = int(request.lease.pages[position // self.page_size]), position % self.page_size
            value = tuple(request.ids[: position + 1])
            self.full[page, offset] = value
            if self.windows.holds(page):
                self.windowed[int(self.windows.window_page_of[page]), offset] = value
        request.computed = last
        self.loads += 1

    def check_sight(self, request: Running, position: int) -> None:
        for j in range(position + 1):
            page, offset = int(request.lease.pages[j // self.page_size]), j % self.page_size
            assert self.full[page, offset] == tuple(request.ids[: j + 1])
            if j > position - self.window or j < self.sinks:
                assert self.windowed[int(self.windows.window_page_of[page]), offset] == tuple(request.ids[: j + 1])

    def step(self) -> None:
        action = self.rng.random()
        if not self.running or action < 0.2:
            self.start()
            return
        request = self.rng.choice(self.running)
        if action < 0.65:
            self.compute(request)
        elif action < 0.75:
            self.begin_load(request)
        elif action < 0.85:
            request.lease.commit(request.ids[: request.computed])
        else:
            self.running.remove(request)
            if self.rng.random() < 0.8:
                request.lease.commit(request.ids[: request.computed])
            request.lease.release()

    def end(self) -> None:
        for request in self.running:
            request.lease.release()
        self.cache.reset()
        self.cache.check_invariants()
        stats = self.cache.stats()
        assert (stats.free_pages, stats.free_window_pages) == (stats.num_pages, stats.window_pages)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.stress) for seed in (1, 2))])
@pytest.mark.parametrize(
    ("page_size", "window", "sinks", "num_window_pages"),
    [(1, 3, 0, 9), (2, 3, 0, 8), (4, 5, 0, 9), (4, 9, 0, 11), (2, 4, 3, 10), (4, 3, 5, 9), (4, 30, 0, 14)],
)
def test_what_a_request_sees_is_there(
    seed: int, page_size: int, window: int, sinks: int, num_window_pages: int
) -> None:
    simulation = Simulation(seed, page_size, window, sinks, num_window_pages)
    for _ in range(400):
        simulation.step()
        simulation.cache.check_invariants()
    simulation.end()
    assert simulation.hits > 10
    assert simulation.windows.num_taken_back > 5
    assert simulation.copies > 2 or page_size == 1
    assert simulation.loads > 2 or sinks


def test_a_dropped_lease_gives_its_window_pages_back() -> None:
    cache = make_cache()
    lease = cache.acquire(list(range(8)))
    lease.cover(0, 8)
    with pytest.warns(ResourceWarning, match="dropped without release"):
        del lease
    cache.check_invariants()
    assert cache.stats().free_window_pages == 6


def test_a_load_is_given_the_window_after_it_and_takes_nothing_before_it_has_come() -> None:
    cache = make_cache(num_window_pages=8)
    ids = list(range(40))
    for comes in (False, True):
        with cache.acquire(ids) as lease:
            lease.cover(0, 10)
            assert len(lease.seen_pages) == 5
            lease.prepare_load(10, 30)
            cache.check_invariants()
            assert lease.seen_pages.tolist() == [*lease.pages[:5], *lease.pages[12:15]], "25 to 30 are seen by 30"
            lease.cover(30 if comes else 10, 32 if comes else 12)
            cache.check_invariants()
            seen = lease.pages[12:16] if comes else lease.pages[2:6]
            assert lease.seen_pages.tolist() == seen.tolist()


def test_a_load_that_finds_no_window_pages_changes_nothing() -> None:
    cache = make_cache(num_window_pages=6)
    with cache.acquire(range(40)) as lease:
        lease.cover(0, 8)
        with pytest.raises(OutOfPagesError):
            lease.prepare_load(8, 30)
        assert lease.seen_pages.tolist() == lease.pages[:4].tolist()
        cache.check_invariants()
        lease.cover(8, 10)
