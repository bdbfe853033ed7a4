"""The policies that come with radixkv, and what a policy of one's own is told and asked.

Words stand for sequences: each letter is one page of tokens, and a page is called by the word that ends with it.
The machines in `test_cache_machine.py` compare every policy's order with ranks over plain records.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from radixkv import EngineConfig, EvictionPolicy, PrefixCache, RadixTree, TreeNode
from radixkv.cache.eviction.policies import POLICIES, CostAwarePolicy, LRUPolicy, SLRUPolicy, TTLPolicy, resolve_policy
from radixkv.cache.eviction.policy import hook
from radixkv.cache.tree.node import Namespace
from radixkv.errors import ConfigError, InvalidRequestError, PolicyError
from strategies import RANKS, FakeClock, WordTree, share, spell

page_sizes = pytest.mark.parametrize("page_size", [1, 4])


def words_tree(policy: Any, words: str, page_size: int = 4, clock: FakeClock | None = None) -> WordTree:
    """A tree that holds a word of one page for each letter, inserted in this order."""
    tree = WordTree(page_size, policy, clock)
    for word in words:
        tree.insert(word)
    return tree


def order(tree: WordTree) -> list[str]:
    """The names of all pages in the order in which they are evicted, one leaf at a time."""
    return [name for _ in range(tree.tree.num_pages) for name in tree.evict(1)]


# -- which there are -------------------------------------------------------------------------------------------------


def test_every_policy_has_a_dull_oracle() -> None:
    assert set(RANKS) == set(POLICIES)


@pytest.mark.parametrize("name", POLICIES)
def test_policies_go_by_their_names(name: str) -> None:
    policy = resolve_policy(name)
    assert policy.name == name
    assert resolve_policy(name) is not policy, "one object serves one tree"
    tree = RadixTree(4, name)
    assert tree.policy.tree is tree
    assert PrefixCache(8, 4, name).config.policy == name
    assert EngineConfig(eviction_policy=name).eviction_policy == name


@pytest.mark.parametrize("policy", [LRUPolicy, None, 7, object()], ids=["class", "None", "number", "object"])
def test_what_is_no_policy(policy: Any) -> None:
    with pytest.raises(ConfigError, match="policy must be a name or an EvictionPolicy, not"):
        RadixTree(policy=policy)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TTLPolicy(-1), "ttl_s must be a number of seconds of at least 0, not -1"),
        (lambda: TTLPolicy(float("nan")), "ttl_s must be a number of seconds of at least 0, not nan"),
        (lambda: CostAwarePolicy(0), "d0 must be a positive number of tokens, not 0"),
        (lambda: CostAwarePolicy(float("nan")), "d0 must be a positive number of tokens, not nan"),
        (lambda: SLRUPolicy(1.5), r"protected_share must lie in \[0, 1\], not 1.5"),
        (lambda: SLRUPolicy(-0.1), r"protected_share must lie in \[0, 1\], not -0.1"),
    ],
)
def test_settings_of_policies_are_checked(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


# -- one by one ------------------------------------------------------------------------------------------------------


@page_sizes
def test_fifo_ignores_uses(page_size: int) -> None:
    tree = words_tree("fifo", "abc", page_size)
    tree.match("a")
    tree.insert("a")
    found = tree.lock("b")
    tree.unlock(found)
    assert order(tree) == ["a", "b", "c"]


@page_sizes
def test_fifo_goes_by_what_came_last_in_a_path(page_size: int) -> None:
    tree = words_tree("fifo", "ab", page_size)
    tree.insert("ax")
    assert order(tree) == ["b", "ax", "a"], "a parent goes right after its last child: it came before"


@page_sizes
def test_lfu_counts_matches_since_the_insert(page_size: int) -> None:
    tree = words_tree("lfu", "abcd", page_size)
    for word in "aabbbd":
        tree.match(word)
    assert order(tree) == ["c", "d", "a", "b"]
    for word in "ab":
        tree.insert(word)
    tree.match("a")
    assert order(tree) == ["b", "a"], "what came back starts anew"


@page_sizes
def test_lfu_among_equals_is_lru(page_size: int) -> None:
    tree = words_tree("lfu", "abc", page_size)
    for word in "acbabc":
        tree.match(word)
    tree.insert("a")  # no match, but a use
    assert order(tree) == ["b", "c", "a"]


@page_sizes
def test_lfu_counts_a_probe_for_the_whole_edge(page_size: int) -> None:
    tree = words_tree("lfu", "d", page_size)
    tree.insert("abc")
    tree.match("ab")
    tree.match("ax")
    assert order(tree) == ["d", "abc", "ab", "a"]


@page_sizes
def test_slru_lets_go_first_what_was_never_asked_for_again(page_size: int) -> None:
    tree = words_tree("slru", "abcdef", page_size)
    for word in "ab":
        tree.match(word)
    assert order(tree)[:3] == ["c", "d", "e"]


@page_sizes
def test_slru_protects_no_more_than_its_share(page_size: int) -> None:
    tree = words_tree("slru", "abcdef", page_size)
    for word in "cabd":
        tree.match(word)
    assert tree.evict(1) == ["c"], "4 of 6 are protected: the one of them that was used first goes"
    assert tree.evict(1) == ["a"], "3 of 5"
    assert tree.evict(1) == ["e"], "2 of 4 may be"
    assert tree.evict(1) == ["b"]


@page_sizes
def test_slru_counts_what_a_merge_protects(page_size: int) -> None:
    tree = WordTree(page_size, "slru")
    tree.insert("abcd")
    part = tree.insert("ab").node
    tree.tree.inc_lock_ref(part)
    tree.match("ab")  # its lower part is on probation as yet
    for word in "xyz":
        tree.insert(word)
    tree.tree.dec_lock_ref(part)
    assert "|abcd" in tree.edges()
    assert tree.evict(4) == ["a", "ab", "abc", "abcd"], "4 of 7 are protected"


@pytest.mark.parametrize(("share_", "expected"), [(1.0, ["b", "c", "a"]), (0.0, ["a", "b", "c"])])
def test_slru_with_other_shares(share_: float, expected: list[str]) -> None:
    tree = words_tree(SLRUPolicy(share_), "abc")
    tree.match("a")
    assert order(tree) == expected


@page_sizes
def test_priority_comes_before_age(page_size: int) -> None:
    tree = words_tree("priority", "abcd", page_size)
    tree.tree.retain(tree.match("a").node, priority=2)
    tree.tree.retain(tree.match("b").node, priority=1)
    tree.tree.retain(tree.match("d").node, priority=-1)
    tree.match("c")
    assert order(tree) == ["d", "c", "b", "a"], "a node keeps the highest it was given, and 0 at first"


@page_sizes
def test_priority_holds_for_the_path_but_not_for_other_branches(page_size: int) -> None:
    tree = words_tree("priority", "x", page_size)
    for word in ["sa", "sb"]:
        tree.insert(word)
    tree.tree.retain(tree.match("sa").node, priority=1)
    tree.match("sb")
    tree.match("x")
    assert order(tree) == ["sb", "x", "sa", "s"]


@page_sizes
def test_ttl_goes_by_the_time_of_the_last_match(page_size: int) -> None:
    clock = FakeClock()
    tree = WordTree(page_size, TTLPolicy(ttl_s=10), clock)
    for word, now_s in zip("abc", (0, 1, 2), strict=True):
        clock.now_s = now_s
        tree.insert(word)
    clock.now_s = 3
    tree.match("a")
    assert order(tree) == ["b", "c", "a"]


@page_sizes
def test_ttl_lets_what_was_kept_compete_when_its_time_is_over(page_size: int) -> None:
    clock = FakeClock()
    tree = words_tree(TTLPolicy(ttl_s=10), "ab", page_size, clock)
    tree.tree.retain(tree.match("a").node, keep_for_s=14)  # as if it had been used at 4
    for word, now_s in zip("cd", (3, 5), strict=True):
        clock.now_s = now_s
        tree.insert(word)
    clock.now_s = 14
    assert order(tree) == ["b", "c", "a", "d"]


def edge_cost(first: int, end: int, d0: float) -> float:
    """What computing tokens [first, end) costs, token by token, in units of the products with the weights."""
    return sum(1 + depth / d0 for depth in range(first, end))


@pytest.mark.parametrize("d0", [10.0, 100.0])
def test_cost_is_that_of_computing_the_edge_for_each_of_its_tokens(d0: float) -> None:
    tree = RadixTree(page_size=1, policy=CostAwarePolicy(d0))
    deep = tree.insert(range(200), range(200)).node
    shallow = tree.insert([7, 8, 9], [200, 201, 202]).node
    for node, first in ((deep, 0), (shallow, 0)):
        rank, _ = tree.policy.rank(node)
        assert rank * node.num_tokens == pytest.approx(edge_cost(first, node.end, d0), abs=node.num_tokens / d0)
    lower = tree.insert([*range(150), 999], range(151)).node
    rank, _ = tree.policy.rank(lower)
    assert rank == pytest.approx(edge_cost(150, 151, d0), abs=1 / d0)


@page_sizes
def test_cost_keeps_what_lies_deep(page_size: int) -> None:
    tree = WordTree(page_size, CostAwarePolicy(d0=page_size))
    tree.insert("abcdefgh")
    tree.insert("abcdefgx")
    tree.insert("y")
    assert tree.evict(1) == ["y"], "the youngest, but cheap to compute again"
    assert tree.evict(1) == ["abcdefgh"]


@page_sizes
def test_cost_counts_uses(page_size: int) -> None:
    tree = words_tree("cost", "abc", page_size)
    for word in "aab":
        tree.match(word)
    assert order(tree) == ["c", "b", "a"]


def test_cost_forgets_old_merits() -> None:
    tree = words_tree(CostAwarePolicy(d0=1e9), "a")
    for _ in range(4):
        tree.match("a")  # worth 5
    gone = []
    for word in "bcdefg":
        tree.insert(word)
        tree.match(word)  # worth 2, and the worth of what was evicted last
        gone += tree.evict(1)
    assert gone == ["b", "c", "a", "d", "e", "f"]


# -- one's own -------------------------------------------------------------------------------------------------------


class Spy(EvictionPolicy):
    """Notes what it is told, nodes by the letters they hold."""

    name = "spy"

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []

    def rank(self, node: TreeNode) -> int:
        return node.last_access

    def requested(self, tokens: NDArray[np.int32], matched_tokens: int, namespace: Namespace) -> None:
        self.told.append(("requested", len(tokens), matched_tokens, namespace))

    def matched(self, node: TreeNode) -> None:
        self.told.append(("matched", letters(node), node.last_access))

    def added(self, node: TreeNode) -> None:
        assert node.parent is not None
        self.told.append(("added", letters(node)))

    def evicted(self, node: TreeNode) -> None:
        assert node.parent is not None
        self.told.append(("evicted", letters(node)))

    def split(self, upper: TreeNode, lower: TreeNode) -> None:
        assert lower.parent is upper
        self.told.append(("split", letters(upper), letters(lower)))

    def merged(self, upper: TreeNode, lower: TreeNode) -> None:
        assert lower.parent is upper
        self.told.append(("merged", letters(upper), letters(lower)))


def letters(node: TreeNode) -> str:
    """What the pages of a node are called, at page size 2."""
    return "".join(map(chr, node.token_ids[1::2]))


def test_what_a_policy_is_told() -> None:
    spy = Spy()
    tree = WordTree(2, spy)

    def told(call: Any) -> list[tuple[object, ...]]:
        spy.told.clear()
        call()
        return list(spy.told)

    assert told(lambda: tree.insert("abc")) == [("added", "abc")]
    assert told(lambda: tree.insert("abcd", extra_key="x")) == [("added", "abcd")]
    assert told(lambda: tree.match("ab")) == [
        ("requested", 4, 4, (None, None)),
        ("matched", "abc", 1),
        ("split", "ab", "c"),
    ]
    assert told(lambda: tree.match("z")) == [("merged", "ab", "c"), ("requested", 2, 0, (None, None))]
    assert told(lambda: tree.insert("abd")) == [("split", "ab", "c"), ("added", "d")]
    assert told(lambda: tree.match("abd")) == [
        ("requested", 6, 6, (None, None)),
        ("matched", "d", 5),
        ("matched", "ab", 5),
    ], "the deepest first, and before they count as used"
    assert told(lambda: tree.match("abx", extra_key="x")) == [
        ("requested", 6, 4, ("x", None)),
        ("matched", "abcd", 2),
        ("split", "ab", "cd"),
    ]
    assert told(lambda: tree.tree.peek(spell("abc", 2))) == []
    assert told(lambda: tree.evict(2)) == [("evicted", "c"), ("evicted", "d")]


def test_a_page_that_was_copied_from_counts_as_matched() -> None:
    spy = Spy()
    tree = WordTree(4, spy)
    tree.insert("a")
    found = tree.match("c")  # parts in its last token
    partial = tree.tree.find_partial(found.node, spell("c", 4))
    assert partial is not None
    spy.told.clear()
    tree.tree.touch(partial.node)
    tree.tree.touch(partial.node)
    assert spy.told == [("matched", "\x01a", 1)], "once a match"


def test_hooks_that_are_not_overridden_cost_nothing() -> None:
    policy = resolve_policy("lru")
    names = ["requested", "matched", "added", "evicted", "split", "merged", "group"]
    assert [hook(policy, name) for name in names] == [None] * 7


def test_a_policy_without_a_rank() -> None:
    class Nothing(EvictionPolicy):
        name = "nothing"

    with pytest.raises(PolicyError, match="'nothing' failed: NotImplementedError"):
        RadixTree(policy=Nothing()).insert([1], [0])


class ByTenant(EvictionPolicy):
    """LRU for each tenant; the tenant who holds most gives first."""

    name = "by tenant"

    def __init__(self) -> None:
        self.tokens_held: dict[Namespace | None, int] = {}

    def rank(self, node: TreeNode) -> int:
        return node.last_access

    def group(self, node: TreeNode) -> Namespace | None:
        return node.root.namespace

    def urgency(self, node: TreeNode) -> float:
        return -self.tokens_held[node.root.namespace]

    def added(self, node: TreeNode) -> None:
        tenant = node.root.namespace
        self.tokens_held[tenant] = self.tokens_held.get(tenant, 0) + node.num_tokens

    def evicted(self, node: TreeNode) -> None:
        self.tokens_held[node.root.namespace] -= node.num_tokens


@page_sizes
def test_groups_of_ones_own(page_size: int) -> None:
    tree = WordTree(page_size, ByTenant())
    for word in "abcd":
        tree.insert(word, extra_key="large")
    for word in "wxy":
        tree.insert(word, extra_key="small")
    tree.match("a", extra_key="large")
    assert tree.evict(1) == ["b"]
    assert sorted(tree.evict(2)) == ["c", "w"], "3 each: they give by turns"
    assert sorted(tree.evict(2)) == ["d", "x"]
    assert sorted(tree.evict(2)) == ["a", "y"]


@pytest.mark.parametrize("policy", POLICIES)
def test_states_survive_cuts_and_merges(policy: str) -> None:
    """Whatever a policy keeps of a node, probing it up and down changes nothing of the order."""
    probed, plain = (words_tree(policy, "xy", 4) for _ in range(2))
    for tree in (probed, plain):
        tree.insert("abcd")
        tree.insert("z")
    for end in (1, 3, 2, 3, 1):
        tree_, word = probed, "abcd"[:end]
        tree_.match(word)
        plain.match("abcd")
    for tree in (probed, plain):
        tree.match("y")
    assert probed.edges() == plain.edges()
    assert order(probed) == order(plain)


# -- keep_for_s and priority, through leases -------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_kept_leaves_go_last_soonest_expiry_first_and_never_block(policy: str) -> None:
    cache = PrefixCache(8, 4, policy, clock=FakeClock())
    left = {"a": 30, "b": 10, "c": None, "d": 20, "e": 0}
    for word, keep_for_s in left.items():
        with cache.acquire(spell(word, 4), keep_for_s=keep_for_s) as lease:
            lease.commit(spell(word, 4))
    gone: list[str] = []
    for num_pages in (4, 5, 6, 7, 8):  # 3 are free
        with cache.acquire(range(4 * num_pages)) as lease:
            assert len(lease.pages) == num_pages, "what is kept blocks nobody"
        gone += [word for word in left if word not in gone and not cache.peek(spell(word, 4))]
        cache.check_invariants()
    assert sorted(gone[:2]) == ["c", "e"]
    assert gone[2:] == ["b", "d", "a"]


def test_keeping_counts_from_the_last_commit() -> None:
    clock = FakeClock()
    cache = PrefixCache(8, 4, clock=clock)
    with cache.acquire(spell("ab", 4), keep_for_s=10) as lease:
        lease.commit(spell("a", 4))
        clock.now_s = 5
        lease.commit(spell("ab", 4))
        clock.now_s = 7
    assert [node.keep_until for _, node in cache.tree.nodes()] == [0, 15, 15]
    with cache.acquire(spell("ab", 4), keep_for_s=3) as lease:
        lease.commit(spell("ab", 4))
    assert [node.keep_until for _, node in cache.tree.nodes()] == [0, 15, 15], "the latest end counts"


def test_what_is_kept_and_pinned_is_kept_once_it_is_unpinned() -> None:
    clock = FakeClock()
    cache = PrefixCache(4, 4, clock=clock)
    with cache.acquire(spell("a", 4), keep_for_s=10) as lease:
        lease.commit(spell("a", 4))
        share(cache, "b")
    share(cache, "c")
    share(cache, "de")
    assert (cache.peek(spell("a", 4)), cache.peek(spell("b", 4))) == (4, 0)
    clock.now_s = 10
    share(cache, "f")
    assert cache.peek(spell("a", 4)) == 0


def test_priority_of_requests() -> None:
    cache = PrefixCache(4, 4, "priority")
    for word, priority in [("a", 2), ("b", 0), ("c", 1), ("d", 0)]:
        with cache.acquire(spell(word, 4), priority=priority) as lease:
            lease.commit(spell(word, 4))
    gone: list[str] = []
    for num_pages in (1, 2, 3, 4):
        cache.acquire(range(4 * num_pages)).release()
        gone += [word for word in "abcd" if word not in gone and not cache.peek(spell(word, 4))]
    assert gone == ["b", "d", "c", "a"]


@pytest.mark.parametrize(
    ("keep_for_s", "message"),
    [
        (-1, "must be a number of seconds of at least 0, not -1"),
        (-0.5, "must be a number of seconds of at least 0, not -0.5"),
        (float("nan"), "must be a number of seconds of at least 0, not nan"),
        (float("inf"), "must be at most 315360000 s (ten years), not inf"),
        (10**400, "must be at most 315360000 s (ten years), not 1000"),
        pytest.param(10**5000, "s (ten years), not an integer of more than 4300 digits", id="digits"),
        (True, "must be a number of seconds of at least 0, not True"),
        ("1", "must be a number of seconds of at least 0, not '1'"),
    ],
)
def test_times_to_keep_are_checked_before_anything_is_taken(keep_for_s: object, message: str) -> None:
    cache = PrefixCache(4, 4)
    before = cache.stats()
    with pytest.raises(InvalidRequestError, match=re.escape(message)):
        cache.acquire(spell("a", 4), keep_for_s=keep_for_s)  # type: ignore[arg-type]
    assert cache.stats() == before
    tree = RadixTree(4)
    node = tree.insert(spell("a", 4), [3]).node
    with pytest.raises(InvalidRequestError, match=re.escape(message)):
        tree.retain(node, keep_for_s=keep_for_s)  # type: ignore[arg-type]
    assert node.keep_until == 0


@pytest.mark.parametrize("priority", [2**63, -(2**63) - 1, pytest.param(10**5000, id="digits"), 0.5, "1", None, True])
def test_priorities_are_checked_before_anything_is_taken(priority: object) -> None:
    cache = PrefixCache(4, 4)
    before = cache.stats()
    with pytest.raises(InvalidRequestError, match="priority must"):
        cache.acquire(spell("a", 4), priority=priority)  # type: ignore[arg-type]
    assert cache.stats() == before
    tree = RadixTree(4)
    node = tree.insert(spell("a", 4), [3]).node
    with pytest.raises(InvalidRequestError, match="priority must"):
        tree.retain(node, priority=priority)  # type: ignore[arg-type]


def test_numbers_of_numpy_are_times_and_priorities() -> None:
    cache = PrefixCache(4, 4)
    with cache.acquire(spell("a", 4), keep_for_s=np.float32(2), priority=np.int64(-3)) as lease:  # type: ignore[arg-type]
        lease.commit(spell("a", 4))
    assert lease.node.keep_until > 0
    cache.check_invariants()
