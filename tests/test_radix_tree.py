"""The radix tree: what is found, how edges split, what locks pin, and how deep it may be."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from radixkv import RadixTree
from radixkv.cache.radix_tree import TreeNode
from radixkv.errors import (
    ConfigError,
    InvalidPagesError,
    InvalidRequestError,
    InvalidTokenIdsError,
    TokenIdsTypeError,
)
from strategies import NAMESPACES, WordTree, dump, spell

page_sizes = pytest.mark.parametrize("page_size", [1, 4, 16])


def lock_refs(tree: RadixTree) -> list[tuple[int, int]]:
    """(tokens, locks) of each node but the roots, parents first."""
    return [(node.num_tokens, node.lock_ref) for _, node in tree.nodes() if not node.is_root]


# -- match and insert ------------------------------------------------------------------------------------------------


@page_sizes
def test_longest_common_prefix_is_found(page_size: int) -> None:
    tree = WordTree(page_size)
    tree.insert("abcd")
    tree.insert("abef")
    for word, expected in [("abcd", 4), ("abefg", 4), ("abc", 3), ("abx", 2), ("a", 1), ("x", 0), ("", 0)]:
        found = tree.match(word)
        assert found.length == expected * page_size
        assert tree.names(found.pages.tolist()) == [word[: end + 1] for end in range(expected)]
        assert found.pages.dtype == np.int32
        assert not found.pages.flags.writeable


@page_sizes
def test_match_splits_where_it_ends_and_keeps_the_lower_node(page_size: int) -> None:
    tree = WordTree(page_size)
    leaf = tree.insert("abcd").node
    upper = tree.match("abx").node
    assert [node for _, node in tree.tree.nodes()][1:] == [upper, leaf]
    assert (upper.num_tokens, leaf.num_tokens) == (2 * page_size, 2 * page_size)
    assert leaf.parent is upper
    assert leaf.token_ids.tolist() == spell("cd", page_size)
    assert tree.match("abcd").node is leaf
    assert tree.match("ab").node is upper  # ends where a node ends: no new split
    assert len(list(tree.tree.nodes())) == 3


@page_sizes
def test_insert_says_how_much_was_there_and_keeps_the_first_pages(page_size: int) -> None:
    tree = WordTree(page_size)
    assert tree.insert("ab").prefix_len == 0
    assert tree.insert("abcd").prefix_len == 2 * page_size
    assert tree.insert("abef").prefix_len == 2 * page_size
    assert tree.insert("abc").prefix_len == 3 * page_size
    assert tree.tree.match_prefix(spell("abcd", page_size)).pages.tolist() == [0, 1, 4, 5]
    assert tree.tree.match_prefix(spell("abef", page_size)).pages.tolist() == [0, 1, 8, 9]
    assert tree.tree.total_size == 6 * page_size


@pytest.mark.parametrize("page_size", [2, 4, 16])
def test_only_whole_pages_are_kept_and_found(page_size: int) -> None:
    tree = RadixTree(page_size)
    tokens = list(range(3 * page_size))
    assert tree.insert(tokens[:-1], [7, 8]).prefix_len == 0
    assert tree.total_size == 2 * page_size
    assert tree.match_prefix(tokens).length == 2 * page_size
    for num_tokens in range(2 * page_size + 1):
        assert tree.peek(tokens[:num_tokens]) == num_tokens // page_size * page_size
    assert tree.match_prefix([*tokens[: 2 * page_size - 1], 999]).length == page_size
    assert tree.insert(tokens[: page_size - 1], []).prefix_len == 0
    tree.check_invariants()


def test_pages_that_share_their_first_tokens_are_siblings() -> None:
    tree = RadixTree(page_size=4)
    tree.insert([1, 2, 3, 4], [0])
    tree.insert([1, 2, 3, 5], [1])
    assert tree.match_prefix([1, 2, 3, 5]).pages.tolist() == [1]
    assert tree.match_prefix([1, 2, 3, 6]).length == 0
    tree.check_invariants()


@page_sizes
def test_empty_sequences(page_size: int) -> None:
    tree = RadixTree(page_size)
    assert tree.match_prefix([]).length == 0
    assert tree.insert([], []).prefix_len == 0
    assert tree.peek([]) == 0
    assert list(tree.nodes()) == []


@page_sizes
def test_nothing_found_can_be_pinned_all_the_same(page_size: int) -> None:
    tree = WordTree(page_size)
    for found in [tree.lock("a"), tree.lock("")]:
        tree.insert("a")
        tree.unlock(found)
    assert lock_refs(tree.tree) == [(page_size, 0)]


@page_sizes
def test_peek_changes_nothing(page_size: int) -> None:
    tree = WordTree(page_size)
    for word in ["abcd", "abef", "gh"]:
        tree.insert(word)
    tree.lock("abc")

    def state() -> object:
        nodes = [(depth, id(node), node.queue_key) for depth, node in tree.tree.nodes()]
        return (dump(tree.tree), nodes, tree.tree.tick, repr(tree.tree))

    before = state()
    for word, expected in [("abcd", 4), ("abce", 3), ("abx", 2), ("a", 1), ("ghi", 2), ("x", 0), ("", 0)]:
        assert tree.tree.peek(spell(word, page_size, 3)) == expected * page_size
    assert tree.tree.peek(spell("a", page_size), extra_key="elsewhere") == 0
    assert state() == before


@page_sizes
def test_peek_path_names_the_nodes_that_hold_the_prefix(page_size: int) -> None:
    tree = WordTree(page_size)
    leaf = tree.insert("abcd").node
    stem = tree.match("ab").node
    assert tree.tree.peek_path(spell("abcx", page_size)) == (3 * page_size, [stem, leaf])
    assert tree.tree.peek_path(spell("x", page_size)) == (0, [])


# -- namespaces ------------------------------------------------------------------------------------------------------


@page_sizes
def test_namespaces_never_share(page_size: int) -> None:
    tree = RadixTree(page_size)
    tokens = spell("ab", page_size)
    for number, (extra_key, cache_salt) in enumerate(NAMESPACES):
        pages = [2 * number, 2 * number + 1]
        assert tree.peek(tokens, extra_key=extra_key, cache_salt=cache_salt) == 0
        assert tree.insert(tokens, pages, extra_key=extra_key, cache_salt=cache_salt).prefix_len == 0
    for number, (extra_key, cache_salt) in enumerate(NAMESPACES):
        found = tree.match_prefix(tokens, extra_key=extra_key, cache_salt=cache_salt)
        assert found.pages.tolist() == [2 * number, 2 * number + 1]
    assert tree.match_prefix(tokens, extra_key="a", cache_salt="a").length == 0
    assert tree.match_prefix(tokens, extra_key="").length == 0
    assert [node.namespace for depth, node in tree.nodes() if depth == 0] == NAMESPACES
    tree.check_invariants()


# -- locks -----------------------------------------------------------------------------------------------------------


@page_sizes
def test_locks_count_along_the_path(page_size: int) -> None:
    tree = WordTree(page_size)
    for word in ["a", "ab", "abc", "abd"]:
        tree.insert(word)
    deep, shallow = tree.lock("abc"), tree.lock("ab")
    assert lock_refs(tree.tree) == [(page_size, 2), (page_size, 2), (page_size, 1), (page_size, 0)]
    assert (tree.tree.evictable_size, tree.tree.protected_size) == (page_size, 3 * page_size)
    tree.unlock(deep)
    assert lock_refs(tree.tree) == [(page_size, 1), (page_size, 1), (page_size, 0), (page_size, 0)]
    tree.unlock(shallow)
    assert tree.tree.evictable_size == tree.tree.total_size == 4 * page_size


@page_sizes
def test_splitting_a_locked_node_pins_both_halves(page_size: int) -> None:
    tree = WordTree(page_size)
    tree.insert("abcd")
    found = tree.lock("abcd")
    tree.match("ab")
    tree.insert("abce")
    assert lock_refs(tree.tree) == [(2 * page_size, 1), (page_size, 1), (page_size, 1), (page_size, 0)]
    assert tree.tree.protected_size == 4 * page_size
    tree.unlock(found)
    assert tree.tree.protected_size == 0


@page_sizes
def test_growing_below_a_locked_leaf_pins_only_what_was_locked(page_size: int) -> None:
    tree = WordTree(page_size)
    tree.insert("a")
    found = tree.lock("a")
    tree.insert("ab")
    assert lock_refs(tree.tree) == [(page_size, 1), (page_size, 0)]
    tree.unlock(found)
    assert tree.tree.evictable_size == 2 * page_size


def test_unpinning_what_is_not_pinned() -> None:
    tree = WordTree(1)
    tree.insert("ab")
    found = tree.lock("a")
    tree.unlock(found)
    with pytest.raises(InvalidRequestError, match=r"TreeNode\(1 tokens, 1 children, lock_ref=0, .* is not pinned"):
        tree.unlock(found)
    tree.tree.check_invariants()


# -- misuse ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [0, -1, True, 2.0, "16", None])
def test_page_size_must_be_a_positive_integer(page_size: object) -> None:
    with pytest.raises(ConfigError, match=f"page_size must be an integer of at least 1, not {page_size!r}"):
        RadixTree(page_size)  # type: ignore[arg-type]


@pytest.mark.parametrize("pages", [[], [1], [1, 2, 3]])
def test_number_of_pages_must_fit(pages: list[int]) -> None:
    tree = RadixTree(page_size=2)
    with pytest.raises(InvalidPagesError, match=f"2 whole pages of 2 tokens need as many page ids, not {len(pages)}"):
        tree.insert([1, 2, 3, 4, 5], pages)
    assert tree.total_size == 0


def test_bad_ids_are_refused_before_anything_changes() -> None:
    tree = RadixTree()
    tree.insert([1, 2, 3], [0, 1, 2])
    before = dump(tree)
    for call in (tree.match_prefix, tree.peek, lambda ids: tree.insert(ids, [5, 6])):
        with pytest.raises(InvalidTokenIdsError, match="token id -2 at position 1"):
            call([1, -2])
        with pytest.raises(TokenIdsTypeError, match=r"not float \(2.5 at position 1\)"):
            call([1, 2.5])
    assert dump(tree) == before


# -- depth -----------------------------------------------------------------------------------------------------------


def chain(num_nodes: int) -> RadixTree:
    """A tree that is one path of nodes of one token each, cut by halving, since matching each prefix is quadratic."""
    tree = RadixTree()
    whole = tree.insert(np.arange(num_nodes), np.arange(num_nodes)).node
    uncut = [whole]
    while uncut:
        node = uncut.pop()
        if node.num_tokens > 1:
            uncut += [tree._split(node, node.num_tokens // 2 * 4), node]
    return tree


def test_chain_is_what_matching_every_prefix_gives() -> None:
    matched = RadixTree()
    matched.insert(np.arange(50), np.arange(50))
    for end in range(49, 0, -1):
        matched.match_prefix(range(end))
    cut = chain(50)
    assert [state._replace(last_use=0) for state in dump(matched).values()] == [
        state._replace(last_use=0) for state in dump(cut).values()
    ]


def test_a_hundred_thousand_nodes_deep() -> None:
    depth = 100_000
    tree = chain(depth)
    ids = np.arange(depth)
    assert [level for level, _ in tree.nodes()] == list(range(depth + 1))
    assert tree.peek(ids) == depth
    found = tree.match_prefix(ids)
    assert np.array_equal(found.pages, ids)
    tree.inc_lock_ref(found.node)
    assert tree.insert(np.append(ids, 7), np.append(ids, depth)).prefix_len == depth
    assert (tree.protected_size, tree.evictable_size) == (depth, 1)
    tree.check_invariants()
    assert tree.evict(depth).tolist() == [depth]
    tree.dec_lock_ref(found.node)
    tree.check_invariants()
    assert np.array_equal(tree.evict(depth), ids[::-1])
    assert tree.total_size == 0
    tree.check_invariants()


def count_nodes() -> int:
    """Tree nodes alive in this process, after a collection."""
    gc.collect()
    return sum(type(thing) is TreeNode for thing in gc.get_objects())


def test_a_deep_tree_is_garbage_collected() -> None:
    before = count_nodes()
    tree = chain(100_000)
    gone = weakref.ref(tree)
    del tree
    assert count_nodes() <= before
    assert gone() is None


def test_bad_ids_are_refused_in_a_namespace_that_holds_nothing() -> None:
    tree = RadixTree(page_size=2)
    with pytest.raises(InvalidTokenIdsError):
        tree.match_prefix([-1, 5])
    assert tree.tick == 0, "a call that failed is no use"


def test_errors_about_pages_say_so() -> None:
    with pytest.raises(InvalidPagesError, match="page id -1 at position 0"):
        RadixTree(page_size=1).insert([1], [-1])


def test_a_rank_that_depends_on_the_edge_is_asked_again_after_a_split() -> None:
    class LongestFirst:
        name = "longest"

        def rank(self, node: TreeNode) -> int:
            return -node.num_tokens

    tree = RadixTree(page_size=1, policy=LongestFirst())
    tree.insert([1, 2, 3, 4], [0, 1, 2, 3])
    tree.insert([9, 8], [4, 5])
    tree.match_prefix([1, 2, 3])
    assert tree.evict(1).tolist() == [4, 5]
