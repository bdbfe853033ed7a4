"""`PrefixWatch`: as long as it says that nothing has changed, `peek` says the same as before."""

from __future__ import annotations

import random
import sys

import pytest

from radixkv import Lease, PrefixCache
from radixkv.cache.residency.window_pages import WindowPages
from radixkv.cache.tree.node import TreeNode
from radixkv.errors import OutOfPagesError

PAGES = 24


def make_cache(page_size: int, *, exact: bool, windowed: bool) -> PrefixCache:
    windows = WindowPages(PAGES, num_window_pages=8, page_size=page_size, window_tokens=page_size + 1)
    return PrefixCache(
        PAGES, page_size, copy_page=(lambda *_: None) if exact else None, residency=windows if windowed else None
    )


class Walk:
    """Requests of few different tokens that come, are computed, shared and go, at random."""

    def __init__(self, cache: PrefixCache, seed: int) -> None:
        self.cache, self.rng = cache, random.Random(seed)
        self.leases: list[tuple[Lease, list[int], str | None]] = []

    def ids(self) -> list[int]:
        return [int(self.rng.random() < 0.1) for _ in range(self.rng.randint(1, 7 * self.cache.page_size))]

    def namespace(self) -> str | None:
        return self.rng.choice([None, "tenant"])

    def step(self) -> None:
        action = self.rng.random()
        if action < 0.02:
            self.cache.reset()
        elif action < 0.4 or not self.leases:
            ids, namespace = self.ids(), self.namespace()
            try:
                lease = self.cache.acquire(ids, extra_key=namespace)
            except OutOfPagesError:
                return
            self.leases.append((lease, ids, namespace))
            self.compute(lease, ids)
        else:
            lease, ids, _ = self.leases.pop(self.rng.randrange(len(self.leases)))
            if self.rng.random() < 0.8 and self.compute(lease, ids):
                lease.commit(ids[: self.rng.randint(lease.cached_tokens, len(ids))])
            lease.release()

    def compute(self, lease: Lease, ids: list[int]) -> bool:
        try:
            lease.cover(lease.cached_tokens, len(ids))
        except OutOfPagesError:
            return False
        return True


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("page_size", [1, 2, 4])
def test_a_current_watch_knows_what_peek_says(page_size: int, exact: bool, windowed: bool) -> None:
    cache = make_cache(page_size, exact=exact, windowed=windowed)
    walk = Walk(cache, seed=page_size)
    asked = [(walk.ids(), walk.namespace()) for _ in range(12)]
    watches = [cache.watch(ids, extra_key=namespace) for ids, namespace in asked]
    held = stale = 0
    for _ in range(120):
        walk.step()
        for watch, (ids, namespace) in zip(watches, asked, strict=True):
            now = cache.peek(ids, extra_key=namespace)
            if watch.has_same_pages():
                assert abs(watch.cached_tokens - now) < page_size
            if watch.is_current():
                held += 1
                assert watch.cached_tokens == now
            else:
                stale += 1
                assert watch.refresh() == watch.cached_tokens == now
                assert watch.is_current()
    for lease, _, _ in walk.leases:
        lease.release()
    assert stale > 100
    assert held > 200


def test_what_changes_elsewhere_leaves_a_watch_current() -> None:
    cache = make_cache(2, exact=True, windowed=False)
    with cache.acquire([1, 2, 3, 4]) as lease:
        lease.commit([1, 2, 3, 4])
    watch = cache.watch([1, 2, 3, 4, 5, 6])
    for other in ([7, 8, 9, 10], [1, 2, 9, 10], [1, 9]):
        with cache.acquire(other) as lease:
            lease.commit(other)
    assert watch.is_current()
    with cache.acquire([1, 2, 3, 4, 5, 7]) as lease:
        lease.commit([1, 2, 3, 4, 5, 7])
    assert not watch.is_current()
    assert watch.refresh() == 5


def test_a_watch_is_told_once_until_it_looks_again() -> None:
    cache = make_cache(2, exact=True, windowed=False)
    told: list[str] = []
    watch = cache.watch([1, 2, 3, 4], on_change=lambda: told.append("changed"))
    share(cache, [7, 8])
    assert (told, watch.is_current(), watch.has_same_pages()) == ([], False, True), "less than a page may have changed"
    share(cache, [1, 2])
    cache.reset()
    assert (told, watch.has_same_pages()) == (["changed"], False)
    assert (watch.refresh(), watch.is_current()) == (0, True)
    share(cache, [1, 2, 3, 4])
    assert told == ["changed"] * 2
    assert watch.refresh() == 4
    watch.close()
    cache.reset()
    assert (told, watch.is_current()) == (["changed"] * 2, False)


def test_the_tree_forgets_watches_that_are_closed_or_dropped() -> None:
    cache = make_cache(2, exact=True, windowed=False)
    share(cache, [1, 2, 3, 4])
    with cache.watch([1, 2, 3, 4, 5, 6]), cache.watch([7, 8], extra_key="tenant"):
        cache.watch([1, 2, 3, 4, 7, 8])
        cache.watch([5, 6])
        assert len(places(cache)) == 3
    with cache.watch([9, 9]):
        assert places(cache) == [None], "with a new watch the dropped ones go"
    assert places(cache) == []


def test_a_watch_does_not_keep_what_was_evicted() -> None:
    def references_after_eviction(*watched: list[int]) -> int:
        cache = make_cache(2, exact=True, windowed=False)
        share(cache, [1, 2, 3, 4])
        (node,) = [node for _, node in cache.nodes() if not node.is_root]
        watches = [cache.watch(ids) for ids in watched]
        held = sys.getrefcount(node)
        cache.reset()
        assert sys.getrefcount(node) < held
        assert not any(watch.is_current() for watch in watches)
        return sys.getrefcount(node)

    assert references_after_eviction([1, 2, 3, 4, 5, 6], [1, 2]) == references_after_eviction()


def share(cache: PrefixCache, ids: list[int]) -> None:
    with cache.acquire(ids) as lease:
        lease.commit(ids)


def places(cache: PrefixCache) -> list[TreeNode | None]:
    """The nodes that have subscribers; None for the root of each namespace that has."""
    nodes = [node for _, node in cache.nodes() if node.subscribers is not None and not node.is_root]
    return [*nodes, *[None for _ in cache.tree.subscriptions.of_roots]]
