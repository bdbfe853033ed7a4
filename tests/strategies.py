"""What the tests of the cache share: words for token sequences, Hypothesis strategies, and dull oracles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

from hypothesis import strategies as st

from radixkv import PrefixCache
from radixkv.cache.radix_tree import InsertResult, MatchResult, Namespace, RadixTree

Key = tuple[Namespace, tuple[int, ...]]
"""A cached page is known by its namespace and all tokens up to its end."""

NAMESPACES: list[Namespace] = [(None, None), ("a", None), (None, "a")]

namespaces: st.SearchStrategy[Namespace] = st.sampled_from(NAMESPACES)

words: st.SearchStrategy[str] = st.text("abc", max_size=6)
"""Sequences for `spell`; so few letters that prefixes collide all the time."""

tails: st.SearchStrategy[int] = st.integers(0, 3)
"""How many tokens follow the last whole page."""


def spell(word: str, page_size: int, tail_tokens: int = 0) -> list[int]:
    """One page of tokens for each letter, then `tail_tokens` tokens that fill no page.

    Pages of different letters may differ in their last token only, so sequences also part within a page.
    """
    pages = [(ord(letter) % 2,) * (page_size - 1) + (ord(letter),) for letter in word]
    return [token for page in pages for token in page] + [0] * min(tail_tokens, page_size - 1)


PAGE = 4  # tokens a page in the tests of leases and of the prefix cache


def ids(word: str, tail_tokens: int = 0) -> list[int]:
    """`spell` in pages of `PAGE` tokens."""
    return spell(word, PAGE, tail_tokens)


class WordTree:
    """A `RadixTree` for examples: sequences are words, and a page is called by the word that ends with it.

    So after inserting "abc", matching "abd" finds ["a", "ab"]. Each change is followed by `check_invariants`.
    """

    def __init__(self, page_size: int, policy: str = "lru") -> None:
        self.tree = RadixTree(page_size, policy)
        self.page_size = page_size
        self._names: list[str] = []

    def insert(self, word: str, extra_key: str | None = None) -> InsertResult:
        """Insert `word` with pages that were never used before."""
        first = len(self._names)
        self._names += [word[: end + 1] for end in range(len(word))]
        pages = range(first, len(self._names))
        result = self.tree.insert(spell(word, self.page_size), pages, extra_key=extra_key)
        self.tree.check_invariants()
        return result

    def match(self, word: str, extra_key: str | None = None) -> MatchResult:
        """Match `word`."""
        result = self.tree.match_prefix(spell(word, self.page_size), extra_key=extra_key)
        self.tree.check_invariants()
        return result

    def lock(self, word: str, extra_key: str | None = None) -> MatchResult:
        """Match `word` and pin what was found."""
        result = self.match(word, extra_key)
        self.tree.inc_lock_ref(result.node)
        self.tree.check_invariants()
        return result

    def unlock(self, found: MatchResult) -> None:
        """Undo `lock`."""
        self.tree.dec_lock_ref(found.node)
        self.tree.check_invariants()

    def evict(self, num_pages: int) -> list[str]:
        """Evict at least `num_pages` pages; returns the names of those that went, and proves the sizes."""
        before, protected = self.tree.total_size, self.tree.protected_size
        freed = self.tree.evict(num_pages * self.page_size)
        self.tree.check_invariants()
        assert self.tree.total_size == before - len(freed) * self.page_size
        assert self.tree.protected_size == protected
        return self.names(freed.tolist())

    def names(self, pages: list[int]) -> list[str]:
        """What pages are called."""
        return [self._names[page] for page in pages]

    def cached(self) -> set[str]:
        """The names of all pages in the tree."""
        return set(self.names([state.page for state in dump(self.tree).values()]))


@contextmanager
def leak_checked(cache: PrefixCache) -> Iterator[PrefixCache]:
    """Proves at the end that everything in `cache` can be given back, open leases included."""
    yield cache
    cache.check_invariants()
    for lease in list(cache._leases):
        lease.release()
    cache.reset()
    cache.check_invariants()
    assert cache.stats().free_pages == cache.num_pages


def share(cache: PrefixCache, word: str) -> list[int]:
    """Commit `word`; returns its pages."""
    with cache.acquire(spell(word, cache.page_size)) as lease:
        lease.commit(spell(word, cache.page_size))
        return list(lease.pages)


class PageState(NamedTuple):
    """All that can be told about a cached page."""

    page: int
    last_use: int
    lock_ref: int
    ends_node: bool


def dump(tree: RadixTree) -> dict[Key, PageState]:
    """Every cached page of `tree`: trees with equal dumps are the same node by node. O(pages * tokens)."""
    paths: dict[int, Key] = {}
    states: dict[Key, PageState] = {}
    for _, node in tree.nodes():
        if node.parent is None:
            assert node.namespace is not None
            paths[id(node)] = (node.namespace, ())
            continue
        namespace, above = paths[id(node.parent)]
        pages = tree.path_pages(node).tolist()[len(above) // tree.page_size :]
        tokens = node.token_ids.tolist()
        for number, page in enumerate(pages, start=1):
            path = (*above, *tokens[: number * tree.page_size])
            states[namespace, path] = PageState(page, node.last_access, node.lock_ref, number == len(pages))
        paths[id(node)] = (namespace, (*above, *tokens))
    return states


@dataclass(eq=False)
class CachedPage:
    """A page in `TreeOracle`, compared by identity: what was evicted and inserted anew is another one."""

    page: int
    last_use: int
    ends_node: bool = False
    locks: int = 0  # taken on exactly this prefix


class TreeOracle:
    """What a `RadixTree` under LRU must hold: a dict with an entry for each page, in which everything is looked up.

    `ends_node` remembers where a match, an insert or a branch once ended, since evictions free whole nodes.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.tick = 0
        self.pages: dict[Key, CachedPage] = {}

    def prefixes(self, namespace: Namespace, tokens: list[int]) -> list[Key]:
        """The keys of all whole pages of `tokens`, shortest first."""
        ends = range(self.page_size, len(tokens) + 1, self.page_size)
        return [(namespace, tuple(tokens[:end])) for end in ends]

    def cached(self, namespace: Namespace, tokens: list[int]) -> list[CachedPage]:
        """The cached pages of `tokens`, in order."""
        known = takewhile(self.pages.__contains__, self.prefixes(namespace, tokens))
        return [self.pages[key] for key in known]

    def match(self, namespace: Namespace, tokens: list[int]) -> list[CachedPage]:
        """As `cached`, and a use of them."""
        self.tick += 1
        found = self.cached(namespace, tokens)
        for page in found:
            page.last_use = self.tick
        for page in found[-1:]:
            page.ends_node = True
        return found

    def insert(self, namespace: Namespace, tokens: list[int], pages: list[int]) -> list[CachedPage]:
        """Add what is missing of `tokens`; returns all pages of it as the tree holds them now."""
        known = len(self.match(namespace, tokens))
        for key, page in list(zip(self.prefixes(namespace, tokens), pages, strict=True))[known:]:
            self.pages[key] = CachedPage(page, self.tick)
        held = self.cached(namespace, tokens)
        for last in held[-1:]:
            last.ends_node = True
        return held

    def evict(self, num_tokens: int) -> list[int]:
        """Remove unpinned leaves, the least recently used first; returns their pages in that order."""
        freed: list[int] = []
        while len(freed) * self.page_size < num_tokens and (leaves := self._unpinned_leaves()):
            freed += self._remove_node(min(leaves, key=lambda leaf: self.pages[leaf].last_use))
        return freed

    def lock_ref(self, key: Key) -> int:
        """Locks on this prefix and on all that continue it."""
        return sum(page.locks for other, page in self.pages.items() if _continues(other, key))

    @property
    def evictable_tokens(self) -> int:
        """Tokens in unpinned pages."""
        return self.page_size * sum(self.lock_ref(key) == 0 for key in self.pages)

    def states(self) -> dict[Key, PageState]:
        """The same as `dump` of the tree must give."""
        return {
            key: PageState(page.page, page.last_use, self.lock_ref(key), page.ends_node)
            for key, page in self.pages.items()
        }

    def _unpinned_leaves(self) -> list[Key]:
        return [
            key
            for key, page in self.pages.items()
            if page.locks == 0 and sum(_continues(other, key) for other in self.pages) == 1
        ]

    def _remove_node(self, leaf: Key) -> list[int]:
        """Remove `leaf` and the pages before it, up to where the node before ends."""
        keys = self.prefixes(leaf[0], list(leaf[1]))
        removed = [self.pages.pop(keys.pop()).page]
        while keys and not self.pages[keys[-1]].ends_node:
            removed.append(self.pages.pop(keys.pop()).page)
        return removed[::-1]


def _continues(longer: Key, key: Key) -> bool:
    return longer[0] == key[0] and longer[1][: len(key[1])] == key[1]
