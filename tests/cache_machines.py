"""Machines that drive the tree and the cache at random; plain lists predict every answer exactly."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from event_mirror import EventMirror, held_by
from radixkv import Event, Lease, PrefixCache, RadixTree, Removed
from radixkv.cache.tree import radix_tree as radix_tree
from radixkv.cache.tree.node import Namespace, TreeNode
from radixkv.cache.watch import PrefixWatch
from radixkv.errors import InvalidRequestError, OutOfPagesError
from strategies import (
    NAMESPACES,
    Edge,
    FakeClock,
    Key,
    TreeOracle,
    check_partial,
    dump,
    rests,
    snapshot,
    spell,
)

FIXED = settings(
    stateful_step_count=40,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)

words = st.text("ab", max_size=6) | st.text("acb", max_size=5)  # the pages of "a" and "c" part in their last token
prompts = st.text("acb", min_size=1, max_size=4)
tenants = st.sampled_from([NAMESPACES[0], NAMESPACES[0], NAMESPACES[1]])
choices = st.integers(0, 11)  # taken modulo the number of things to choose from
priorities = st.sampled_from([0, 0, 1, 2])
keeps = st.sampled_from([None, None, None, 0, 2, 5])  # seconds; the clock goes on by as many at a time


def names(namespace: Namespace) -> dict[str, str | None]:
    return {"extra_key": namespace[0], "cache_salt": namespace[1]}


class TreeMachine(RuleBasedStateMachine):
    """A `RadixTree` against `TreeOracle`: lengths, pages, uses, locks, cuts, merges, tails, the order of eviction."""

    page_size: ClassVar[int]
    policy: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.tree = RadixTree(self.page_size, self.policy, clock=self.clock)
        self.mirror = EventMirror()
        self.tree.add_observer(self.mirror)
        self.oracle = TreeOracle(self.page_size, self.policy, self.clock)
        self.seen: list[tuple[Edge, TreeNode]] = []  # nodes that were found or made; some of them are gone
        self.locked: list[tuple[Edge, TreeNode]] = []
        self.pages_given = 0

    def spelled(self, word: str, rest: list[int]) -> list[int]:
        return spell(word, self.page_size) + rest[: self.page_size - 1]

    def new_pages(self, num_pages: int) -> list[int]:
        self.pages_given += num_pages
        return list(range(self.pages_given - num_pages, self.pages_given))

    @rule(namespace=tenants, word=words, rest=rests, copy=st.booleans())
    def match(self, namespace: Namespace, word: str, rest: list[int], copy: bool) -> None:
        """Match, and if `copy` use the page that holds most of what follows."""
        tokens = self.spelled(word, rest)
        expected_pages = self.oracle.pages(namespace, tokens)
        edge = self.oracle.match(namespace, tokens)
        found = self.tree.match_prefix(tokens, **names(namespace))
        assert found.length == len(expected_pages) * self.page_size
        assert found.pages.tolist() == expected_pages
        partial = self.tree.find_partial(found.node, tokens[found.length :])
        partials = self.oracle.partials(edge, namespace, tokens[found.length :])
        check_partial(partial, partials)
        if partial is not None and copy:
            self.tree.touch(partial.node)
            self.oracle.touch(partials[partial.page][1])
        if edge is not None:
            self.seen.append((edge, found.node))

    @rule(namespace=tenants, word=words, rest=rests)
    def insert(self, namespace: Namespace, word: str, rest: list[int]) -> None:
        tokens = self.spelled(word, rest)
        pages = self.new_pages(len(word))
        known_tokens = self.oracle.whole_tokens(namespace, tokens)
        edge = self.oracle.insert(namespace, tokens, pages)
        result = self.tree.insert(tokens, pages, **names(namespace))
        assert result.prefix_len == known_tokens
        assert self.tree.path_pages(result.node).tolist() == self.oracle.pages(namespace, tokens)
        if edge is not None:
            self.seen.append((edge, result.node))

    @rule(namespace=tenants, word=words, rest=rests)
    def insert_tail(self, namespace: Namespace, word: str, rest: list[int]) -> None:
        edge = self.oracle.match(namespace, spell(word, self.page_size))
        node = self.tree.match_prefix(spell(word, self.page_size), **names(namespace)).node
        self.insert_tail_below(edge, node, namespace, rest)

    @precondition(lambda self: self.seen)
    @rule(choice=choices, rest=rests)
    def insert_tail_late(self, choice: int, rest: list[int]) -> None:
        edge, node = self.seen[choice % len(self.seen)]
        self.insert_tail_below(edge, node, edge.namespace, rest)

    def insert_tail_below(self, edge: Edge | None, node: TreeNode, namespace: Namespace, rest: list[int]) -> None:
        rest = rest[: self.page_size - 1]
        known = [num for num, _ in self.oracle.partials(edge, namespace, rest).values()]
        is_gone = edge is not None and edge not in self.oracle.edges
        if is_gone or (edge is not None and self.oracle.is_tail(edge)) or not rest or len(rest) in known:
            before = snapshot(self.tree)
            with pytest.raises(InvalidRequestError, match=r"not be cached yet|not in the tree|is a tail"):
                self.tree.insert_tail(node, rest, self.pages_given)
            assert snapshot(self.tree) == before
        else:
            (page,) = self.new_pages(1)
            tail = self.oracle.insert_tail(edge, namespace, rest, page)
            self.seen.append((tail, self.tree.insert_tail(node, rest, page)))

    @rule(namespace=tenants, word=words, rest=rests)
    def peek(self, namespace: Namespace, word: str, rest: list[int]) -> None:
        tokens = self.spelled(word, rest)
        before = snapshot(self.tree)
        assert self.tree.peek(tokens, **names(namespace)) == self.oracle.whole_tokens(namespace, tokens)
        num_tokens, path = self.tree.peek_path(tokens, **names(namespace))
        assert num_tokens == self.oracle.cached_tokens(namespace, tokens)
        held = np.concatenate([[], *(node.token_ids for node in path)]).tolist()
        assert held[:num_tokens] == tokens[:num_tokens]
        assert len(held) - (path[-1].num_tokens if path else 0) < max(num_tokens, 1), "no node below those"
        assert snapshot(self.tree) == before

    @precondition(lambda self: self.seen)
    @rule(choice=choices)
    def lock(self, choice: int) -> None:
        edge, node = self.seen[choice % len(self.seen)]
        if self.oracle.standing(edge) in self.oracle.edges:
            self.oracle.lock(edge)
            self.tree.inc_lock_ref(node)
            self.locked.append((edge, node))
        else:
            with pytest.raises(InvalidRequestError, match="was evicted"):
                self.tree.inc_lock_ref(node)

    @precondition(lambda self: self.locked)
    @rule(choice=choices)
    def unlock(self, choice: int) -> None:
        edge, node = self.locked.pop(choice % len(self.locked))
        self.oracle.unlock(edge)
        self.tree.dec_lock_ref(node)

    @precondition(lambda self: self.seen)
    @rule(choice=choices, priority=priorities, keep_for_s=keeps)
    def retain(self, choice: int, priority: int, keep_for_s: int | None) -> None:
        edge, node = self.seen[choice % len(self.seen)]
        if self.oracle.standing(edge) in self.oracle.edges:
            self.oracle.retain(edge, priority, keep_for_s)
            self.tree.retain(node, priority=priority, keep_for_s=keep_for_s)
        else:
            with pytest.raises(InvalidRequestError, match="was evicted"):
                self.tree.retain(node, priority=priority, keep_for_s=keep_for_s)

    @precondition(lambda self: self.seen)
    @rule(choice=choices)
    def remove(self, choice: int) -> None:
        edge, node = self.seen[choice % len(self.seen)]
        if edge in self.oracle.unpinned_leaves():
            self.oracle.remove(edge)
            assert self.tree.remove(node).tolist() == edge.pages
        else:
            with pytest.raises(InvalidRequestError, match="cannot be removed"):
                self.tree.remove(node)

    @precondition(lambda self: self.oracle.num_pages > 12 or self.tree.tick % 8 == 7)  # else no tree would grow
    @rule(num_tokens=st.sampled_from([1, 1, 2, 3, 0, 12]))
    def evict(self, num_tokens: int) -> None:
        self.oracle.evict(num_tokens, self.tree.evict(num_tokens).tolist())

    @precondition(lambda self: self.tree.tick % 16 == 15)
    @rule()
    def clear(self) -> None:
        self.oracle.evict(self.oracle.num_evictable_pages * self.page_size, self.tree.clear().tolist())

    @rule(seconds=st.sampled_from([1, 2, 5, 200]))
    def wait(self, seconds: int) -> None:
        self.clock.now_s += seconds

    @invariant()
    def agrees_with_oracle(self) -> None:
        self.tree.check_invariants()
        assert self.mirror.held() == held_by(self.tree)
        assert dump(self.tree) == self.oracle.states()
        assert self.tree.tick == self.oracle.tick
        assert self.tree.num_pages == self.oracle.num_pages
        assert self.tree.total_size == self.oracle.num_pages * self.page_size
        assert self.tree.num_evictable_pages == self.oracle.num_evictable_pages
        assert self.tree.evictable_size == self.oracle.num_evictable_pages * self.page_size
        assert self.tree.protected_size == self.tree.total_size - self.tree.evictable_size
        assert set(self.tree.namespaces()) == {edge.namespace for edge in self.oracle.edges}

    def teardown(self) -> None:
        for _, node in self.locked:
            self.tree.dec_lock_ref(node)
        self.tree.check_invariants()
        assert self.tree.protected_size == 0
        assert len(self.tree.clear()) == self.oracle.num_pages
        assert list(self.tree.nodes()) == []


@dataclass
class Claim:
    """A lease, and what it must look like."""

    lease: Lease
    namespace: Namespace
    tokens: list[int]
    pages: list[int]
    pinned: Edge | None  # None if that is a root
    known_tokens: int  # found or committed
    computed_tokens: int
    source: tuple[int, Edge] | None
    priority: int
    keep_for_s: int | None


@dataclass
class Watched:
    """A watch of the cache, and what it was told since it last looked."""

    watch: PrefixWatch
    told: list[None]
    tokens: list[int]
    namespace: Namespace


class CacheMachine(RuleBasedStateMachine):
    """A `PrefixCache` with a pool that is always too small, and simulated KV.

    `kv[slot]` stands for the bytes: computing a token writes a value that depends on its namespace and on all tokens
    up to it, and copying a page copies values. After each step every cached token, tails included, and every computed
    token of every lease still has its value, so no page was handed out, freed or overwritten while somebody could
    read it. And every watch that was not told of a change still says what `peek` does.
    """

    page_size: ClassVar[int]
    policy: ClassVar[str]
    copies: ClassVar[bool]  # whether partial pages are shared
    num_pages: ClassVar[int] = 8

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        copy_page = self.copy_page if self.copies else None
        self.cache = PrefixCache(self.num_pages, self.page_size, self.policy, copy_page=copy_page, clock=self.clock)
        self.mirror = EventMirror()
        self.cache.add_observer(self.mirror)
        self.cache.add_observer(self.heard)
        self.oracle = TreeOracle(self.page_size, self.policy, self.clock)
        self.claims: list[Claim] = []
        self.watches: list[Watched] = []
        self.kv = np.full((self.num_pages, self.page_size), -1)
        self.values: dict[Key, int] = {}
        self.query_tokens = self.hit_tokens = self.evicted_tokens = self.copied_tokens = 0
        self.asker = NAMESPACES[0]  # who took pages last
        self.gone: list[int] = []  # pages that left the tree in the current step, in this order
        self.copied: list[tuple[int, int, int]] = []  # as the cache asked for in the current step

    # -- what the cache asks for and tells -------------------------------------------------------------------------

    def copy_page(self, source: int, target: int, num_tokens: int) -> None:
        self.kv[target, :num_tokens] = self.kv[source, :num_tokens]
        self.copied.append((source, target, num_tokens))

    def heard(self, event: Event) -> None:
        if isinstance(event, Removed):
            self.gone += event.run.pages.tolist()

    # -- steps -----------------------------------------------------------------------------------------------------

    @rule(
        namespace=tenants,
        word=prompts,
        rest=rests,
        computes=st.sampled_from([None, None, 1, 99]),
        priority=priorities,
        keep_for_s=keeps,
        serve=st.booleans(),
    )
    def acquire(
        self,
        namespace: Namespace,
        word: str,
        rest: list[int],
        computes: int | None,
        priority: int,
        keep_for_s: int | None,
        serve: bool,
    ) -> None:
        """Start a request that computes its last tokens in any case; `serve` runs it to its end."""
        tokens = spell(word, self.page_size) + rest[: self.page_size - 1]
        limit = None if computes is None else max(len(tokens) - computes, 0)
        wanted = tokens[:limit]
        pages = self.oracle.pages(namespace, wanted)
        whole_tokens = len(pages) * self.page_size
        pinned = self.oracle.match(namespace, wanted)
        self.pin(pinned)
        needed = -(-len(tokens) // self.page_size) - len(pages)
        used = self.used_pages()
        self.asker = namespace
        expected_error = self.shortage(needed)
        partials = self.oracle.partials(pinned, namespace, wanted[whole_tokens:]) if self.copies else {}
        best = max((num for num, _ in partials.values()), default=0)
        free, available = self.num_pages - len(used), self.num_pages - len(used) + self.num_evictable_pages()
        leases: list[Lease] = []
        error = complaint(
            lambda: leases.append(
                self.cache.acquire(
                    tokens, max_cached_tokens=limit, priority=priority, keep_for_s=keep_for_s, **names(namespace)
                )
            )
        )
        assert error == expected_error
        if error is not None:
            self.unpin(pinned)
            return
        lease, source = leases[0], None
        if self.copied:
            ((source_page, target, copied_tokens),) = self.copied
            source = partials[source_page]
            assert copied_tokens == source[0] == best
            assert target == lease.pages[len(pages)]
            self.oracle.touch(source[1])
            self.oracle.lock(source[1])
        elif best:
            held = [
                len(edge.pages) for num, edge in partials.values() if num == best and not self.oracle.lock_ref(edge)
            ]
            assert needed > available - max(held, default=0), "it was not copied though there was room"
        self.evicted((needed - free) * self.page_size)
        if source:
            self.oracle.unlock(source[1])
        cached_tokens = whole_tokens + (source[0] if source else 0)
        self.query_tokens += len(tokens)
        self.hit_tokens += cached_tokens
        self.copied_tokens += source[0] if source else 0
        own = lease.pages.tolist()[len(pages) :]
        assert lease.cached_tokens == cached_tokens
        assert lease.pages.tolist()[: len(pages)] == pages
        assert len(own) == needed
        assert self.used_pages().isdisjoint(own)
        claim = Claim(
            lease, namespace, tokens, pages + own, pinned, cached_tokens, cached_tokens, source, priority, keep_for_s
        )
        self.claims.append(claim)
        leases.clear()
        if serve:
            self.compute_tokens(claim, len(tokens))
            self.commit_computed(claim)
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
        free = self.num_pages - len(self.used_pages())
        self.asker = claim.namespace
        expected_error = self.shortage(needed)
        assert complaint(lambda: claim.lease.grow(len(tokens))) == expected_error
        if expected_error is None:
            self.evicted((needed - free) * self.page_size)
            new = claim.lease.pages.tolist()[len(claim.pages) :]
            assert len(new) == max(needed, 0)
            assert self.used_pages().isdisjoint(new)
            claim.pages += new
            claim.tokens = tokens

    @precondition(lambda self: self.claims)
    @rule(choice=choices, drop=st.sampled_from([False, False, False, True]))
    def release(self, choice: int, drop: bool) -> None:
        claim = self.claims.pop(choice % len(self.claims))
        if not drop:
            self.end(claim)
            return
        self.unpin(claim.pinned)
        with pytest.warns(ResourceWarning, match="dropped without release"):
            del claim

    @rule(namespace=tenants, word=prompts, rest=rests)
    def peek(self, namespace: Namespace, word: str, rest: list[int]) -> None:
        tokens = spell(word, self.page_size) + rest[: self.page_size - 1]
        expected = (self.oracle.cached_tokens if self.copies else self.oracle.whole_tokens)(namespace, tokens)
        before = snapshot(self.cache.tree)
        assert self.cache.peek(tokens, **names(namespace)) == expected
        assert snapshot(self.cache.tree) == before

    @rule(namespace=tenants, word=prompts, rest=rests)
    def watch(self, namespace: Namespace, word: str, rest: list[int]) -> None:
        tokens = spell(word, self.page_size) + rest[: self.page_size - 1]
        told: list[None] = []
        watch = self.cache.watch(tokens, on_change=partial(told.append, None), **names(namespace))
        self.watches.append(Watched(watch, told, tokens, namespace))

    @precondition(lambda self: self.watches)
    @rule(choice=choices)
    def look(self, choice: int) -> None:
        watched = self.watches[choice % len(self.watches)]
        assert watched.watch.refresh() == self.cache.peek(watched.tokens, **names(watched.namespace))
        assert watched.watch.is_current()
        watched.told.clear()

    @precondition(lambda self: self.watches)
    @rule(choice=choices, drop=st.booleans())
    def unwatch(self, choice: int, drop: bool) -> None:
        watched = self.watches.pop(choice % len(self.watches))
        if not drop:
            watched.watch.close()

    @precondition(lambda self: self.cache.tree.tick % 16 == 15)  # else no tree would grow
    @rule()
    def reset(self) -> None:
        evictable = [page for leaf in self.oracle.edges if not self.oracle.lock_ref(leaf) for page in leaf.pages]
        self.cache.reset()
        if self.oracle.num_evictable_pages < self.oracle.num_pages:
            self.oracle.evict(len(evictable) * self.page_size, self.gone)
        else:
            assert self.gone == [], "`cleared` was told instead"
            while leaves := self.oracle.unpinned_leaves():
                self.oracle.remove(leaves[0])

    @rule(seconds=st.sampled_from([1, 2, 5, 200]))
    def wait(self, seconds: int) -> None:
        self.clock.now_s += seconds

    @invariant()
    def agrees_with_oracle(self) -> None:
        self.gone.clear()
        self.copied.clear()
        self.cache.check_invariants()
        assert self.mirror.held() == held_by(self.cache.tree)
        assert dump(self.cache.tree) == self.oracle.states()
        for claim in self.claims:
            assert claim.lease.pages.tolist() == claim.pages
        stats = self.cache.stats()
        assert stats.free_pages == self.num_pages - len(self.used_pages())
        assert stats.leased_pages == len(self.used_pages()) - self.oracle.num_pages
        assert stats.total_tokens == self.oracle.num_pages * self.page_size
        assert stats.evictable_tokens == self.oracle.num_evictable_pages * self.page_size
        assert stats.protected_tokens == stats.total_tokens - stats.evictable_tokens
        assert stats.num_leases == len(self.claims)
        assert (stats.query_tokens, stats.hit_tokens) == (self.query_tokens, self.hit_tokens)
        assert (stats.evicted_tokens, stats.copied_tokens) == (self.evicted_tokens, self.copied_tokens)

    @invariant()
    def watches_are_told(self) -> None:
        for watched in self.watches:
            watch, times_told = watched.watch, len(watched.told)
            now = self.cache.peek(watched.tokens, **names(watched.namespace))
            assert times_told == (not watch.has_same_pages())
            assert times_told or abs(watch.cached_tokens - now) < self.page_size
            assert not watch.is_current() or watch.cached_tokens == now

    @invariant()
    def kv_is_intact(self) -> None:
        for edge in self.oracle.edges:
            for position in range(edge.first, len(edge.tokens)):
                page = edge.pages[(position - edge.first) // self.page_size]
                expected = self.value(edge.namespace, edge.tokens[: position + 1])
                assert self.kv[page, position % self.page_size] == expected
        for claim in self.claims:
            for position in range(claim.computed_tokens):
                expected = self.value(claim.namespace, claim.tokens[: position + 1])
                assert self.kv[claim.pages[position // self.page_size], position % self.page_size] == expected

    def teardown(self) -> None:
        for claim in self.claims:
            claim.lease.release()
        self.cache.reset()
        self.cache.check_invariants()
        assert self.cache.stats().free_pages == self.num_pages
        for watched in self.watches:
            watched.watch.close()
        self.cache.watch([0]).close()  # those that were dropped are forgotten with it
        assert not self.cache.tree.subscriptions.of_roots

    # -- what requests do ------------------------------------------------------------------------------------------

    def compute_tokens(self, claim: Claim, num_tokens: int) -> None:
        last = min(claim.computed_tokens + num_tokens, len(claim.tokens))
        for position in range(claim.computed_tokens, last):
            page = claim.pages[position // self.page_size]
            self.kv[page, position % self.page_size] = self.value(claim.namespace, claim.tokens[: position + 1])
        claim.computed_tokens = last

    def commit_computed(self, claim: Claim) -> None:
        """Commit, and follow each of its steps: whole pages, the pin, what was there before, the tail."""
        tokens = claim.tokens[: claim.computed_tokens]
        whole_tokens = len(tokens) // self.page_size * self.page_size
        num_pages = whole_tokens // self.page_size
        node = self.oracle.insert(claim.namespace, tokens, claim.pages[:num_pages])
        claim.pages[:num_pages] = self.oracle.pages(claim.namespace, tokens)
        before = self.repin(claim, node)
        if before is not None and self.oracle.is_tail(before):
            self.oracle.remove(before)
        rest = tokens[whole_tokens:]
        if self.copies and rest:
            if len(rest) not in [num for num, _ in self.oracle.partials(node, claim.namespace, rest).values()]:
                page = claim.pages[num_pages]
                self.repin(claim, self.oracle.insert_tail(node, claim.namespace, rest, page))
            shared_tokens = len(tokens)
        else:
            shared_tokens = whole_tokens
        if claim.source is not None:
            (copied_tokens, source), claim.source = claim.source, None
            is_spare = self.oracle.is_tail(source) and source in self.oracle.unpinned_leaves()
            if is_spare and copied_tokens == len(source.tokens) - source.first and len(tokens) > len(source.tokens):
                if claim.pinned is not None and (source.priority or source.keep_until):
                    left_s = max(0, source.keep_until - self.clock())
                    self.oracle.retain(claim.pinned, source.priority, left_s)
                self.oracle.remove(source)
        if claim.pinned is not None and (claim.priority or claim.keep_for_s is not None):
            self.oracle.retain(claim.pinned, claim.priority, claim.keep_for_s)
        if before is not None and self.oracle.is_tail(before):
            self.ask_as_for(before, claim, tokens)
        assert claim.lease.commit(tokens) == shared_tokens
        assert claim.lease.committed_tokens == (0 if claim.pinned is None else len(claim.pinned.tokens))
        assert claim.lease.pages.tolist() == claim.pages
        claim.known_tokens = shared_tokens

    def ask_as_for(self, tail: Edge, claim: Claim, tokens: list[int]) -> None:
        """What was asked for a claim's tail meanwhile is asked for the page that has its tokens now."""
        pinned = claim.pinned
        if pinned is not None and tail.priority <= pinned.priority:
            if tail.keep_until <= max(pinned.keep_until, self.clock()):
                return
        elif pinned is None and not tail.priority and tail.keep_until <= self.clock():
            return
        page_end = -(-len(tail.tokens) // self.page_size) * self.page_size
        if page_end <= len(tokens):
            assert pinned is not None, "its whole pages were committed"
            pinned = self.oracle.leading(pinned, page_end)
        elif pinned is not None and not self.oracle.is_tail(pinned):
            return
        if pinned is not None:
            self.oracle.retain(pinned, tail.priority, max(0, tail.keep_until - self.clock()))

    def end(self, claim: Claim) -> None:
        self.unpin(claim.pinned)
        claim.lease.release()
        claim.lease.release()

    # -- what the oracle knows -------------------------------------------------------------------------------------

    def value(self, namespace: Namespace, tokens: list[int] | tuple[int, ...]) -> int:
        return self.values.setdefault((namespace, tuple(tokens)), len(self.values))

    def used_pages(self) -> set[int]:
        """Pages in the tree or of a lease."""
        in_tree = {page for edge in self.oracle.edges for page in edge.pages}
        return in_tree.union(*(claim.pages for claim in self.claims))

    def shortage(self, needed: int) -> tuple[int, int, int, int] | None:
        """The numbers of the cache's complaint if it cannot have `needed` pages free."""
        free = self.num_pages - len(self.used_pages())
        evictable = self.num_evictable_pages()
        return (needed, free, evictable, self.num_pages) if needed > free + evictable else None

    def num_evictable_pages(self) -> int:
        """Pages that can be evicted for `asker`."""
        return self.oracle.num_evictable_pages

    def evicted(self, num_tokens: int) -> None:
        """The cache had to evict so much: what went must be what was to go."""
        self.evicted_tokens += len(self.gone) * self.page_size
        self.oracle.evict(num_tokens, self.gone)

    def pin(self, edge: Edge | None) -> None:
        if edge is not None:
            self.oracle.lock(edge)

    def unpin(self, edge: Edge | None) -> None:
        if edge is not None:
            self.oracle.unlock(edge)

    def repin(self, claim: Claim, edge: Edge | None) -> Edge | None:
        """Pin `edge` in place of what was pinned, which is returned."""
        before, claim.pinned = claim.pinned, edge
        self.pin(edge)
        self.unpin(before)
        return before


def complaint(call: Callable[[], object]) -> tuple[int, int, int, int] | None:
    """The numbers of the OutOfPagesError that `call` raises. (`pytest.raises` would keep its frames, and leases.)"""
    try:
        call()
    except OutOfPagesError as error:
        return (error.needed, error.free, error.evictable, error.total)
    return None


def run(machine: type[RuleBasedStateMachine], max_examples: int, **fields: object) -> None:
    """Let Hypothesis drive `machine` with these class variables."""
    sized: Any = type(machine.__name__, (machine,), fields)
    run_state_machine_as_test(sized, settings=settings(FIXED, max_examples=max_examples))


DRAWS: dict[str, Callable[[random.Random], object]] = {
    "namespace": lambda rng: rng.choices(NAMESPACES, [8, 1, 1])[0],
    "word": lambda rng: "".join(rng.choice("aaabc") for _ in range(rng.randint(1, 5))),
    "rest": lambda rng: rng.choices([0, 1], [1, 3], k=rng.randint(0, 3)),
    "copy": lambda rng: rng.random() < 0.7,
    "choice": lambda rng: rng.randint(0, 1000),
    "priority": lambda rng: rng.choice([0, 0, 1, 2]),
    "keep_for_s": lambda rng: rng.choice([None, None, None, 0, 2, 5]),
    "seconds": lambda rng: rng.choice([1, 2, 5, 200]),
    "num_tokens": lambda rng: rng.choice([1, 1, 2, 3, 8]),
    "computes": lambda rng: rng.choice([None, None, None, 1, 99]),
    "serve": lambda rng: rng.random() < 0.5,
    "drop": lambda rng: rng.random() < 0.1,
    "guarantee": lambda rng: rng.randint(0, 5),
}
"""What a walk gives to the rules: not as small as what Hypothesis tries first, so that trees grow."""


TREE_STEPS = {
    "match": 12, "insert": 12, "insert_tail": 2, "insert_tail_late": 2, "peek": 2, "lock": 4, "unlock": 4, "retain": 2,
    "remove": 1, "evict": 3, "clear": 0.1, "wait": 1,
}  # fmt: skip
CACHE_STEPS = {
    "acquire": 12, "compute": 2, "commit": 8, "grow": 4, "release": 6, "peek": 2, "reset": 0.1, "wait": 1,
    "watch": 2, "look": 4, "unwatch": 1,
}  # fmt: skip
NEEDED = {  # what must not be empty for a step
    "insert_tail_late": "seen", "lock": "seen", "unlock": "locked", "retain": "seen", "remove": "seen",
    "compute": "claims", "commit": "claims", "grow": "claims", "release": "claims",
    "look": "watches", "unwatch": "watches",
}  # fmt: skip


def walk(
    machine: type[TreeMachine | CacheMachine],
    num_steps: int,
    more_steps: dict[str, float] | None = None,
    **fields: object,
) -> None:
    """Drive `machine` at random, from a seed: further than Hypothesis goes, and into larger trees."""
    rng = random.Random(str(fields))
    state: Any = type(machine.__name__, (machine,), fields)()
    weights = (TREE_STEPS if machine is TreeMachine else CACHE_STEPS) | (more_steps or {})
    try:
        for name in rng.choices(list(weights), list(weights.values()), k=num_steps):
            if name not in NEEDED or getattr(state, NEEDED[name]):
                step = getattr(state, name)
                step(**{argument: DRAWS[argument](rng) for argument in signature(step).parameters})
                state.agrees_with_oracle()
                if machine is not TreeMachine:
                    state.kv_is_intact()
                    state.watches_are_told()
    finally:
        state.teardown()
