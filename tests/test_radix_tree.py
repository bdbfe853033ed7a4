"""The radix tree: what is found, how edges split, what locks pin, and how deep it may be."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from itertools import permutations, product

import numpy as np
import pytest

from radixkv import RadixTree
from radixkv.cache.eviction.policy import EvictionPolicy
from radixkv.cache.tree.node import TreeNode
from radixkv.cache.tree.radix_tree import SHORTEN_EVERY_TICKS, SHORTEN_PATHS_LONGER_THAN
from radixkv.errors import (
    ConfigError,
    InvalidPagesError,
    InvalidRequestError,
    InvalidTokenIdsError,
    InvariantError,
    TokenIdsTypeError,
)
from strategies import NAMESPACES, FakeClock, WordTree, dump, snapshot, spell

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
def test_match_cuts_where_it_ends_and_keeps_the_lower_node(page_size: int) -> None:
    tree = WordTree(page_size)
    leaf = tree.insert("abcd").node
    upper = tree.match("abx").node
    assert [node for _, node in tree.tree.nodes()][1:] == [upper, leaf]
    assert (upper.num_tokens, leaf.num_tokens) == (2 * page_size, 2 * page_size)
    assert leaf.parent is upper
    assert leaf.token_ids.tolist() == spell("cd", page_size)
    assert upper.cut
    assert not leaf.cut


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


def test_the_leading_part_of_a_match_is_the_match_of_the_leading_part() -> None:
    words = ["".join(letters) for letters in product("abc", repeat=4)]
    for word, length, page_size in product(["abca", "abcc", "accb", "abx", "x"], range(5), [1, 4]):
        tree, other = WordTree(page_size), WordTree(page_size)
        for each in (tree, other):
            for known in words[:9] + words[15:20]:
                each.insert(known)
        match = tree.match(word)
        length = min(length, match.length // page_size)
        before = tree.tree.tick
        part, expected = tree.tree.leading(match, length * page_size), other.match(word[:length])
        assert part.length == expected.length == length * page_size
        assert part.pages.tolist() == expected.pages.tolist()
        assert part.node.end == part.length
        assert tree.tree.tick == before, "it is no use of its own"
        tree.tree.inc_lock_ref(part.node)
        tree.tree.check_invariants()
        tree.tree.dec_lock_ref(part.node)
        tree.tree.check_invariants()


@page_sizes
def test_peek_changes_nothing(page_size: int) -> None:
    tree = WordTree(page_size)
    for word in ["abcd", "abef", "gh"]:
        tree.insert(word)
    tree.lock("abc")

    before = snapshot(tree.tree)
    for word, expected in [("abcd", 4), ("abce", 3), ("abx", 2), ("a", 1), ("ghi", 2), ("x", 0), ("", 0)]:
        assert tree.tree.peek(spell(word, page_size, 3)) == expected * page_size
    assert tree.tree.peek(spell("a", page_size), extra_key="elsewhere") == 0
    assert snapshot(tree.tree) == before


@page_sizes
def test_peek_path_is_exact_to_the_token_and_names_the_nodes(page_size: int) -> None:
    tree = WordTree(page_size)
    leaf = tree.insert("abcd").node
    stem = tree.lock("ab").node
    before = snapshot(tree.tree)
    assert tree.tree.peek_path(spell("abcd", page_size)) == (4 * page_size, [stem, leaf])
    assert tree.tree.peek_path(spell("ab", page_size)) == (2 * page_size, [stem])
    # the pages of "a" and "c" differ in their last token only, those of "b" and "d" too
    assert tree.tree.peek_path(spell("aba", page_size)) == (
        3 * page_size - 1,
        [stem, leaf] if page_size > 1 else [stem],
    )
    assert tree.tree.peek_path(spell("abcb", page_size)) == (4 * page_size - 1, [stem, leaf])
    assert tree.tree.peek_path(spell("abb", page_size)) == (2 * page_size, [stem])
    assert tree.tree.peek_path(spell("b", page_size)) == (0, [])
    assert tree.tree.peek_path(spell("ab", page_size), extra_key="elsewhere") == (0, [])
    assert snapshot(tree.tree) == before


# -- cuts and merges -------------------------------------------------------------------------------------------------


@page_sizes
@pytest.mark.parametrize("use", [WordTree.match, WordTree.insert])
def test_a_cut_that_nobody_pins_is_merged_with_the_next_use(
    page_size: int, use: Callable[[WordTree, str], object]
) -> None:
    tree = WordTree(page_size)
    leaf = tree.insert("abcd").node
    use(tree, "ab")
    assert tree.edges() == ["|ab", "ab|cd"]
    tree.match("x")
    assert tree.edges() == ["|abcd"]
    use(tree, "abc")
    assert tree.edges() == ["|abc", "abc|d"]
    tree.insert("x")
    assert sorted(tree.edges()) == ["|abcd", "|x"]
    assert tree.match("abcd").node is leaf


@page_sizes
def test_probes_leave_the_tree_as_shallow_as_it_was(page_size: int) -> None:
    tree = WordTree(page_size)
    tree.insert("abcdefgh")
    for end in (7, 3, 5, 1, 6, 2, 4):
        tree.match("abcdefgh"[:end])
        tree.insert("abcdefgh"[:end])
    tree.match("abcdefgh")
    assert tree.edges() == ["|abcdefgh"]


@page_sizes
def test_a_pinned_cut_is_merged_when_its_last_pin_goes(page_size: int) -> None:
    tree = WordTree(page_size)
    tree.insert("abcd")
    first, second = tree.lock("ab"), tree.lock("ab")
    assert first.node is second.node
    for pinned in (first, second):
        tree.match("abcd")
        assert tree.edges() == ["|ab", "ab|cd"]
        tree.unlock(pinned)
    assert tree.edges() == ["|abcd"]


@page_sizes
def test_a_cut_within_what_another_pins_is_merged_all_the_same(page_size: int) -> None:
    tree = WordTree(page_size)
    tree.insert("abcd")
    whole = tree.lock("abcd")
    part = tree.lock("ab")
    assert lock_refs(tree.tree) == [(2 * page_size, 2), (2 * page_size, 1)]
    tree.unlock(part)
    assert lock_refs(tree.tree) == [(4 * page_size, 1)]
    tree.unlock(whole)
    assert tree.tree.evictable_size == 4 * page_size


@page_sizes
def test_pins_at_several_depths_are_undone_in_any_order(page_size: int) -> None:
    for order in permutations(range(3)):
        tree = WordTree(page_size)
        tree.insert("abcd")
        pins = [tree.lock(word) for word in ("abc", "a", "ab")]
        assert tree.edges() == ["|a", "a|b", "ab|c", "abc|d"]
        for number in order:
            tree.unlock(pins[number])
        assert tree.edges() == ["|abcd"]
        assert tree.tree.evictable_size == 4 * page_size


@page_sizes
def test_a_cut_where_the_tree_branched_stays(page_size: int) -> None:
    tree = WordTree(page_size)
    tree.insert("abcd")
    found = tree.lock("ab")
    tree.insert("abx")
    tree.unlock(found)
    tree.match("y")
    assert tree.edges() == ["|ab", "ab|cd", "ab|x"]
    assert tree.evict(2) == ["abc", "abcd"]
    tree.match("y")
    assert tree.edges() == ["|ab", "ab|x"]


@page_sizes
def test_a_cut_whose_lower_part_went_is_a_leaf(page_size: int) -> None:
    tree = WordTree(page_size)
    tree.insert("abcd")
    found = tree.lock("ab")
    assert tree.evict(99) == ["abc", "abcd"]
    tree.unlock(found)
    assert not found.node.cut
    tree.insert("abe")
    tree.match("x")
    assert tree.edges() == ["|ab", "ab|e"], "it was no cut any more"
    assert tree.evict(99) == ["abe", "a", "ab"]


@page_sizes
def test_what_a_probe_cut_is_evicted_from_its_end(page_size: int) -> None:
    tree = WordTree(page_size)
    tree.insert("abcd")
    tree.match("ab")
    assert tree.evict(2) == ["abc", "abcd"]
    tree.match("x")
    assert tree.edges() == ["|ab"]
    assert tree.evict(2) == ["a", "ab"]


@page_sizes
def test_a_merged_node_speaks_for_its_heir(page_size: int) -> None:
    tree = WordTree(page_size)
    leaf = tree.insert("abcd").node
    found = tree.match("ab")
    tree.match("abc")  # merges "ab", and cuts at "abc"
    assert found.node.heir is leaf
    assert not found.node.in_tree
    assert tree.names(tree.tree.path_pages(found.node).tolist()) == ["a", "ab"]
    tree.tree.inc_lock_ref(found.node)
    tree.match("x")
    assert lock_refs(tree.tree) == [(4 * page_size, 1)], "all of the heir is pinned, which is more than was asked for"
    tree.match("a")
    assert lock_refs(tree.tree) == [(page_size, 1), (3 * page_size, 1)]
    assert tree.evict(99) == []
    tree.unlock(found)
    assert tree.evict(99) == ["ab", "abc", "abcd", "a"]
    for use in (tree.tree.inc_lock_ref, tree.tree.path_pages, tree.tree.retain):
        with pytest.raises(InvalidRequestError, match="was evicted; match the prefix again"):
            use(found.node)


@page_sizes
def test_what_a_merge_hands_on(page_size: int) -> None:
    clock = FakeClock()
    tree = WordTree(page_size, clock=clock)
    leaf = tree.insert("abcd").node
    found = tree.lock("ab")
    tree.tree.retain(leaf, priority=1, keep_for_s=5)
    tree.tree.retain(found.node, priority=2, keep_for_s=3)
    used = tree.match("ab").node.last_access
    tree.unlock(found)
    assert (leaf.priority, leaf.keep_until, leaf.last_access, leaf.created) == (2, 5.0, used, 1)


@page_sizes
def test_what_a_cut_hands_on(page_size: int) -> None:
    tree = WordTree(page_size)
    tree.tree.retain(tree.insert("abcd").node, priority=1, keep_for_s=5)
    upper = tree.match("ab").node
    (lower,) = upper.children.values()
    for node in (upper, lower):
        assert (node.priority, node.keep_until, node.last_access, node.created) == (1, 5.0, 2, 1)


def deep_word(num_letters: int) -> str:
    """A word in which no letter comes twice."""
    return "".join(map(chr, range(ord("A"), ord("A") + num_letters)))


@page_sizes
def test_forks_left_alone_on_a_deep_path_are_merged_in_time(page_size: int) -> None:
    tree = WordTree(page_size)
    stem = deep_word(SHORTEN_PATHS_LONGER_THAN + 2)
    for end in range(len(stem) - 1, 0, -1):
        tree.insert(stem)
        tree.insert(stem[:end] + "!")  # a fork after each letter
    assert len(tree.edges()) == len(stem) + len(stem) - 1
    pinned = tree.lock(stem[:5])
    whole = tree.lock(stem)
    tree.evict(len(stem) - 1)  # the other branches
    tree.unlock(whole)
    assert len(tree.edges()) == len(stem)
    for _ in range(SHORTEN_EVERY_TICKS):
        found = tree.match(stem)
    assert tree.edges() == [f"|{stem[:5]}", f"{stem[:5]}|{stem[5:]}"], "but not across a pin"
    assert tree.names(found.pages.tolist())[-1] == stem
    tree.unlock(pinned)
    assert tree.match(stem).length == len(stem) * page_size
    assert tree.names(tree.tree.path_pages(whole.node).tolist())[-1] == stem


@page_sizes
def test_what_was_inserted_step_by_step_is_no_fork(page_size: int) -> None:
    tree = WordTree(page_size)
    stem = deep_word(SHORTEN_PATHS_LONGER_THAN + 2)
    for end in range(1, len(stem) + 1):
        tree.insert(stem[:end])
    before = tree.edges()
    for _ in range(SHORTEN_EVERY_TICKS):
        tree.match(stem)
    assert tree.edges() == before


# -- page ids --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pages",
    [
        range(300),
        range(1000, 1300),
        range(2**18 - 300, 2**18),
        range(2**18 - 100, 2**18 + 200),
        range(2**31 - 300, 2**31),
        range(300, 0, -1),
        [*range(150), *range(200, 350)],
        [0, *range(2, 299), 1, 299],
        [*range(0, 600, 2)],
    ],
    ids=["first", "consecutive", "end", "across", "largest", "falling", "gap", "swapped", "even"],
)
def test_any_page_ids_are_kept_exactly(pages: list[int]) -> None:
    """Long runs of consecutive pages are kept otherwise than others: nobody may see that."""
    pages = list(pages)
    tree = RadixTree()
    leaf = tree.insert(range(300), np.array(pages, np.int32)).node
    assert leaf.page_ids.tolist() == tree.path_pages(leaf).tolist() == pages
    found = tree.match_prefix(range(100))
    assert found.pages.tolist() == pages[:100]
    assert leaf.page_ids.tolist() == pages[100:]
    tree.match_prefix([7])
    assert leaf.page_ids.tolist() == pages
    tree.insert([*range(200), 999], [*pages[:200], 2**31 - 400])
    tree.check_invariants()
    assert tree.match_prefix(range(300)).pages.tolist() == pages
    assert sorted(tree.evict(10**6).tolist()) == sorted([*pages, 2**31 - 400])


def test_a_page_of_two_nodes_is_found_whichever_way_it_is_kept() -> None:
    tree = RadixTree()
    tree.insert(range(100), range(100))
    tree.insert([7, 8], [3, 200])
    with pytest.raises(InvariantError, match="a page is in two places"):
        tree.check_invariants()


def test_page_ids_need_not_be_kept_by_the_caller() -> None:
    for pages in (np.arange(100, dtype=np.int32), np.arange(0, 200, 2, dtype=np.int32)):
        expected = pages.tolist()
        tree = RadixTree()
        node = tree.insert(range(100), pages).node
        pages[:] = 7
        assert node.page_ids.tolist() == expected


@pytest.mark.parametrize("known", [0, 1, 80])
def test_wrong_page_ids_are_named_with_their_position(known: int) -> None:
    tree = RadixTree()
    tree.insert(range(known), range(known))
    before = snapshot(tree)
    for wrong in (np.array([*range(99), -5], np.int32), [*range(99), -5], [*range(99), 2**31]):
        with pytest.raises(InvalidPagesError, match=f"page id {wrong[99]} at position 99"):
            tree.insert(range(100), wrong)
        assert snapshot(tree) == before


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
def test_cutting_a_locked_node_pins_both_halves(page_size: int) -> None:
    tree = WordTree(page_size)
    tree.insert("abcd")
    found = tree.lock("abcd")
    tree.insert("abe")
    assert lock_refs(tree.tree) == [(2 * page_size, 1), (2 * page_size, 1), (page_size, 0)]
    assert tree.tree.protected_size == 4 * page_size
    tree.insert("abcf")
    assert lock_refs(tree.tree) == [(2 * page_size, 1), (page_size, 1), (page_size, 1), (page_size, 0), (page_size, 0)]
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
    with pytest.raises(InvalidRequestError, match=r"TreeNode\(2 tokens, 0 children, lock_ref=0, .* is not pinned"):
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


def chain(num_nodes: int, page_size: int = 1, policy: str = "lru") -> RadixTree:
    """A tree that is one path of nodes of one page each: inserting every prefix of it would be quadratic."""
    tree = RadixTree(page_size, policy)
    node = tree.insert(range(page_size), [0]).node
    ids = np.arange(num_nodes * page_size, dtype=np.int32)
    pages = np.arange(num_nodes, dtype=np.int32)
    for page in range(1, num_nodes):
        key = ids[page * page_size : (page + 1) * page_size].tobytes()
        node = tree._add_leaf(node, key, pages[page : page + 1].tobytes())
    return tree


def test_chain_is_what_inserting_every_prefix_gives() -> None:
    inserted = RadixTree(page_size=2)
    for end in range(1, 51):
        inserted.insert(range(2 * end), range(end))
    inserted.check_invariants()

    def without_uses(tree: RadixTree) -> object:
        return {key: state._replace(created=0, last_access=0) for key, state in dump(tree).items()}

    assert without_uses(chain(50, page_size=2)) == without_uses(inserted)


DEPTHS = pytest.mark.parametrize("depth", [5_000, pytest.param(100_000, marks=pytest.mark.stress)])


@DEPTHS
@pytest.mark.parametrize("policy", ["lru", "cost"])
def test_a_tree_deeper_than_the_stack(policy: str, depth: int) -> None:
    limit = sys.getrecursionlimit()
    tree = chain(depth, 2, policy)
    ids, pages = np.arange(2 * depth), np.arange(depth)
    assert [level for level, _ in tree.nodes()] == list(range(depth + 1))
    assert tree.peek(ids) == 2 * depth
    assert len(tree.peek_path(ids)[1]) == depth
    found = tree.match_prefix(ids)
    assert np.array_equal(found.pages, pages)
    assert np.array_equal(tree.path_pages(found.node), pages)
    assert len(found.node.path()) == depth
    assert found.node.root.is_root
    tree.inc_lock_ref(found.node)
    tree.touch(found.node)
    tree.retain(found.node, priority=1, keep_for_s=0.5)
    assert tree.insert([*ids, 7, 7], [*pages, depth]).prefix_len == 2 * depth
    tail = tree.insert_tail(found.node, [8], depth + 1)
    assert tree.find_partial(found.node, [8, 9]) == (1, depth + 1, tail)
    assert (tree.num_pages, tree.num_evictable_pages) == (depth + 2, 2)
    tree.check_invariants()
    assert tree.remove(tail).tolist() == [depth + 1]
    assert tree.evict(depth).tolist() == [depth]
    tree.dec_lock_ref(found.node)
    tree.check_invariants()
    assert tree.match_prefix(ids[: depth + 1]).length == depth
    assert np.array_equal(tree.evict(depth), pages[: depth // 2 - 1 : -1])
    assert np.array_equal(tree.clear(), pages[depth // 2 - 1 :: -1])
    assert tree.total_size == 0
    tree.check_invariants()
    assert sys.getrecursionlimit() == limit


def count_nodes() -> int:
    """Tree nodes alive in this process, after a collection."""
    gc.collect()
    return sum(type(thing) is TreeNode for thing in gc.get_objects())


@DEPTHS
def test_a_deep_tree_is_garbage_collected(depth: int) -> None:
    before = count_nodes()
    tree = chain(depth)
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
    class LongestFirst(EvictionPolicy):
        name = "longest"

        def rank(self, node: TreeNode) -> int:
            return -node.num_tokens

    tree = RadixTree(page_size=1, policy=LongestFirst())
    tree.insert([1, 2, 3, 4], [0, 1, 2, 3])
    tree.insert([9, 8], [4, 5])
    tree.match_prefix([1, 2, 3])
    assert tree.evict(2).tolist() == [4, 5]
