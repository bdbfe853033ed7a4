"""Eviction: which leaves go, in which order, how many pages that frees, and what must stay.

Words stand for sequences: each letter is one page of tokens, and a page is called by the word that ends with it.
"""

from __future__ import annotations

import numpy as np
import pytest

from radixkv import PrefixCache, RadixTree
from radixkv.cache.eviction.policies import LRUPolicy, resolve_policy
from radixkv.cache.eviction.policy import EvictionPolicy
from radixkv.cache.tree.node import TreeNode
from radixkv.errors import ConfigError, InvalidRequestError, OutOfPagesError
from strategies import WordTree, spell

pytestmark = pytest.mark.parametrize("page_size", [1, 4, 16])


# -- order -----------------------------------------------------------------------------------------------------------


def test_least_recently_inserted_goes_first(page_size: int) -> None:
    tree = WordTree(page_size)
    for word in ["a", "b", "c"]:
        tree.insert(word)
    assert [tree.evict(1) for _ in range(4)] == [["a"], ["b"], ["c"], []]


def test_match_refreshes(page_size: int) -> None:
    tree = WordTree(page_size)
    for word in ["a", "b", "c"]:
        tree.insert(word)
    tree.match("a")
    assert tree.evict(3) == ["b", "c", "a"]


def test_insert_of_what_is_cached_refreshes(page_size: int) -> None:
    tree = WordTree(page_size)
    for word in ["a", "b", "c"]:
        tree.insert(word)
    assert tree.insert("b").prefix_len == page_size
    assert tree.evict(3) == ["a", "c", "b"]


def test_peek_does_not_refresh(page_size: int) -> None:
    tree = WordTree(page_size)
    tree.insert("a")
    tree.insert("b")
    assert tree.tree.peek(spell("a", page_size)) == page_size
    assert tree.evict(2) == ["a", "b"]


def test_use_of_a_part_refreshes_the_whole_edge(page_size: int) -> None:
    for use in (WordTree.match, WordTree.insert):
        for word in ("ab", "abx"):
            tree = WordTree(page_size)
            tree.insert("abc")
            tree.insert("d")
            use(tree, word)
            assert tree.evict(1) == ["d"]
            assert tree.evict(1) == ["abc"], "its lower part goes before its stem, and before what was inserted later"


def test_use_that_leaves_an_edge_at_its_first_page_is_none_of_it(page_size: int) -> None:
    tree = WordTree(page_size)
    tree.insert("abc")
    tree.insert("d")
    tree.match("x")
    assert tree.evict(4) == ["a", "ab", "abc", "d"]


def test_use_of_a_stem_that_ends_a_node_refreshes_nothing_below(page_size: int) -> None:
    tree = WordTree(page_size)
    for word in ["sa", "sb", "t"]:
        tree.insert(word)
    tree.match("s")
    assert tree.evict(4) == ["sa", "sb", "t", "s"]


def test_use_of_a_branch_refreshes_the_stem_but_no_other_branch(page_size: int) -> None:
    tree = WordTree(page_size)
    for word in ["sa", "sb", "t"]:
        tree.insert(word)
    tree.match("sa")
    assert tree.evict(4) == ["sb", "t", "sa", "s"]


def test_failed_match_refreshes_nothing_below_where_it_ended(page_size: int) -> None:
    tree = WordTree(page_size)
    tree.insert("a")
    tree.insert("b")
    assert tree.match("c").length == 0
    assert tree.match("cab").length == 0
    assert tree.evict(2) == ["a", "b"]


def test_release_does_not_count_as_a_use(page_size: int) -> None:
    tree = WordTree(page_size)
    tree.insert("a")
    found = tree.lock("a")
    tree.insert("b")
    tree.unlock(found)
    assert tree.evict(2) == ["a", "b"]


# -- leaves and parents ----------------------------------------------------------------------------------------------


def test_parent_goes_only_after_its_last_child(page_size: int) -> None:
    tree = WordTree(page_size)
    tree.insert("s")
    tree.insert("sa")
    tree.insert("sb")
    tree.insert("t")  # used later than the stem "s", which becomes a leaf nevertheless
    assert tree.evict(1) == ["sa"]
    assert tree.cached() == {"s", "sb", "t"}
    assert tree.evict(1) == ["sb"]
    assert tree.evict(1) == ["s"]
    assert tree.evict(1) == ["t"]


def test_one_call_climbs_from_leaf_to_root(page_size: int) -> None:
    tree = WordTree(page_size)
    for word in ["a", "ab", "abc"]:
        tree.insert(word)
    assert tree.evict(3) == ["abc", "ab", "a"]
    assert tree.tree.total_size == 0


def test_evicted_prefix_is_forgotten_and_can_come_back(page_size: int) -> None:
    tree = WordTree(page_size)
    tree.insert("ab")
    tree.insert("c")
    assert tree.evict(2) == ["a", "ab"]
    assert tree.match("ab").length == 0
    assert tree.insert("ab").prefix_len == 0
    assert tree.match("ab").length == 2 * page_size


# -- counts ----------------------------------------------------------------------------------------------------------


def test_eviction_takes_leaves_until_enough_is_gone_and_of_the_last_one_its_end(page_size: int) -> None:
    tree = WordTree(page_size)
    for word in ["abc", "de", "f"]:
        tree.insert(word)
    assert tree.tree.total_size == tree.tree.evictable_size == 6 * page_size
    assert tree.evict(4) == ["a", "ab", "abc", "de"]
    assert tree.tree.total_size == tree.tree.evictable_size == 2 * page_size
    assert sorted(tree.edges()) == ["|d", "|f"]


def test_one_token_more_than_a_leaf_takes_the_next_one_too(page_size: int) -> None:
    for num_tokens, expected_pages in [(3 * page_size, 3), (3 * page_size + 1, 4)]:
        tree = WordTree(page_size)
        tree.insert("abc")
        tree.insert("d")
        assert len(tree.tree.evict(num_tokens)) == expected_pages


def test_one_token_takes_the_last_page_of_the_oldest_leaf(page_size: int) -> None:
    tree = WordTree(page_size)
    tree.insert("abc")
    tree.insert("d")
    assert [tree.names(tree.tree.evict(1).tolist()) for _ in range(4)] == [["abc"], ["ab"], ["a"], ["d"]]


def test_a_use_of_what_is_left_of_a_leaf_refreshes_it(page_size: int) -> None:
    tree = WordTree(page_size)
    tree.insert("abc")
    tree.insert("d")
    assert tree.evict(1) == ["abc"]
    assert tree.match("abc").length == 2 * page_size
    assert tree.evict(2) == ["d", "ab"]


def test_a_leaf_whose_end_went_cannot_be_pinned_by_its_old_node_and_what_is_left_can(page_size: int) -> None:
    tree = WordTree(page_size)
    leaf = tree.insert("abc").node
    assert tree.evict(1) == ["abc"]
    with pytest.raises(InvalidRequestError, match="was evicted"):
        tree.tree.inc_lock_ref(leaf)
    tree.tree.inc_lock_ref(tree.match("abc").node)
    assert tree.evict(5) == []
    assert tree.insert("abd").prefix_len == 2 * page_size
    assert tree.evict(5) == ["abd"]


def test_the_end_of_a_leaf_that_is_kept_goes_only_if_nothing_else_can(page_size: int) -> None:
    tree = WordTree(page_size)
    tree.tree.retain(tree.insert("abc").node, keep_for_s=60)
    tree.insert("de")
    assert [tree.evict(1) for _ in range(4)] == [["de"], ["d"], ["abc"], ["ab"]]


def test_evicting_a_page_copies_no_more_of_its_leaf_than_that(page_size: int) -> None:
    tree = RadixTree(page_size)
    num_pages = 4096
    node = tree.insert(list(range(num_pages * page_size)), range(num_pages)).node
    key = node.key
    tree.evict(page_size)
    (left,) = tree.root_of((None, None)).children.values()
    assert left.key is key
    assert left.num_tokens == (num_pages - 1) * page_size
    for number in range(num_pages - 2, 0, -1):
        assert tree.evict(1).tolist() == [number]
    (left,) = tree.root_of((None, None)).children.values()
    assert len(left.key) <= 2 * 4 * page_size
    tree.check_invariants()


@pytest.mark.parametrize("num_tokens", [0, -5])
def test_evicting_nothing_changes_nothing(page_size: int, num_tokens: int) -> None:
    tree = WordTree(page_size)
    tree.insert("ab")
    assert tree.tree.evict(num_tokens).tolist() == []
    assert tree.cached() == {"a", "ab"}


def test_evicting_more_than_there_is_empties_the_tree(page_size: int) -> None:
    tree = WordTree(page_size)
    for word in ["ab", "ac", "d"]:
        tree.insert(word)
    assert sorted(tree.evict(1000)) == ["a", "ab", "ac", "d"]
    assert tree.tree.total_size == tree.tree.evictable_size == tree.tree.protected_size == 0
    assert list(tree.tree.nodes()) == []
    assert tree.evict(1) == []


def test_freed_pages_are_int32_and_each_comes_once(page_size: int) -> None:
    tree = WordTree(page_size)
    for word in ["abc", "abd", "ae", "abc"]:
        tree.insert(word)
    freed = tree.tree.evict(10**6)
    assert freed.dtype == "int32"
    assert sorted(tree.names(freed.tolist())) == ["a", "ab", "abc", "abd", "ae"]


# -- pins ------------------------------------------------------------------------------------------------------------


def test_pinned_path_is_never_evicted(page_size: int) -> None:
    tree = WordTree(page_size)
    for word in ["abc", "abd", "e"]:
        tree.insert(word)
    found = tree.lock("abc")
    assert (tree.tree.evictable_size, tree.tree.protected_size) == (2 * page_size, 3 * page_size)
    assert tree.evict(1000) == ["abd", "e"]
    assert tree.evict(1000) == []
    assert tree.match("abc").length == 3 * page_size
    tree.unlock(found)
    assert tree.evict(1000) == ["abc", "a", "ab"]


def test_what_lies_below_a_pinned_node_is_evicted(page_size: int) -> None:
    tree = WordTree(page_size)
    tree.insert("abc")
    tree.lock("ab")
    assert tree.evict(1000) == ["abc"]
    assert tree.cached() == {"a", "ab"}


def test_stem_waits_for_all_its_pins(page_size: int) -> None:
    tree = WordTree(page_size)
    tree.insert("sa")
    tree.insert("sb")
    first, second = tree.lock("sa"), tree.lock("sb")
    tree.unlock(first)
    assert tree.evict(1000) == ["sa"]
    tree.unlock(second)
    assert tree.evict(1000) == ["sb", "s"]


def test_pinned_twice_needs_two_unpins(page_size: int) -> None:
    tree = WordTree(page_size)
    tree.insert("a")
    found = tree.lock("a")
    tree.lock("a")
    tree.unlock(found)
    assert tree.evict(1) == []
    tree.unlock(found)
    assert tree.evict(1) == ["a"]


def test_evicted_node_cannot_be_pinned(page_size: int) -> None:
    tree = WordTree(page_size)
    tree.insert("a")
    found = tree.match("a")
    tree.evict(1)
    with pytest.raises(InvalidRequestError, match="was evicted; match the prefix again"):
        tree.tree.inc_lock_ref(found.node)


# -- namespaces ------------------------------------------------------------------------------------------------------


def test_namespaces_share_one_order(page_size: int) -> None:
    tree = WordTree(page_size)
    tree.insert("a", extra_key="one")
    tree.insert("b", extra_key="two")
    tree.insert("c", extra_key="one")
    assert tree.evict(3) == ["a", "b", "c"]


def test_use_in_one_namespace_does_not_refresh_another(page_size: int) -> None:
    tree = WordTree(page_size)
    tree.insert("a", extra_key="one")
    tree.insert("a", extra_key="two")
    tree.match("a", extra_key="two")
    tree.match("a", extra_key="none")
    tree.evict(1)
    assert tree.match("a", extra_key="one").length == 0
    assert tree.match("a", extra_key="two").length == page_size


def test_root_goes_with_its_last_node(page_size: int) -> None:
    tree = WordTree(page_size)
    tree.insert("a", extra_key="one")
    tree.insert("b", extra_key="two")
    tree.evict(1)
    assert [node.namespace for depth, node in tree.tree.nodes() if depth == 0] == [("two", None)]
    tree.insert("a", extra_key="one")
    assert tree.match("a", extra_key="one").length == page_size


# -- policies --------------------------------------------------------------------------------------------------------


class MostRecentFirst(EvictionPolicy):
    """The opposite of LRU."""

    name = "mru"

    def rank(self, node: TreeNode) -> int:
        return -node.last_access


class Indifferent(EvictionPolicy):
    """Ranks all leaves alike."""

    name = "indifferent"

    def rank(self, node: TreeNode) -> int:
        return 0


def test_among_equals_who_waited_longest_goes_first(page_size: int) -> None:
    tree = RadixTree(page_size, Indifferent())
    for page, word in enumerate("abc"):
        tree.insert(spell(word, page_size), [page])
    tree.match_prefix(spell("a", page_size))
    found = tree.match_prefix(spell("b", page_size))
    tree.inc_lock_ref(found.node)
    tree.match_prefix(spell("c", page_size))
    tree.dec_lock_ref(found.node)
    tree.check_invariants()
    assert tree.evict(3 * page_size).tolist() == [0, 2, 1]


def test_policy_object_decides_the_order(page_size: int) -> None:
    tree = RadixTree(page_size, MostRecentFirst())
    for page, word in enumerate("abc"):
        tree.insert(spell(word, page_size), [page])
    tree.match_prefix(spell("a", page_size))
    assert tree.evict(3 * page_size).tolist() == [0, 2, 1]
    tree.check_invariants()


def test_unknown_policy_name_lists_the_known_ones(page_size: int) -> None:
    with pytest.raises(ConfigError, match="unknown eviction policy 'lifo'; the policies are lru"):
        RadixTree(page_size, "lifo")
    with pytest.raises(ConfigError, match="unknown eviction policy 'lifo'; the policies are lru"):
        PrefixCache(8, page_size, "lifo")


def test_policies_resolve_by_name_or_stay_themselves(page_size: int) -> None:
    own: EvictionPolicy = MostRecentFirst()
    assert isinstance(resolve_policy("lru"), LRUPolicy)
    assert resolve_policy(own) is own
    cache = PrefixCache(8, page_size, own)
    assert cache.tree.policy is own
    assert cache.config.policy == "mru"


# -- under running requests ------------------------------------------------------------------------------------------


def test_running_requests_keep_their_pages_while_others_are_evicted(page_size: int) -> None:
    cache = PrefixCache(num_pages=6, page_size=page_size)
    for word in ["ab", "cd"]:
        with cache.acquire(spell(word, page_size)) as lease:
            lease.commit(spell(word, page_size))
    with cache.acquire(spell("ab", page_size)) as reader:  # older than "cd" but for this use
        pages = reader.pages.tolist()
        with cache.acquire(spell("efgh", page_size)) as writer:  # 2 pages are free, so "cd" must go
            assert set(writer.pages.tolist()).isdisjoint(pages)
            assert cache.peek(spell("cd", page_size)) == 0
            assert cache.peek(spell("ab", page_size)) == 2 * page_size
            assert cache.stats().evicted_tokens == 2 * page_size
            with pytest.raises(OutOfPagesError, match="1 pages are needed, but only 0 of 6 are free and 0 can be"):
                cache.acquire(spell("i", page_size))
            cache.check_invariants()
        assert reader.pages.tolist() == pages
    with cache.acquire(spell("ijklmn", page_size)):
        assert cache.stats().total_tokens == 0
        cache.check_invariants()


def test_a_handle_on_the_end_of_a_leaf_that_was_evicted_says_what_that_was(page_size: int) -> None:
    tree = RadixTree(page_size)
    ids = np.arange(100, 100 + 8 * page_size, dtype=np.int32)
    leaf = tree.insert(ids, pages=list(range(8))).node
    assert tree.evict(2 * page_size).tolist() == [6, 7]
    assert not leaf.in_tree
    assert leaf.page_ids.tolist() == [6, 7]
    assert leaf.token_ids.tolist() == np.frombuffer(leaf.edge, np.int32).tolist() == ids[6 * page_size :].tolist()
    assert tree.peek(ids) == 6 * page_size
