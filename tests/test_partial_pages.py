"""Reuse to the token: prefixes that end inside a page are copied, and last pages in part are shared as tails."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import count

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from radixkv import PrefixCache, RadixTree
from radixkv.cache.tree.node import PartialPage
from radixkv.errors import InvalidPagesError, InvalidRequestError, InvalidTokenIdsError, TokenIdsTypeError
from radixkv.memory.kv_pool import KVPool
from radixkv.memory.kv_shape import LayerKV
from strategies import PAGE, common, dump, ids, leak_checked, nodes_by_page, snapshot

A, B, C = ids("a"), ids("b"), ids("c")  # [1, 1, 1, 97], [0, 0, 0, 98] and [1, 1, 1, 99]


class Copies:
    """Remembers what it was asked to copy."""

    def __init__(self) -> None:
        self.made: list[tuple[int, int, int]] = []

    def __call__(self, source: int, target: int, num_tokens: int) -> None:
        self.made.append((source, target, num_tokens))


@pytest.fixture
def copies() -> Copies:
    return Copies()


@pytest.fixture
def exact(copies: Copies) -> Iterator[PrefixCache]:
    """A cache of 8 pages that shares partial pages, checked for leaks at the end."""
    with leak_checked(PrefixCache(8, PAGE, copy_page=copies)) as cache:
        yield cache


def commit(cache: PrefixCache, tokens: list[int]) -> list[int]:
    """Serve `tokens`; returns their pages."""
    with cache.acquire(tokens) as lease:
        assert lease.commit(tokens) == len(tokens)
        cache.check_invariants()
        return list(lease.pages)


# -- what is found ---------------------------------------------------------------------------------------------------


def test_a_hit_that_ends_inside_a_page_is_copied(exact: PrefixCache, copies: Copies) -> None:
    pages = commit(exact, A + B + A)
    tokens = [*A, *B[:3], 5, *A]
    assert exact.peek(tokens) == PAGE + 3
    with exact.acquire(tokens) as lease:
        assert lease.cached_tokens == PAGE + 3
        assert lease.committed_tokens == PAGE, "what was copied is the lease's alone"
        assert lease.pages[0] == pages[0]
        assert lease.pages[1] not in pages
        assert copies.made == [(pages[1], lease.pages[1], 3)]
        assert lease.commit(tokens) == 3 * PAGE
    assert exact.stats().copied_tokens == 3
    assert exact.peek(A + B + A) == exact.peek(tokens) == 3 * PAGE


def test_a_last_page_in_part_is_found(exact: PrefixCache, copies: Copies) -> None:
    pages = commit(exact, [*A, 7, 8])
    assert [exact.peek(tokens) for tokens in ([*A, 7, 8], [*A, 7, 8, 9], [*A, 7, 9], [*A, 9], [7])] == [6, 6, 5, 4, 0]
    with exact.acquire([*A, 7, 8, 9]) as lease:
        assert lease.cached_tokens == 6
        assert copies.made == [(pages[1], lease.pages[1], 2)]


def test_a_prompt_of_less_than_a_page_is_shared(exact: PrefixCache, copies: Copies) -> None:
    (page,) = commit(exact, [7, 8])
    assert exact.stats().total_tokens == PAGE, "a tail takes a whole page"
    with exact.acquire([7, 8, 9]) as lease:
        assert lease.cached_tokens == 2
        assert copies.made == [(page, lease.pages[0], 2)]
    with exact.acquire([7, 8], extra_key="elsewhere") as lease:
        assert lease.cached_tokens == 0


@pytest.mark.parametrize(("limit", "expected"), [(None, 7), (7, 7), (6, 6), (5, 5), (4, 4), (3, 3), (1, 1), (0, 0)])
def test_a_bound_on_the_hit_is_exact_too(exact: PrefixCache, limit: int | None, expected: int) -> None:
    commit(exact, [*A, 7, 8, 9])
    with exact.acquire([*A, 7, 8, 9], max_cached_tokens=limit) as lease:
        assert lease.cached_tokens == expected
        assert lease.commit([*A, 7, 8, 9]) == 7


def test_without_a_way_to_copy_pages_are_shared_whole() -> None:
    with leak_checked(PrefixCache(8, PAGE)) as cache:
        assert not cache.shares_partial_pages
        with cache.acquire([*A, *B[:3]]) as lease:
            assert lease.commit([*A, *B[:3]]) == PAGE
        assert cache.peek([*A, *B[:3]]) == PAGE
        with cache.acquire([*A, *B[:3]]) as lease:
            assert lease.cached_tokens == PAGE
        assert cache.stats().copied_tokens == 0


def test_the_page_that_shares_most_is_copied_from(exact: PrefixCache, copies: Copies) -> None:
    pages = [commit(exact, tail)[0] for tail in ([5, 9], [5, 6, 7], [6, 6])]
    copies.made.clear()
    with exact.acquire([5, 6, 8, 9]) as lease:
        assert copies.made == [(pages[1], lease.pages[0], 2)]


# -- tails -----------------------------------------------------------------------------------------------------------


def test_a_tail_grows_with_its_lease(exact: PrefixCache, copies: Copies) -> None:
    with exact.acquire([7, 8, 9, 10, 11]) as lease:
        page = lease.pages[0]
        for end in (1, 2, 3):
            assert lease.commit([7, 8, 9][:end]) == end == lease.committed_tokens
            exact.check_invariants()
            assert exact.peek([7, 8, 9, 10, 11]) == end
            assert exact.stats().total_tokens == PAGE
        assert lease.commit([7, 8, 9, 10, 11]) == 5
        assert exact.tree.num_pages == 2
        assert lease.pages[0] == page
    assert exact.peek([7, 8, 9, 10, 11]) == 5
    assert copies.made == []


def test_a_lease_may_write_behind_its_tail_while_others_copy_it(exact: PrefixCache, copies: Copies) -> None:
    with exact.acquire([7, 8, 9, 10]) as first:
        first.commit([7, 8])
        with exact.acquire([7, 8, 5]) as second:
            assert second.cached_tokens == 2
            assert second.pages[0] != first.pages[0]
            second.commit([7, 8, 5])
            first.commit([7, 8, 9])
            exact.check_invariants()
    assert (exact.peek([7, 8, 5]), exact.peek([7, 8, 9])) == (3, 3)


def test_a_tail_is_pinned_while_its_lease_lives(exact: PrefixCache) -> None:
    with exact.acquire([7, 8, 9]) as lease:
        lease.commit([7, 8])
        with exact.acquire(range(100, 128)):
            assert exact.peek([7, 8]) == 2
        assert exact.available_pages == 7
    assert exact.available_pages == 8
    with exact.acquire(range(100, 132)):
        assert exact.peek([7, 8]) == 0


def test_a_longer_copy_takes_the_place_of_the_tail_it_came_from(exact: PrefixCache) -> None:
    commit(exact, [7, 8])
    commit(exact, [7, 8, 9])
    assert [node.token_ids.tolist() for _, node in exact.tree.nodes()] == [[], [7, 8, 9]]
    commit(exact, [7, 8, 9, 10, 11])
    assert [node.token_ids.tolist() for _, node in exact.tree.nodes()] == [[], [7, 8, 9, 10], [11]]
    assert exact.stats().free_pages == 6


def test_a_tail_that_goes_on_otherwise_stays(exact: PrefixCache) -> None:
    commit(exact, [7, 8, 9])
    commit(exact, [7, 8, 5])
    assert exact.tree.num_pages == 2
    assert (exact.peek([7, 8, 9]), exact.peek([7, 8, 5])) == (3, 3)


def test_a_tail_that_another_lease_still_pins_stays(exact: PrefixCache) -> None:
    with exact.acquire([7, 8]) as first:
        first.commit([7, 8])
        commit(exact, [7, 8, 9])
        assert exact.tree.num_pages == 2
        assert first.commit([7, 8]) == 2
    assert exact.peek([7, 8, 9]) == 3


def test_what_somebody_shares_already_is_not_shared_twice(exact: PrefixCache) -> None:
    commit(exact, A)
    with exact.acquire([5, 5]) as lease:
        pages = lease.pages.tolist()
        assert lease.commit(A[:2]) == 2
        assert lease.pages.tolist() == pages, "its own page is the only one it may write to"
        assert lease.committed_tokens == 0
        assert exact.tree.num_pages == 1
        lease.grow(PAGE)
        assert lease.commit(C) == PAGE
    assert (exact.peek(A), exact.peek(C)) == (PAGE, PAGE)


def test_two_leases_commit_the_same_last_page_in_part(exact: PrefixCache) -> None:
    first, second = exact.acquire([*A, 7, 8]), exact.acquire([*A, 7, 8, 9])
    first.commit([*A, 7, 8])
    second.commit([*A, 7, 8])
    assert exact.tree.num_pages == 2
    assert second.pages[0] == first.pages[0]
    assert second.pages[1] != first.pages[1]
    second.commit([*A, 7, 8, 9])
    exact.check_invariants()
    first.release()
    second.release()
    assert exact.peek([*A, 7, 8, 9]) == PAGE + 3


def test_what_was_copied_or_committed_cannot_be_taken_back(exact: PrefixCache) -> None:
    commit(exact, [7, 8, 9])
    with exact.acquire([7, 8, 5]) as lease:
        for tokens in ([7], [7, 9], []):
            with pytest.raises(InvalidRequestError, match="must begin with the 2 tokens that were found or committed"):
                lease.commit(tokens)
        lease.commit([7, 8, 5])
        with pytest.raises(InvalidRequestError, match="must begin with the 3 tokens that were found or committed"):
            lease.commit([7, 8])


# -- under pressure --------------------------------------------------------------------------------------------------


def test_nothing_is_copied_from_a_page_that_is_needed_itself(exact: PrefixCache, copies: Copies) -> None:
    commit(exact, [7, 8, 9])
    wanted = [7, 8, *range(100, 100 + 8 * PAGE - 2)]
    with exact.acquire(wanted) as lease:
        assert lease.cached_tokens == 0
        assert len(lease.pages) == 8
    assert copies.made == []


def test_what_is_copied_from_is_not_evicted_for_it(exact: PrefixCache, copies: Copies) -> None:
    pages = commit(exact, [7, 8, 9])
    commit(exact, [1, 2])
    with exact.acquire([7, 8, *range(100, 100 + 7 * PAGE - 2)]) as lease:
        assert lease.cached_tokens == 2
        assert copies.made == [(pages[0], lease.pages[0], 2)]
        assert (exact.peek([7, 8, 9]), exact.peek([1, 2])) == (3, 0), "though it was the oldest"


def test_a_copy_counts_as_a_use(exact: PrefixCache) -> None:
    for tokens in ([7, 8, 9], [1, 2, 3]):
        commit(exact, tokens)
    with exact.acquire([7, 5]):
        pass
    with exact.acquire(range(100, 100 + 7 * PAGE)):
        assert (exact.peek([7, 8, 9]), exact.peek([1, 2, 3])) == (3, 0)


def test_a_copy_that_fails_takes_nothing() -> None:
    def fails(source: int, target: int, num_tokens: int) -> None:
        raise ZeroDivisionError

    with leak_checked(PrefixCache(8, PAGE, copy_page=fails)) as cache:
        commit(cache, [*A, 7, 8])
        before = cache.stats()
        with pytest.raises(ZeroDivisionError):
            cache.acquire([*A, 7, 9])
        cache.check_invariants()
        assert cache.stats()._replace(estimated_hit_rates=()) == before._replace(estimated_hit_rates=())
        with cache.acquire([*A, 9]) as lease:
            assert lease.cached_tokens == PAGE


# -- against an oracle -----------------------------------------------------------------------------------------------

token_lists = st.lists(st.integers(0, 1), min_size=1, max_size=40)


class SimulatedKV:
    """A cache with a value for each slot, which depends on all tokens up to it."""

    def __init__(self, page_size: int) -> None:
        self.kv = np.full((256, page_size), -1)
        self.cache = PrefixCache(256, page_size, copy_page=self.copy_page, diagnostics=False)
        self.page_size = page_size

    def copy_page(self, source: int, target: int, num_tokens: int) -> None:
        assert source != target
        assert 0 < num_tokens < self.page_size
        self.kv[target, :num_tokens] = self.kv[source, :num_tokens]

    def values(self, pages: np.ndarray, num_tokens: int) -> list[int]:
        return self.kv[pages].reshape(-1)[:num_tokens].tolist()

    def compute(self, pages: np.ndarray, values: list[int], first: int) -> None:
        for position in range(first, len(values)):
            self.kv[pages[position // self.page_size], position % self.page_size] = values[position]


class Serving:
    """A request with a lease in each world."""

    def __init__(self, worlds: list[SimulatedKV], tokens: list[int]) -> None:
        self.tokens = tokens
        self.leases = [world.cache.acquire(tokens, max_cached_tokens=len(tokens) - 1) for world in worlds]
        self.num_computed = self.leases[0].cached_tokens


@settings(derandomize=True, database=None, deadline=None, max_examples=25)
@given(st.data())
def test_cached_tokens_are_the_same_at_every_page_size(data: st.DataObject) -> None:
    """Requests come, are computed in chunks and go; nothing is evicted. The oracle is a list of what was committed."""
    worlds = [SimulatedKV(page_size) for page_size in (1, 3, 4, 16)]
    committed: list[list[int]] = []
    running: list[Serving] = []
    values: dict[tuple[int, ...], int] = {}

    def values_of(tokens: list[int]) -> list[int]:
        return [values.setdefault(tuple(tokens[: end + 1]), len(values)) for end in range(len(tokens))]

    def start() -> None:
        known = data.draw(st.sampled_from([[], *committed]))
        tokens = known[: data.draw(st.integers(0, len(known)))] + data.draw(token_lists)
        expected = max((common(tokens[:-1], other) for other in committed), default=0)
        assert [world.cache.peek(tokens[:-1]) for world in worlds] == [expected] * len(worlds)
        running.append(Serving(worlds, tokens))
        assert [lease.cached_tokens for lease in running[-1].leases] == [expected] * len(worlds)

    def compute_and_commit(serving: Serving, num_tokens: int) -> None:
        end = min(len(serving.tokens), serving.num_computed + num_tokens)
        for world, lease in zip(worlds, serving.leases, strict=True):
            world.compute(lease.pages, values_of(serving.tokens[:end]), serving.num_computed)
            assert lease.commit(serving.tokens[:end]) == end
        serving.num_computed = end
        committed.append(serving.tokens[:end])
        if end == len(serving.tokens):
            release(serving)

    def release(serving: Serving) -> None:
        running.remove(serving)
        for lease in serving.leases:
            lease.release()

    def check() -> None:
        for number, world in enumerate(worlds):
            world.cache.check_invariants()
            for serving in running:
                computed = serving.tokens[: serving.num_computed]
                assert world.values(serving.leases[number].pages, len(computed)) == values_of(computed)

    try:
        for _ in range(data.draw(st.integers(1, 14))):
            if not running or data.draw(st.booleans()):
                start()
            else:
                compute_and_commit(data.draw(st.sampled_from(running)), data.draw(st.integers(1, 20)))
            check()
        for tokens in committed:
            for world in worlds:
                with world.cache.acquire(tokens) as lease:
                    assert lease.cached_tokens == len(tokens)
                    assert world.values(lease.pages, len(tokens)) == values_of(tokens)
    finally:
        while running:
            release(running[0])


@pytest.mark.parametrize(
    ("page_size", "num_children"),
    [
        pytest.param(
            page_size, num_children, marks=[] if (page_size == 4) != (num_children == 200) else [pytest.mark.stress]
        )
        for page_size in (2, 4, 16)
        for num_children in (3, 16, 17, 200)
    ],
)
def test_the_best_page_is_found_among_many(page_size: int, num_children: int) -> None:
    """With few children all are compared, with many only neighbours in order: both must find the longest."""
    rng = random.Random(page_size * 1000 + num_children)
    tree = RadixTree(page_size)
    stem = tree.insert([9] * page_size, [0]).node

    def random_page() -> list[int]:
        return [rng.choice([0, 1, 256, 2**24, 2**31 - 1]) for _ in range(page_size)]

    new_pages = count(1)
    for _ in range(num_children):
        tokens = random_page()[: rng.choice([page_size, page_size, rng.randint(1, page_size - 1)])]
        if len(tokens) == page_size:
            tree.insert([*stem.token_ids, *tokens, *random_page()], [0, next(new_pages), next(new_pages)])
        elif tree.peek_path([*stem.token_ids, *tokens])[0] < page_size + len(tokens):
            tree.insert_tail(stem, tokens, next(new_pages))
    for _ in range(100):
        verb = rng.choice(["evict", "insert", "match", None, None, None])  # children come, go and part
        if verb == "evict" and len(stem.children) > 2:
            tree.evict(1)
        elif verb == "insert":
            tree.insert([*stem.token_ids, *random_page()], [0, next(new_pages)])
        elif verb == "match":
            tree.match_prefix([*stem.token_ids, *rng.choice(list(stem.children.values())).token_ids[:page_size]])
        wanted = random_page()[: rng.randint(0, page_size)]
        before = snapshot(tree)
        found = tree.find_partial(stem, wanted)
        assert snapshot(tree) == before
        shared = [common(child.token_ids.tolist(), wanted) for child in stem.children.values()]
        if max(shared) == 0:
            assert found is None
        else:
            assert found is not None
            assert found.num_tokens == max(shared)
            assert found.node is nodes_by_page(tree)[found.page]
            assert common(found.node.token_ids.tolist(), wanted) == found.num_tokens
    tree.check_invariants()


# -- the tree's own verbs --------------------------------------------------------------------------------------------


def test_match_prefix_never_finds_a_tail() -> None:
    tree = RadixTree(PAGE)
    node = tree.insert(A, [0]).node
    tail = tree.insert_tail(node, [7, 8], 1)
    assert tree.match_prefix([*A, 7, 8]).length == PAGE
    assert tree.match_prefix([*A, 7, 8, 9, 10]).length == PAGE
    assert tree.insert([*A, 7, 8, 9, 10], [5, 6]).prefix_len == PAGE
    assert tree.find_partial(node, [7, 8]) == PartialPage(2, 1, tail)
    assert tree.peek([*A, 7, 8, 5]) == PAGE
    assert tree.peek_path([*A, 7, 8, 5]) == (PAGE + 2, [node, tail])
    assert tree.path_pages(tail).tolist() == [0, 1]
    tree.check_invariants()


def test_nothing_is_partial_in_pages_of_one_token() -> None:
    tree = RadixTree(1)
    node = tree.insert([1, 2], [0, 1]).node
    assert tree.find_partial(node, [3]) is None
    with pytest.raises(InvalidRequestError, match="fewer than a page of 1, and not be cached yet; got 1 tokens"):
        tree.insert_tail(node, [3], 2)


@pytest.mark.parametrize(
    ("rest", "page", "error", "message"),
    [
        ([], 5, InvalidRequestError, "and not be cached yet; got 0 tokens"),
        (B, 5, InvalidRequestError, "and not be cached yet; got 4 tokens"),
        ([1, 2], 5, InvalidRequestError, "and not be cached yet; got 2 tokens"),
        ([1], 5, InvalidRequestError, "and not be cached yet; got 1 tokens"),
        ([3, -1], 5, InvalidTokenIdsError, "token id -1 at position 1"),
        ([3, 1.5], 5, TokenIdsTypeError, "not float"),
        ([3], -5, InvalidPagesError, "page id -5 at position 0"),
        ([3], 2**31, InvalidPagesError, f"page id {2**31} at position 0"),
        ([3], "x", InvalidPagesError, "not str"),
    ],
)
def test_what_is_no_tail(rest: list[int], page: int, error: type[Exception], message: str) -> None:
    tree = RadixTree(PAGE)
    node = tree.insert(A, [0]).node
    tree.insert_tail(node, [1, 2, 3], 1)
    before = snapshot(tree)
    with pytest.raises(error, match=message):
        tree.insert_tail(node, rest, page)
    assert snapshot(tree) == before


def test_where_no_tail_can_hang() -> None:
    tree = RadixTree(PAGE)
    node = tree.insert(A, [0]).node
    tail = tree.insert_tail(node, [7], 1)
    with pytest.raises(InvalidRequestError, match="is a tail, which nothing can follow"):
        tree.insert_tail(tail, [8], 2)
    tree.evict(99)
    for gone in (node, tail):
        with pytest.raises(InvalidRequestError, match="is not in the tree any more; match the prefix again"):
            tree.insert_tail(gone, [8], 2)


def test_a_tail_under_a_node_that_was_not_used_just_now_is_a_use_of_it() -> None:
    tree = RadixTree(PAGE)
    node = tree.insert(A, [0]).node
    tree.insert(B, [1])
    tree.insert_tail(node, [7], 2)
    tree.check_invariants()
    assert tree.evict(99).tolist() == [1, 2, 0]


def test_a_tail_below_a_root_that_is_new_or_was_dropped() -> None:
    tree = RadixTree(PAGE)
    root = tree.match_prefix([7], extra_key="x").node
    tree.insert_tail(root, [7], 0)
    assert tree.namespaces() == [("x", None)]
    tree.evict(1)
    assert tree.namespaces() == []
    tree.insert(A, [1], extra_key="x")
    tree.insert_tail(root, [8], 2)
    tree.check_invariants()
    assert tree.peek_path([8], extra_key="x")[0] == 1
    assert tree.peek(A, extra_key="x") == PAGE


@pytest.mark.parametrize("take", [lambda tree: tree.evict(1), lambda tree: tree.clear()])
def test_tails_count_as_a_page(take: Callable[[RadixTree], np.ndarray]) -> None:
    tree = RadixTree(PAGE)
    root = tree.match_prefix([7]).node
    tail = tree.insert_tail(root, [7], 3)
    assert (tree.total_size, tree.evictable_size, tree.num_pages) == (PAGE, PAGE, 1)
    tree.inc_lock_ref(tail)
    assert (tree.protected_size, tree.num_evictable_pages) == (PAGE, 0)
    tree.dec_lock_ref(tail)
    assert take(tree).tolist() == [3]
    assert dump(tree) == {}


def test_a_cut_stays_where_a_tail_hangs() -> None:
    tree = RadixTree(PAGE)
    tree.insert(A + B, [0, 1])
    upper = tree.match_prefix(A).node
    tail = tree.insert_tail(upper, [7], 2)
    tree.match_prefix([5])
    assert upper.in_tree
    tree.remove(tail)
    tree.match_prefix([5])
    assert upper.in_tree, "the tree had branched there"
    tree.check_invariants()


# -- the bytes -------------------------------------------------------------------------------------------------------


def test_the_pool_copies_the_first_slots_in_every_layer() -> None:
    pool = KVPool([LayerKV(2, 3, 5), LayerKV(1, 4, 4)], num_pages=4, page_size=PAGE, dtype=torch.float32)
    for number, pages in enumerate((*pool.k, *pool.v)):
        pages.copy_(torch.arange(pages.numel()).reshape(pages.shape) + 1000 * number)
    before = [pages.clone() for pages in (*pool.k, *pool.v)]
    pool.copy_page(1, 3, 2)
    for pages, old in zip((*pool.k, *pool.v), before, strict=True):
        assert torch.equal(pages[3, :2], old[1, :2])
        pages[3, :2] = old[3, :2]
        assert torch.equal(pages, old), "and nothing else"
