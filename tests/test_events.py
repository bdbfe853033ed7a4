"""Observers: what they are told suffices to know at any time what is cached, and where."""

from __future__ import annotations

import random

import pytest

from radixkv import Lease, PrefixCache, RadixTree, TreeNode
from radixkv.cache.events import CacheObserver
from strategies import NAMESPACES, PAGE, Key, WordTree, dump, ids, share, spell


class Mirror:
    """Knows what is cached by listening alone: which page ends with which tokens."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.pages: list[tuple[Key, int]] = []
        self.events: list[str] = []

    def stored(self, node: TreeNode) -> None:
        self.events.append("stored")
        self.pages += self.pages_of(node)

    def removed(self, node: TreeNode) -> None:
        self.events.append("removed")
        for page in self.pages_of(node):
            self.pages.remove(page)

    def cleared(self) -> None:
        self.events.append("cleared")
        self.pages.clear()

    def pages_of(self, node: TreeNode) -> list[tuple[Key, int]]:
        """All that the node tells of itself: it hangs in the tree while an observer is told of it."""
        namespace = node.root.namespace
        assert namespace is not None
        tokens = [token for above in node.path() for token in above.token_ids.tolist()]
        assert len(tokens) == node.end
        first = node.end - node.num_tokens
        ends = range(first, node.end, self.page_size)
        return [
            ((namespace, tuple(tokens[: min(end + self.page_size, node.end)])), page)
            for end, page in zip(ends, node.page_ids.tolist(), strict=True)
        ]


def held(tree: RadixTree) -> list[tuple[Key, int]]:
    """The same, read from the tree."""
    return [
        ((namespace, tokens[: min(state.first + (number + 1) * tree.page_size, len(tokens))]), page)
        for (namespace, tokens), state in dump(tree).items()
        for number, page in enumerate(state.pages)
    ]


def listened(tree: RadixTree) -> Mirror:
    mirror = Mirror(tree.page_size)
    observer: CacheObserver = mirror
    tree.add_observer(observer)
    return mirror


def test_stored_and_removed() -> None:
    tree = WordTree(2)
    mirror = listened(tree.tree)
    tree.insert("ab")
    tree.insert("abc")
    tree.insert("ab")
    assert mirror.events == ["stored", "stored"], "nothing new is stored by the third"
    tree.evict(1)
    assert mirror.events[2:] == ["removed"]
    assert [page for _, page in mirror.pages] == [0, 1]


def test_cuts_merges_uses_and_pins_are_not_told() -> None:
    tree = WordTree(2)
    tree.insert("abcd")
    mirror = listened(tree.tree)
    found = tree.lock("ab")
    tree.match("abcd")
    tree.tree.peek(spell("abcd", 2))
    tree.tree.retain(found.node, priority=3, keep_for_s=9)
    tree.unlock(found)
    tree.match("abc")
    tree.match("x")
    assert mirror.events == []


def test_a_branch_is_told_as_what_is_new_alone() -> None:
    tree = WordTree(2)
    tree.insert("abcd")
    mirror = listened(tree.tree)
    tree.insert("abxy")
    assert [(len(tokens), page) for (_, tokens), page in mirror.pages] == [(6, 6), (8, 7)]


def test_clearing_is_told_at_once_if_nothing_is_pinned() -> None:
    tree = WordTree(2)
    mirror = listened(tree.tree)
    tree.insert("ab")
    tree.insert("ac", extra_key="x")
    found = tree.lock("a")
    tree.tree.clear()
    assert mirror.events[2:] == ["removed", "removed"]
    assert [page for _, page in mirror.pages] == [0]
    tree.unlock(found)
    tree.tree.clear()
    assert mirror.events[4:] == ["cleared"]
    tree.insert("b")
    assert mirror.events[5:] == ["stored"], "it goes on listening"


def test_whoever_is_removed_hears_nothing_more_and_others_do() -> None:
    tree = WordTree(2)
    first, second = listened(tree.tree), listened(tree.tree)
    tree.insert("a")
    tree.tree.remove_observer(first)
    tree.tree.remove_observer(first)
    tree.insert("b")
    tree.evict(1)
    assert first.events == ["stored"]
    assert second.events == ["stored", "stored", "removed"]


def test_a_removal_is_told_while_the_node_can_still_be_read() -> None:
    tree = WordTree(2)
    for word in ["ab", "abc", "abd"]:
        tree.insert(word)
    mirror = listened(tree.tree)
    mirror.pages = held(tree.tree)
    tree.evict(99)
    assert mirror.pages == []


def test_a_tail_that_grows_is_never_missing() -> None:
    """The longer copy is stored before the shorter one is removed where it fills its page; at no time in between is
    less cached than what was committed before."""
    cache = PrefixCache(8, PAGE, copy_page=lambda source, target, num_tokens: None)
    mirror = listened(cache.tree)
    with cache.acquire([7, 8, 9, 10, 11]) as lease:
        lease.commit([7, 8])
        mirror.events.clear()
        lease.commit([7, 8, 9, 10])
        assert mirror.events == ["stored", "removed"]
        assert sorted(mirror.pages) == sorted(held(cache.tree))


def test_what_a_lease_commits_is_told_once() -> None:
    cache = PrefixCache(8, PAGE)
    mirror = listened(cache.tree)
    share(cache, "ab")
    share(cache, "abc")
    assert mirror.events == ["stored", "stored"]
    with cache.acquire(ids("abc")) as lease:
        lease.commit(ids("abc"))
    cache.reset()
    assert mirror.events == ["stored", "stored", "cleared"]


@pytest.mark.parametrize("page_size", [1, 2, 4])
@pytest.mark.parametrize("policy", ["lru", "slru"])
def test_listening_alone_tells_what_is_cached(page_size: int, policy: str) -> None:
    """A random life of a small cache, tails and namespaces included."""
    rng = random.Random(page_size)
    cache = PrefixCache(24, page_size, policy, copy_page=lambda source, target, num_tokens: None)
    mirror = listened(cache.tree)
    running: list[tuple[Lease, list[int]]] = []
    known: dict[int, int] = {}  # tokens committed by lease

    def random_tokens() -> list[int]:
        word = "".join(rng.choice("aabc") for _ in range(rng.randint(0, 5)))
        return [*spell(word, page_size), *rng.choices([0, 1], k=rng.randint(0, page_size - 1))]

    for _ in range(1_500):
        verb = rng.choice(["acquire", "acquire", "commit", "commit", "release", "release", "reset"])
        if verb == "acquire" and len(running) < 4:
            extra_key, cache_salt = rng.choice(NAMESPACES)
            tokens = random_tokens()
            running.append((cache.acquire(tokens, extra_key=extra_key, cache_salt=cache_salt), tokens))
        elif verb == "commit" and running:
            lease, tokens = rng.choice(running)
            shortest = max(lease.cached_tokens, known.get(id(lease), 0))
            known[id(lease)] = rng.randint(shortest, len(tokens))
            lease.commit(tokens[: known[id(lease)]])
        elif verb == "release" and running:
            lease, _ = running.pop(rng.randrange(len(running)))
            known.pop(id(lease), None)
            lease.release()
        elif verb == "reset" and rng.random() < 0.1:
            cache.reset()
        assert sorted(mirror.pages, key=str) == sorted(held(cache.tree), key=str)
    for lease, _ in running:
        lease.release()
    cache.check_invariants()
    assert {"stored", "removed", "cleared"} == set(mirror.events)
