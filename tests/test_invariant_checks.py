"""`check_invariants` of the tree and of the cache must see every way in which the bookkeeping can be wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from sortedcontainers import SortedList

from radixkv import PrefixCache
from radixkv.cache.tree.checks import check_tree
from radixkv.cache.tree.leaf_queue import LeafQueue
from radixkv.cache.tree.node import Namespace, TreeNode
from radixkv.errors import InvariantError
from strategies import FakeClock, WordTree, spell


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


def _hang_something_below_a_tail(sample: SampleTree) -> None:
    child = TreeNode(bytes(8), bytes([77, 0, 0, 0]), sample.tail.end + 2, sample.tail, 0)
    sample.tail.children[bytes(8)] = child


def _order_wrongly(sample: SampleTree) -> None:
    sample.stem.ordered = SortedList([bytes(8)])


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
    "page in two nodes": (lambda s: setattr(s.other, "pages", s.cut.pages), "a page is in two places"),
    "page twice in a node": (lambda s: setattr(s.free, "pages", s.free.pages[:4] * 2), "a page is in two places"),
    "page missing": (_set("free", "pages", b""), "neither whole pages nor a tail"),
    "part of a page": (
        lambda s: setattr(s.free, "num_tokens", s.free.num_tokens - 1),
        "neither whole pages nor a tail",
    ),
    "too short a key": (lambda s: setattr(s.free, "key", s.free.key[:-4]), "fewer tokens than it says"),
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
    "root without children": (lambda s: s.root.children.clear(), "empty or pinned root"),
}


@pytest.mark.parametrize("name", TREE_CORRUPTIONS)
def test_tree_invariants_find(name: str) -> None:
    tamper, message = TREE_CORRUPTIONS[name]
    sample = SampleTree()
    sample.tree.check_invariants()
    tamper(sample)
    with pytest.raises(InvariantError, match=message):
        sample.tree.check_invariants()


class SampleBooks(SampleTree):
    """A `SampleTree`, and what the tree says of itself: its roots, its queue and its sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.roots: dict[Namespace, TreeNode] = {(None, None): self.root}
        self.num_pages, self.num_evictable = self.tree.num_pages, self.tree.num_evictable_pages
        self.queue = LeafQueue(self.tree.policy, FakeClock())
        for leaf in (self.below, self.free, self.tail):
            leaf.entry = None  # which was that of the tree's own queue
            self.queue.add(leaf)

    def check(self) -> None:
        check_tree(self.tree, self.roots, self.queue, num_pages=self.num_pages, num_evictable=self.num_evictable)


class MiscountedQueue(LeafQueue):
    """A queue that says it holds one leaf more than it does."""

    def __len__(self) -> int:
        return super().__len__() + 1


def _name_the_root_otherwise(books: SampleBooks) -> None:
    books.roots = {("x", None): books.root}


def _count_more(name: str, number: int) -> Callable[[SampleBooks], None]:
    return lambda books: setattr(books, name, getattr(books, name) + number)


BOOK_CORRUPTIONS: dict[str, tuple[Callable[[SampleBooks], object], str]] = {
    "total too large": (_count_more("num_pages", 1), "counted 7 pages, recorded 8"),
    "evictable too small": (_count_more("num_evictable", -1), "counted 5 evictable pages, recorded 4"),
    "queue emptied": (lambda b: setattr(b, "queue", LeafQueue(b.tree.policy, FakeClock())), "queue is not"),
    "queue forgot a leaf": (lambda b: b.queue.remove(b.free), "wrongly in or out of the queue"),
    "parent in the queue": (lambda b: b.queue.add(b.stem), "wrongly in or out of the queue"),
    "evicted node in the queue": (lambda b: b.queue.add(TreeNode(b"", b"", 0, None, 0)), "queue is not"),
    "queue counts too many": (lambda b: setattr(b.queue, "__class__", MiscountedQueue), "a queue of 4 holds 3"),
    "root under another name": (_name_the_root_otherwise, "a lost root"),
}


@pytest.mark.parametrize("name", BOOK_CORRUPTIONS)
def test_what_the_tree_says_of_itself_is_compared_with_its_nodes(name: str) -> None:
    tamper, message = BOOK_CORRUPTIONS[name]
    books = SampleBooks()
    books.check()
    tamper(books)
    with pytest.raises(InvariantError, match=message):
        books.check()


class SampleCache:
    """A cache of page size 2 that holds "ab"; one lease pins it and owns another page, and 5 pages are free."""

    def __init__(self) -> None:
        self.cache = PrefixCache(num_pages=8, page_size=2)
        self.lease = self.cache.acquire(spell("abc", 2))
        self.lease.commit(spell("ab", 2))
        self.tree, self.allocator = self.cache.tree, self.cache.allocator
        self.pages = self.lease.pages.copy()


Change = Callable[[SampleCache], object]

# what is done, and what makes it undone
CACHE_CORRUPTIONS: dict[str, tuple[Change, Change]] = {
    "shared page counted once more": (
        lambda s: s.allocator.retain(s.pages[:1]),
        lambda s: s.allocator.release(s.pages[:1]),
    ),
    "shared page counted once less": (
        lambda s: s.allocator.release(s.pages[:1]),
        lambda s: s.allocator.retain(s.pages[:1]),
    ),
    "page of nobody": (
        lambda s: setattr(s, "pages", s.allocator.alloc(1)),
        lambda s: s.allocator.release(s.pages),
    ),
    "own page replaced": (
        lambda s: s.lease.pages.__setitem__(2, s.pages[1]),
        lambda s: s.lease.pages.__setitem__(2, s.pages[2]),
    ),
    "pinned by nobody": (
        lambda s: s.tree.inc_lock_ref(s.lease.node),
        lambda s: s.tree.dec_lock_ref(s.lease.node),
    ),
    "lock lost": (
        lambda s: s.tree.dec_lock_ref(s.lease.node),
        lambda s: s.tree.inc_lock_ref(s.lease.node),
    ),
}


@pytest.mark.parametrize("name", CACHE_CORRUPTIONS)
def test_cache_invariants_find(name: str) -> None:
    tamper, undo = CACHE_CORRUPTIONS[name]
    sample = SampleCache()
    sample.cache.check_invariants()
    tamper(sample)
    with pytest.raises(InvariantError):
        sample.cache.check_invariants()
    undo(sample)
    sample.cache.check_invariants()
    sample.lease.release()


@pytest.mark.parametrize("part", ["tree", "allocator"])
def test_cache_invariants_are_those_of_its_parts_too(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong() -> None:
        raise InvariantError("wrong")

    cache = PrefixCache(num_pages=8, page_size=2)
    monkeypatch.setattr(getattr(cache, part), "check_invariants", wrong)
    with pytest.raises(InvariantError, match="wrong"):
        cache.check_invariants()


def test_cache_invariants_find_a_lease_that_was_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = SampleCache()
    assert sample.cache.open_leases() == [sample.lease]
    with monkeypatch.context() as patched:
        patched.setattr(sample.cache, "open_leases", list)
        with pytest.raises(InvariantError):
            sample.cache.check_invariants()
    sample.lease.release()
    assert sample.cache.open_leases() == []
