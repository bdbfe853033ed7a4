"""Views of a tree: complete where there is room, bounded where there is not; and the hits of nodes."""

from __future__ import annotations

import numpy as np
import pytest

from radixkv import PrefixCache
from radixkv.cache.insight.tree_view import TreeViewer
from radixkv.cache.tree.radix_tree import RadixTree
from radixkv.errors import ConfigError


def filled_tree(num_branches: int, length: int) -> RadixTree:
    tree = RadixTree()
    for branch in range(num_branches):
        for end in range(1, length + 1):
            ids = [1, 2, branch + 10, *range(100, 100 + end)]
            tree.insert(ids, pages=np.arange(len(ids)), extra_key="odd" if branch % 2 else None)
    return tree


def test_a_view_holds_all_nodes_parents_first() -> None:
    tree = filled_tree(6, 3)
    view = TreeViewer(1000).look(tree)
    nodes = [node for _, node in tree.nodes()]
    assert len(view.ids) == len(set(view.ids)) == len(nodes)
    assert sum(view.num_tokens()) == sum(node.num_tokens for node in nodes) == view.total_tokens
    seen: set[int] = set()
    for number, parent, namespace in zip(view.ids, view.parents, view.namespaces, strict=True):
        assert (parent is None) == (namespace is not None)
        assert parent is None or parent in seen
        seen.add(number)
    children = [view.parents.count(number) for number in view.ids]
    assert children == view.num_children


@pytest.mark.parametrize("max_nodes", range(1, 30))
def test_a_view_of_a_large_tree_is_the_part_near_the_roots(max_nodes: int) -> None:
    tree = filled_tree(8, 3)
    view, whole = TreeViewer(max_nodes).look(tree), TreeViewer(1000).look(tree)
    assert len(view.ids) == min(max_nodes, len(whole.ids))
    assert all(parent is None or parent in view.ids for parent in view.parents)
    assert view.total_tokens == whole.total_tokens
    if len(view.ids) < len(whole.ids):
        assert any(view.parents.count(number) < num for number, num in zip(view.ids, view.num_children, strict=True))


def test_of_children_without_room_the_most_recently_used_are_shown() -> None:
    tree = RadixTree()
    for first in range(1, 9):
        tree.insert([first], pages=[first])
    tree.match_prefix([6])
    view = TreeViewer(3).look(tree)
    assert {np.frombuffer(ids, np.int32)[0] for ids in view.token_ids[1:]} == {6, 8}


def test_a_view_needs_room_for_a_node() -> None:
    with pytest.raises(ConfigError, match="max_nodes must be an integer of at least 1, not 0"):
        TreeViewer(0)


def test_a_node_knows_how_many_requests_found_it() -> None:
    cache = PrefixCache(num_pages=32, page_size=2, copy_page=lambda source, target, num_tokens: None)

    def ask(*ids: int) -> None:
        with cache.acquire(ids, max_cached_tokens=len(ids) - 1) as lease:
            lease.commit(ids)

    ask(1, 2, 3, 4, 5, 6)
    ask(1, 2, 3, 4, 7, 8)
    ask(1, 2, 3, 4, 7, 9)  # the last page is found in part
    ask(30, 31)
    with cache.resume([1, 2, 3, 4, 5, 6]):
        pass
    hits = {tuple(node.token_ids.tolist()): node.hits for _, node in cache.nodes() if not node.is_root}
    assert hits == {(1, 2, 3, 4): 2, (5, 6): 0, (7, 8): 1, (7, 9): 0, (30, 31): 0}
    cache.check_invariants()


def test_a_refused_request_is_no_hit() -> None:
    cache = PrefixCache(num_pages=2, page_size=2)
    with cache.acquire([1, 2, 3, 4]) as lease:
        lease.commit([1, 2, 3, 4])
    with pytest.raises(Exception, match="pages"):
        cache.acquire([1, 2, 5, 6, 7, 8])
    assert [node.hits for _, node in cache.nodes()][1:] == [0] * (len(list(cache.nodes())) - 1)


def test_hit_rates_are_estimated_for_the_sizes_asked_for() -> None:
    cache = PrefixCache(num_pages=8, page_size=16)
    for _ in range(2):
        with cache.acquire(range(64)) as lease:
            lease.commit(range(64))
    rates = [(estimate.factor, estimate.hit_rate) for estimate in cache.estimate_hit_rates([0.25, 1.0])]
    assert rates == [(0.25, 0.25), (1.0, 0.5)], "a pool of 32 tokens keeps the first half of the prompt"
    assert PrefixCache(num_pages=8, diagnostics=False).estimate_hit_rates([1.0]) == ()


def test_a_tree_that_changes_between_the_parts_of_a_look_is_told_as_each_part_found_it() -> None:
    rng = np.random.default_rng(7)
    cache, viewer = PrefixCache(num_pages=200, page_size=1), TreeViewer(500)

    def ask() -> None:
        ids = rng.integers(0, 3, rng.integers(1, 12))
        with cache.acquire(ids, extra_key=str(rng.integers(2))) as lease:
            lease.commit(ids)

    for _ in range(60):
        ask()
    for _ in range(40):
        for view in cache.view(viewer, 5):
            if view is None:
                ask()
                if rng.random() < 0.05:
                    cache.reset()
        assert view is not None
        assert len(set(view.ids)) == len(view.ids) == len(view.parents) == len(view.pinned)
        places = {number: place for place, number in enumerate(view.ids)}
        for place, (parent, namespace) in enumerate(zip(view.parents, view.namespaces, strict=True)):
            assert (parent is None) == (namespace is not None)
            assert parent is None or places[parent] < place
        whole = viewer.look(cache.tree)
        assert len(whole.ids) == sum(1 for _ in cache.nodes())
    cache.check_invariants()


def test_a_leaf_whose_end_was_evicted_has_what_is_left_of_it() -> None:
    tree = RadixTree(page_size=2)
    ids = list(range(20))
    tree.insert(ids, pages=np.arange(10))
    tree.evict(4)
    view = TreeViewer(100).look(tree)
    assert view.num_tokens() == [0, 16]
    assert view.token_ids[1] == np.arange(16, dtype=np.int32).tobytes()
    assert sum(view.num_tokens()) == view.total_tokens
