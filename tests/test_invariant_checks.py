"""`check_invariants` of the tree and of the cache must see every way in which the bookkeeping can be wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from radixkv import PrefixCache
from radixkv.cache.radix_tree import TreeNode
from radixkv.errors import InvariantError
from strategies import WordTree, spell


class SampleTree:
    """Words "ab" (one node), "abc" (pinned), "abd" and "e" at page size 2, to be tampered with."""

    def __init__(self) -> None:
        words = WordTree(2)
        for word in ["ab", "abc", "abd", "e"]:
            words.insert(word)
        self.tree = words.tree
        self.pinned = words.lock("abc").node
        self.free, self.other = words.match("abd").node, words.match("e").node
        assert self.pinned.parent is not None
        self.stem = self.pinned.parent
        assert self.stem.parent is not None
        self.root = self.stem.parent


def _swap_keys(sample: SampleTree) -> None:
    sample.free.key, sample.other.key = sample.other.key, sample.free.key


def _lose_the_queue(sample: SampleTree) -> None:
    sample.tree._queue._nodes.clear()


def _queue_a_parent(sample: SampleTree) -> None:
    sample.stem.queue_key = None
    sample.tree._queue.add(sample.stem)


def _queue_a_stranger(sample: SampleTree) -> None:
    sample.tree._queue.add(TreeNode(b"", b"", None, 0))


def _lose_the_root(sample: SampleTree) -> None:
    sample.tree._roots[("x", None)] = sample.tree._roots.pop((None, None))


def _leave_an_empty_root(sample: SampleTree) -> None:
    empty = sample.tree._roots["x", None] = TreeNode(b"", b"", None, 0)
    empty.namespace = ("x", None)


def _add_bytes(name: str, number: int) -> Callable[[SampleTree], None]:
    return lambda sample: setattr(sample.tree, name, getattr(sample.tree, name) + number)


def _set(node: str, name: str, value: object) -> Callable[[SampleTree], None]:
    return lambda sample: setattr(getattr(sample, node), name, value)


TREE_CORRUPTIONS: dict[str, tuple[Callable[[SampleTree], None], str]] = {
    "free leaf counted as pinned": (_set("free", "lock_ref", 1), "pinned more often than it"),
    "pinned leaf counted as free": (_set("pinned", "lock_ref", 0), "queue"),
    "child pinned more than its parent": (_set("pinned", "lock_ref", 2), "pinned more often than it"),
    "negative lock": (_set("free", "lock_ref", -1), "negative number of times"),
    "stem counted as free": (_set("stem", "lock_ref", 0), "pinned more often than it"),
    "root pinned": (_set("root", "lock_ref", 1), "pinned root"),
    "total too large": (_add_bytes("_total_bytes", 8), "counted .* bytes, recorded"),
    "evictable too small": (_add_bytes("_evictable_bytes", -8), "counted .* bytes, recorded"),
    "page in two nodes": (lambda s: setattr(s.free, "pages", s.other.pages), "a page is in two places"),
    "page twice in a node": (lambda s: setattr(s.stem, "pages", s.stem.pages[:4] * 2), "a page is in two places"),
    "page missing": (_set("free", "pages", b""), "pages and tokens differ"),
    "part of a page": (lambda s: setattr(s.free, "key", s.free.key + bytes(4)), "not whole pages"),
    "keys swapped": (_swap_keys, "filed under another first page"),
    "edge without tokens": (_set("free", "key", b""), "an empty edge"),
    "no parent": (_set("free", "parent", None), "another parent"),
    "wrong parent": (lambda s: setattr(s.free, "parent", s.other), "another parent"),
    "used later than its parent": (_set("pinned", "last_access", 99), "used later"),
    "queue emptied": (_lose_the_queue, "queue is not"),
    "queue forgot a leaf": (lambda s: s.tree._queue.remove(s.free), "queue"),
    "parent in the queue": (_queue_a_parent, "queue"),
    "evicted node in the queue": (_queue_a_stranger, "queue is not"),
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
