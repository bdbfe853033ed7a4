"""Hypothesis drives the tree and the cache through random histories; plain dicts predict every answer exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from radixkv import Lease, PrefixCache, RadixTree
from radixkv.cache.radix_tree import Namespace, TreeNode
from radixkv.errors import InvalidRequestError, OutOfPagesError
from strategies import NAMESPACES, CachedPage, Key, TreeOracle, dump, namespaces, spell, tails, words

FIXED = settings(
    max_examples=100,
    stateful_step_count=40,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)

prompts = st.text("ab", min_size=1, max_size=4)
tenants = st.sampled_from([NAMESPACES[0], NAMESPACES[0], NAMESPACES[1]])
choices = st.integers(0, 11)  # taken modulo the number of things to choose from


class TreeMachine(RuleBasedStateMachine):
    """A `RadixTree` against `TreeOracle`: lengths, pages, uses, locks, node ends and the order of eviction."""

    page_size: ClassVar[int]

    def __init__(self) -> None:
        super().__init__()
        self.tree = RadixTree(self.page_size)
        self.oracle = TreeOracle(self.page_size)
        self.seen: list[tuple[CachedPage, TreeNode]] = []  # nodes that a match found, some of them evicted since
        self.locked: list[tuple[CachedPage, TreeNode]] = []
        self.pages_given = 0

    @rule(namespace=namespaces, word=words, tail=tails)
    def match(self, namespace: Namespace, word: str, tail: int) -> None:
        tokens = spell(word, self.page_size, tail)
        expected = self.oracle.match(namespace, tokens)
        found = self.tree.match_prefix(tokens, extra_key=namespace[0], cache_salt=namespace[1])
        assert found.length == len(expected) * self.page_size
        assert found.pages.tolist() == [page.page for page in expected]
        if expected:
            self.seen.append((expected[-1], found.node))

    @rule(namespace=namespaces, word=words, tail=tails)
    def insert(self, namespace: Namespace, word: str, tail: int) -> None:
        tokens = spell(word, self.page_size, tail)
        pages = list(range(self.pages_given, self.pages_given + len(word)))
        self.pages_given += len(word)
        known_tokens = len(self.oracle.cached(namespace, tokens)) * self.page_size
        held = self.oracle.insert(namespace, tokens, pages)
        result = self.tree.insert(tokens, pages, extra_key=namespace[0], cache_salt=namespace[1])
        assert result.prefix_len == known_tokens
        assert self.tree.path_pages(result.node).tolist() == [page.page for page in held]

    @rule(namespace=namespaces, word=words, tail=tails)
    def peek(self, namespace: Namespace, word: str, tail: int) -> None:
        tokens = spell(word, self.page_size, tail)
        expected = len(self.oracle.cached(namespace, tokens)) * self.page_size
        assert self.tree.peek(tokens, extra_key=namespace[0], cache_salt=namespace[1]) == expected

    @precondition(lambda self: self.seen)
    @rule(choice=choices)
    def lock(self, choice: int) -> None:
        page, node = self.seen[choice % len(self.seen)]
        if page in self.oracle.pages.values():
            page.locks += 1
            self.tree.inc_lock_ref(node)
            self.locked.append((page, node))
        else:
            with pytest.raises(InvalidRequestError, match="was evicted"):
                self.tree.inc_lock_ref(node)

    @precondition(lambda self: self.locked)
    @rule(choice=choices)
    def unlock(self, choice: int) -> None:
        page, node = self.locked.pop(choice % len(self.locked))
        page.locks -= 1
        self.tree.dec_lock_ref(node)

    @rule(num_tokens=st.integers(0, 12))
    def evict(self, num_tokens: int) -> None:
        assert self.tree.evict(num_tokens).tolist() == self.oracle.evict(num_tokens)

    @invariant()
    def agrees_with_oracle(self) -> None:
        self.tree.check_invariants()
        assert dump(self.tree) == self.oracle.states()
        assert self.tree.tick == self.oracle.tick
        assert self.tree.total_size == len(self.oracle.pages) * self.page_size
        assert self.tree.evictable_size == self.oracle.evictable_tokens
        assert self.tree.protected_size == self.tree.total_size - self.tree.evictable_size


@dataclass
class Claim:
    """A lease, and what it must look like."""

    lease: Lease
    namespace: Namespace
    tokens: list[int]
    pages: list[int]
    pinned: CachedPage | None
    computed_tokens: int


class CacheMachine(RuleBasedStateMachine):
    """A `PrefixCache` with a pool that is always too small, and simulated KV.

    `kv[slot]` stands for the bytes: computing a token writes a value that depends on its namespace and on all tokens
    up to it. After each step every cached page and every computed token of every lease still has its value, so no
    page was handed out, freed or overwritten while somebody could read it.
    """

    page_size: ClassVar[int]
    num_pages: ClassVar[int] = 8

    def __init__(self) -> None:
        super().__init__()
        self.cache = PrefixCache(self.num_pages, self.page_size)
        self.oracle = TreeOracle(self.page_size)
        self.claims: list[Claim] = []
        self.kv = np.full(self.num_pages * self.page_size, -1)
        self.values: dict[Key, int] = {}
        self.query_tokens = self.hit_tokens = self.evicted_tokens = 0

    @rule(namespace=tenants, word=prompts, tail=tails, spared=st.sampled_from([None, None, 1, 99]), serve=st.booleans())
    def acquire(self, namespace: Namespace, word: str, tail: int, spared: int | None, serve: bool) -> None:
        """Start a request that computes its `spared` last tokens in any case; `serve` runs it to its end."""
        tokens = spell(word, self.page_size, tail)
        limit = None if spared is None else max(len(tokens) - spared, 0)
        found = self.oracle.match(namespace, tokens[:limit])
        pinned = self.pin(found)
        needed = -(-len(tokens) // self.page_size) - len(found)
        names = {"extra_key": namespace[0], "cache_salt": namespace[1]}
        if shortage := self.take(needed):
            assert complaint(lambda: self.cache.acquire(tokens, max_cached_tokens=limit, **names)) == shortage
            self.unpin(pinned)
            return
        used = self.used_pages()
        lease = self.cache.acquire(tokens, max_cached_tokens=limit, **names)
        self.query_tokens += len(tokens)
        self.hit_tokens += lease.cached_tokens
        pages = lease.pages.tolist()
        assert lease.cached_tokens == len(found) * self.page_size
        assert pages[: len(found)] == [page.page for page in found]
        assert len(pages) == len(found) + needed
        assert used.isdisjoint(pages[len(found) :])
        self.claims.append(Claim(lease, namespace, tokens, pages, pinned, lease.cached_tokens))
        if serve:
            self.compute_tokens(self.claims[-1], len(tokens))
            self.commit_computed(self.claims[-1])
            self.end(self.claims.pop())

    @precondition(lambda self: self.claims)
    @rule(choice=choices, num_tokens=st.integers(1, 12))
    def compute(self, choice: int, num_tokens: int) -> None:
        self.compute_tokens(self.claims[choice % len(self.claims)], num_tokens)

    @precondition(lambda self: self.claims)
    @rule(choice=choices, num_tokens=st.integers(0, 12))
    def commit(self, choice: int, num_tokens: int) -> None:
        claim = self.claims[choice % len(self.claims)]
        self.compute_tokens(claim, num_tokens)
        self.commit_computed(claim)

    @precondition(lambda self: self.claims)
    @rule(choice=choices, word=prompts)
    def grow(self, choice: int, word: str) -> None:
        claim = self.claims[choice % len(self.claims)]
        tokens = claim.tokens + spell(word, self.page_size)[: len(word)]
        needed = -(-len(tokens) // self.page_size) - len(claim.pages)
        if shortage := self.take(needed):
            assert complaint(lambda: claim.lease.grow(len(tokens))) == shortage
            return
        used = self.used_pages()
        claim.lease.grow(len(tokens))
        new = claim.lease.pages.tolist()[len(claim.pages) :]
        assert len(new) == needed
        assert used.isdisjoint(new)
        claim.pages += new
        claim.tokens = tokens

    @precondition(lambda self: self.claims)
    @rule(choice=choices)
    def release(self, choice: int) -> None:
        self.end(self.claims.pop(choice % len(self.claims)))

    @precondition(lambda self: self.claims)
    @rule(choice=choices)
    def drop(self, choice: int) -> None:
        claim = self.claims.pop(choice % len(self.claims))
        self.unpin(claim.pinned)
        with pytest.warns(ResourceWarning, match="dropped without release"):
            del claim

    @rule()
    def reset(self) -> None:
        self.cache.reset()
        self.oracle.evict(self.oracle.evictable_tokens)

    @invariant()
    def agrees_with_oracle(self) -> None:
        self.cache.check_invariants()
        assert dump(self.cache.tree) == self.oracle.states()
        for claim in self.claims:
            assert claim.lease.pages.tolist() == claim.pages
        stats = self.cache.stats()
        assert stats.free_pages == self.num_pages - len(self.used_pages())
        assert stats.leased_pages == len(self.used_pages()) - len(self.oracle.pages)
        assert stats.total_tokens == len(self.oracle.pages) * self.page_size
        assert stats.evictable_tokens == self.oracle.evictable_tokens
        assert stats.protected_tokens == stats.total_tokens - stats.evictable_tokens
        assert stats.num_leases == len(self.claims)
        assert (stats.query_tokens, stats.hit_tokens) == (self.query_tokens, self.hit_tokens)
        assert stats.evicted_tokens == self.evicted_tokens

    @invariant()
    def kv_is_intact(self) -> None:
        for (namespace, tokens), page in self.oracle.pages.items():
            for offset in range(self.page_size):
                end = len(tokens) - self.page_size + offset + 1
                expected = self.value(namespace, list(tokens[:end]))
                assert self.kv[page.page * self.page_size + offset] == expected
        for claim in self.claims:
            for position in range(claim.computed_tokens):
                expected = self.value(claim.namespace, claim.tokens[: position + 1])
                assert self.kv[self.slot(claim.pages, position)] == expected

    def teardown(self) -> None:
        for claim in self.claims:
            claim.lease.release()
        self.cache.reset()
        self.cache.check_invariants()
        assert self.cache.stats().free_pages == self.num_pages

    # -- what requests do ------------------------------------------------------------------------------------------

    def compute_tokens(self, claim: Claim, num_tokens: int) -> None:
        last = min(claim.computed_tokens + num_tokens, len(claim.tokens))
        for position in range(claim.computed_tokens, last):
            self.kv[self.slot(claim.pages, position)] = self.value(claim.namespace, claim.tokens[: position + 1])
        claim.computed_tokens = last

    def commit_computed(self, claim: Claim) -> None:
        shared_tokens = claim.computed_tokens // self.page_size * self.page_size
        num_pages = shared_tokens // self.page_size
        held = self.oracle.insert(claim.namespace, claim.tokens[:shared_tokens], claim.pages[:num_pages])
        claim.pages[:num_pages] = [page.page for page in held]
        self.unpin(claim.pinned)
        claim.pinned = self.pin(held)
        assert claim.lease.commit(claim.tokens[: claim.computed_tokens]) == shared_tokens
        assert claim.lease.committed_tokens == shared_tokens
        assert claim.lease.pages.tolist() == claim.pages

    def end(self, claim: Claim) -> None:
        self.unpin(claim.pinned)
        claim.lease.release()
        claim.lease.release()

    # -- what the oracle knows of pages ----------------------------------------------------------------------------

    def slot(self, pages: list[int], position: int) -> int:
        return pages[position // self.page_size] * self.page_size + position % self.page_size

    def value(self, namespace: Namespace, tokens: list[int]) -> int:
        return self.values.setdefault((namespace, tuple(tokens)), len(self.values))

    def used_pages(self) -> set[int]:
        """Pages in the tree or of a lease."""
        in_tree = {page.page for page in self.oracle.pages.values()}
        return in_tree.union(*(claim.pages for claim in self.claims))

    def take(self, needed: int) -> tuple[int, int, int, int] | None:
        """Evict as the cache must to have `needed` pages free; the numbers of its complaint if it cannot."""
        free = self.num_pages - len(self.used_pages())
        evictable = self.oracle.evictable_tokens // self.page_size
        if needed > free + evictable:
            return (needed, free, evictable, self.num_pages)
        if needed > free:
            freed = self.oracle.evict((needed - free) * self.page_size)
            self.evicted_tokens += len(freed) * self.page_size
        return None

    @staticmethod
    def pin(found: list[CachedPage]) -> CachedPage | None:
        if not found:
            return None
        found[-1].locks += 1
        return found[-1]

    @staticmethod
    def unpin(pinned: CachedPage | None) -> None:
        if pinned is not None:
            pinned.locks -= 1


def complaint(call: Callable[[], object]) -> tuple[int, int, int, int] | None:
    """The numbers of the OutOfPagesError that `call` raises. (`pytest.raises` would keep its frames, and leases.)"""
    try:
        call()
    except OutOfPagesError as error:
        return (error.needed, error.free, error.evictable, error.total)
    return None


def machine_test(machine: type[RuleBasedStateMachine], page_size: int) -> Any:
    """The test case of `machine` at this page size."""
    sized: Any = type(machine.__name__, (machine,), {"page_size": page_size})
    sized.TestCase.settings = FIXED
    return sized.TestCase


TestTreePageSize1 = machine_test(TreeMachine, 1)
TestTreePageSize2 = machine_test(TreeMachine, 2)
TestTreePageSize4 = machine_test(TreeMachine, 4)
TestCachePageSize1 = machine_test(CacheMachine, 1)
TestCachePageSize2 = machine_test(CacheMachine, 2)
TestCachePageSize4 = machine_test(CacheMachine, 4)
