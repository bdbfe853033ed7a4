"""`check_invariants` of the tree and of the cache must see every way in which the bookkeeping can be wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from sortedcontainers import SortedList

from radixkv import PrefixCache
from radixkv.cache.tree.node import TreeNode, new_root
from radixkv.errors import InvariantError
from strategies import WordTree, spell


class SampleTree:
    """Words "abx" (pinned up to "ab", so cut there), "ayc" and "e" with a tail, at page size 2, to be tampered with."""

    def __init__(self) -> None:
        words = WordTree(2)
        for word in ["abx", "ayc", "e"]:
            words.insert(word)
        self.tree = words.tree
        self.cut = words.lock("ab").node
        (self.below,) = self.cut.children.values()
        self.free, self.other = words.match("ayc").node, words.match("e").node
        self.tail = self.tree.insert_tail(self.other, [1], 99)
        assert self.cut.parent is not None
        self.stem = self.cut.parent
        assert self.stem.parent is not None
        self.root = self.stem.parent


def _swap_keys(sample: SampleTree) -> None:
    sample.free.key, sample.other.key = sample.other.key, sample.free.key


def _lose_the_queue(sample: SampleTree) -> None:
    sample.tree._queue._run.in_order.clear()


def _queue_a_parent(sample: SampleTree) -> None:
    sample.tree._queue.add(sample.stem)


def _queue_a_stranger(sample: SampleTree) -> None:
    sample.tree._queue.add(TreeNode(b"", b"", 0, None, 0))


def _lose_the_root(sample: SampleTree) -> None:
    sample.tree._roots[("x", None)] = sample.tree._roots.pop((None, None))


def _leave_an_empty_root(sample: SampleTree) -> None:
    sample.tree._roots["x", None] = new_root(("x", None), 0)


def _hang_something_below_a_tail(sample: SampleTree) -> None:
    child = TreeNode(bytes(8), bytes([77, 0, 0, 0]), sample.tail.end + 2, sample.tail, 0)
    sample.tail.children[bytes(8)] = child


def _order_wrongly(sample: SampleTree) -> None:
    sample.stem.ordered = SortedList([bytes(8)])


def _count_more(name: str, number: int) -> Callable[[SampleTree], None]:
    return lambda sample: setattr(sample.tree, name, getattr(sample.tree, name) + number)


def _set(node: str, name: str, value: object) -> Callable[[SampleTree], None]:
    return lambda sample: setattr(getattr(sample, node), name, value)


TREE_CORRUPTIONS: dict[str, tuple[Callable[[SampleTree], object], str]] = {
    "free leaf counted as pinned": (_set("free", "lock_ref", 1), "pinned more often than it"),
    "pinned node counted as free": (_set("cut", "lock_ref", 0), "counted 6 evictable pages, recorded 5"),
    "child pinned more than its parent": (_set("cut", "lock_ref", 2), "pinned more often than it"),
    "children pinned more than their parent": (_set("below", "lock_ref", 2), "pinned more often than it"),
    "negative lock": (_set("free", "lock_ref", -1), "negative number of times"),
    "stem counted as free": (_set("stem", "lock_ref", 0), "pinned more often than it"),
    "root pinned": (_set("root", "lock_ref", 1), "pinned root"),
    "root with pages": (_set("root", "pages", bytes(4)), "a root with tokens"),
    "root that ends somewhere": (_set("root", "end", 2), "a root with tokens"),
    "total too large": (_count_more("_total_bytes", 4), "counted 7 pages, recorded 8"),
    "evictable too small": (_count_more("_evictable_bytes", -4), "counted 5 evictable pages, recorded 4"),
    "page in two nodes": (lambda s: setattr(s.other, "pages", s.cut.pages), "a page is in two places"),
    "page twice in a node": (lambda s: setattr(s.free, "pages", s.free.pages[:4] * 2), "a page is in two places"),
    "page missing": (_set("free", "pages", b""), "neither whole pages nor a tail"),
    "part of a page": (lambda s: setattr(s.free, "key", s.free.key + bytes(4)), "neither whole pages nor a tail"),
    "child of a tail": (_hang_something_below_a_tail, "neither whole pages nor a tail"),
    "end miscounted": (_set("free", "end", 5), "ends elsewhere"),
    "keys swapped": (_swap_keys, "filed under another first page"),
    "edge without tokens": (_set("free", "key", b""), "an empty edge"),
    "no parent": (_set("free", "parent", None), "another parent"),
    "wrong parent": (lambda s: setattr(s.free, "parent", s.other), "another parent"),
    "used later than its parent": (_set("cut", "last_access", 99), "used later"),
    "merged, but still there": (lambda s: setattr(s.cut, "heir", s.below), "merged, and in the tree"),
    "cut where the tree branches": (_set("stem", "cut", True), "a cut that branches"),
    "children out of order": (_order_wrongly, "ordered wrongly"),
    "queue emptied": (_lose_the_queue, "queue is not"),
    "queue forgot a leaf": (lambda s: s.tree._queue.remove(s.free), "queue"),
    "parent in the queue": (_queue_a_parent, "queue"),
    "evicted node in the queue": (_queue_a_stranger, "queue is not"),
    "queue counts too many": (lambda s: setattr(s.tree._queue, "_size", 9), "a queue of 9 holds 3"),
    "root under another name": (_lose_the_root, "a lost root"),
    "root without children": (_leave_an_empty_root, "empty or pinned root"),
}


@pytest.mark.parametrize("name", TREE_CORRUPTIONS)
def test_tree_invariants_find(name: str) -> None:
    tamper, message = TREE_CORRUPTIONS[name]
    sample = SampleTree()
    sample.tree.check_invariants()
    tamper(sample)
    with pytest.raises(InvariantError, match=message):
        sample.tree.check_invariants()


class SampleCache:
    """A cache of page size 2 that holds "ab"; one lease pins it and owns another page, and 5 pages are free."""

    def __init__(self) -> None:
        self.cache = PrefixCache(num_pages=8, page_size=2)
        self.lease = self.cache.acquire(spell("abc", 2))
        self.lease.commit(spell("ab", 2))

    def count(self, page: int, change: int) -> None:
        """Miscount the references of a page."""
        self.cache.allocator._ref_counts[page] += change


CACHE_CORRUPTIONS: dict[str, Callable[[SampleCache], object]] = {
    "the tree's own check": lambda s: setattr(s.cache.tree, "_total_bytes", 0),
    "the allocator's own check": lambda s: s.count(7, 1),
    "shared page counted once more": lambda s: s.count(s.lease.pages[0], 1),
    "shared page counted once less": lambda s: s.count(s.lease.pages[0], -1),
    "page of nobody": lambda s: s.cache.allocator.alloc(1),
    "own page replaced": lambda s: s.lease.pages.__setitem__(2, s.lease.pages[1]),
    "pinned by nobody": lambda s: s.cache.tree.inc_lock_ref(s.lease.node),
    "lock lost": lambda s: s.cache.tree.dec_lock_ref(s.lease.node),
    "lease forgotten": lambda s: s.cache._leases.discard(s.lease),
}


@pytest.mark.parametrize("name", CACHE_CORRUPTIONS)
def test_cache_invariants_find(name: str) -> None:
    sample = SampleCache()
    sample.cache.check_invariants()
    CACHE_CORRUPTIONS[name](sample)
    with pytest.raises(InvariantError):
        sample.cache.check_invariants()
    sample.lease._closed = True  # its references are wrong by now: nothing to give back
