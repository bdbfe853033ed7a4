"""Policies that fail in any of their methods: the caller is told, and tree, queue, allocator and leases stay right."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
import pytest

from event_mirror import EventMirror, held_by
from radixkv import CacheQuota, EvictionPolicy, PrefixCache, RadixTree
from radixkv.cache.eviction.policies import POLICIES
from radixkv.cache.tree.node import Namespace, TreeNode
from radixkv.errors import InvalidRequestError, OutOfPagesError, PolicyError
from strategies import NAMESPACES, FakeClock, dump, spell
from stress_cases import some_of

HOOKS = ("requested", "matched", "added", "evicted", "split", "merged", "rank", "group", "urgency")
BASES = ("lru", "lfu", "slru", "cost", "adaptive")
SOME_BASES = pytest.mark.parametrize(
    "base", some_of(BASES, {"lru", "cost", "adaptive"})
)  # which are written differently

Where = dict[int, tuple[Namespace, tuple[int, ...]]]
"""For each cached page its namespace and all tokens up to its end."""


class FaultError(Exception):
    """What the policies here raise."""


def failing(base: str, fails: Callable[[int], bool]) -> EvictionPolicy:
    """The policy `base` that raises `FaultError` in its n-th call if `fails(n)`: before or after it does its work."""
    kind = POLICIES[base]
    calls = [0]

    def faulty(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(*arguments: Any) -> Any:
            calls[0] += 1
            is_bad = fails(calls[0])
            if is_bad and calls[0] % 2:
                raise FaultError(f"call {calls[0]}, before")
            result = method(*arguments)
            if is_bad:
                raise FaultError(f"call {calls[0]}, after")
            return result

        return call

    groups = kind.group is not EvictionPolicy.group
    names = [name for name in HOOKS if groups or name not in ("group", "urgency")]
    policy = kind()
    methods: dict[str, Any] = {name: faulty(getattr(policy, name)) for name in names}
    methods = {name: (lambda method: lambda _, *arguments: method(*arguments))(call) for name, call in methods.items()}
    policy.__class__ = type("Failing", (kind,), {**methods, "ranks_by_last_access": False})
    return policy


def where(tree: RadixTree) -> Where:
    """What `tree` holds."""
    size = tree.page_size
    return {
        page: (namespace, tokens[: state.first + (i + 1) * size])
        for (namespace, tokens), state in dump(tree).items()
        for i, page in enumerate(state.pages)
    }


class TreeWalk:
    """Random verbs on a tree, and a dictionary of what it must hold."""

    def __init__(self, policy: EvictionPolicy, page_size: int, seed: int) -> None:
        self.rng = random.Random(seed)
        self.clock = FakeClock()
        self.tree = RadixTree(page_size, policy, clock=self.clock)
        self.mirror = EventMirror()
        self.tree.add_observer(self.mirror)
        self.held: Where = {}
        self.pages_given = 0
        self.seen: list[TreeNode] = []
        self.locked: list[TreeNode] = []
        self.failures = 0

    def tokens(self) -> list[int]:
        word = "".join(self.rng.choices("acb", k=self.rng.randint(1, 5)))
        return spell(word, self.tree.page_size, self.rng.randint(0, 2))

    def step(self) -> None:
        verb = self.rng.choice([self.match, self.insert, self.insert, self.lock, self.unlock, self.evict, self.other])
        self.clock.now_s += self.rng.choice([0, 0, 1, 3])
        try:
            verb()
        except PolicyError as error:
            self.failures += 1
            self.forget(error.freed)
        except InvalidRequestError:
            pass
        self.tree.check_invariants()
        assert where(self.tree) == self.held
        if verb not in (self.match, self.lock, self.unlock):
            assert self.mirror.held() == held_by(self.tree)

    def forget(self, freed: Any) -> None:
        for page in np.asarray(freed).tolist():
            del self.held[page]

    def match(self) -> None:
        tokens, namespace = self.tokens(), self.rng.choice(NAMESPACES)
        found = self.tree.match_prefix(tokens, extra_key=namespace[0], cache_salt=namespace[1])
        expected = {held for space, held in self.held.values() if space == namespace}
        size = self.tree.page_size
        longest = 0
        while longest + size <= len(tokens) and tuple(tokens[: longest + size]) in expected:
            longest += size
        assert found.length == longest
        self.seen.append(found.node)

    def insert(self) -> None:
        tokens, namespace = self.tokens(), self.rng.choice(NAMESPACES)
        size = self.tree.page_size
        pages = list(range(self.pages_given, self.pages_given + len(tokens) // size))
        self.pages_given += len(pages)
        result = self.tree.insert(tokens, pages, extra_key=namespace[0], cache_salt=namespace[1])
        self.seen.append(result.node)
        for i in range(result.prefix_len // size, len(pages)):
            self.held[pages[i]] = (namespace, tuple(tokens[: (i + 1) * size]))

    def lock(self) -> None:
        if self.seen:
            node = self.rng.choice(self.seen)
            self.tree.inc_lock_ref(node)
            self.locked.append(node)

    def unlock(self) -> None:
        if self.locked:
            self.tree.dec_lock_ref(self.locked.pop(self.rng.randrange(len(self.locked))))

    def evict(self) -> None:
        self.forget(self.tree.evict(self.rng.randint(1, 3) * self.tree.page_size))

    def other(self) -> None:
        if not self.seen:
            return
        node = self.rng.choice(self.seen)
        verb = self.rng.randrange(4)
        if verb == 0:
            self.forget(self.tree.remove(node))
        elif verb == 1:
            self.tree.retain(node, priority=1, keep_for_s=self.rng.choice([1, 4]))
        elif verb == 2 and node.in_tree and not node.is_root:
            self.tree.touch(node)
        elif self.rng.random() < 0.3:
            self.forget(self.tree.clear())

    def finish(self) -> None:
        """All can be given back, however often the policy fails."""
        while self.locked:
            try:
                self.unlock()
            except PolicyError:
                self.failures += 1
        try:
            self.forget(self.tree.clear())
        except PolicyError as error:
            self.forget(error.freed)
        self.tree.check_invariants()
        assert self.held == {}
        assert self.mirror.held() == []
        assert list(self.tree.nodes()) == []


@SOME_BASES
def test_a_tree_stays_right_whichever_call_of_its_policy_fails(base: str) -> None:
    calls = [0]

    def count(number: int) -> bool:
        calls[0] = number
        return False

    walk = TreeWalk(failing(base, count), 2, seed=3)
    for _ in range(30):
        walk.step()
    walk.finish()
    assert walk.failures == 0
    assert calls[0] > 30
    for bad in range(1, calls[0] + 1):
        walk = TreeWalk(failing(base, lambda number, bad=bad: number == bad), 2, seed=3)
        for _ in range(30):
            walk.step()
        walk.finish()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("every", [1, 2, 3, 7])
def test_a_tree_stays_right_while_its_policy_goes_on_failing(base: str, every: int) -> None:
    for seed in range(2):
        walk = TreeWalk(failing(base, lambda number: number % every == 0), 2, seed)
        for _ in range(40):
            walk.step()
        walk.finish()
        assert walk.failures


class CacheWalk:
    """Random requests on a cache whose KV is simulated: each slot holds a value that depends on all tokens before."""

    def __init__(self, policy: EvictionPolicy, seed: int) -> None:
        self.rng = random.Random(seed)
        self.cache = PrefixCache(8, 3, policy, copy_page=self.copy, clock=FakeClock())
        self.mirror = EventMirror()
        self.cache.add_observer(self.mirror)
        self.kv = np.full((8, 3), -1)
        self.running: list[tuple[Any, list[int]]] = []
        self.failures = 0

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        self.kv[target, :num_tokens] = self.kv[source, :num_tokens]

    def step(self) -> None:
        verb = self.rng.choice([self.start, self.start, self.go_on, self.release, self.release, self.reset])
        try:
            verb()
        except PolicyError:
            self.failures += 1
        except OutOfPagesError:
            pass
        self.check()

    def start(self, name: str | None = None) -> None:
        word = "".join(self.rng.choices("acb", k=self.rng.randint(1, 4)))
        tokens = spell(word, 3, self.rng.randint(0, 2))
        lease = self.cache.acquire(tokens, extra_key=name, keep_for_s=self.rng.choice([None, None, 9]))
        self.running.append((lease, tokens))
        self.compute(lease, tokens)

    def go_on(self) -> None:
        if self.running:
            place = self.rng.randrange(len(self.running))
            lease, tokens = self.running[place]
            lease.commit(tokens)
            longer = [*tokens, *spell(self.rng.choice("ab"), 3)[: self.rng.randint(1, 3)]]
            lease.grow(len(longer))
            self.running[place] = lease, longer
            self.compute(lease, longer)

    def compute(self, lease: Any, tokens: list[int]) -> None:
        for i in range(lease.cached_tokens, len(tokens)):
            page, slot = divmod(i, 3)
            if i >= lease.committed_tokens:
                self.kv[lease.pages[page], slot] = value_of(lease.namespace, tokens[: i + 1])

    def release(self) -> None:
        if self.running:
            self.running.pop(self.rng.randrange(len(self.running)))[0].release()

    def reset(self) -> None:
        if self.rng.random() < 0.2:
            self.cache.reset()

    def check(self) -> None:
        self.cache.check_invariants()
        assert self.mirror.held() == held_by(self.cache.tree)
        for (namespace, tokens), state in dump(self.cache.tree).items():
            for i in range(state.first, len(tokens)):
                page, slot = divmod(i - state.first, 3)
                assert self.kv[state.pages[page], slot] == value_of(namespace, tokens[: i + 1])
        for lease, tokens in self.running:
            for i in range(len(tokens)):
                assert self.kv[lease.pages[i // 3], i % 3] == value_of(lease.namespace, tokens[: i + 1])

    def finish(self) -> None:
        for lease, _ in self.running:
            try:
                lease.release()
            except PolicyError:
                self.failures += 1
            assert lease.closed
        self.running.clear()
        try:
            self.cache.reset()
        except PolicyError:
            self.failures += 1
        self.check()
        assert self.cache.stats().free_pages == 8


class QuotaWalk(CacheWalk):
    """Random requests of several namespaces, to which shares of the pool are guaranteed, others now and then."""

    def __init__(self, policy: EvictionPolicy, seed: int) -> None:
        super().__init__(policy, seed)
        self.cache.set_quotas({"anna": CacheQuota(pool_tokens=6), "berta": CacheQuota(pool_tokens=3)})

    def start(self, name: str | None = None) -> None:
        super().start(self.rng.choice(["anna", "berta", "flood"]))

    def reset(self) -> None:
        pages = self.rng.choice([None, 0, 3])
        self.cache.set_quotas({} if pages is None else {"anna": CacheQuota(pool_tokens=3 * pages)})
        super().reset()


def value_of(namespace: Namespace, tokens: Any) -> int:
    return hash((namespace.extra_key, tuple(tokens))) % 2**31


@pytest.mark.parametrize(("kind", "seed"), [(CacheWalk, 1), (QuotaWalk, 3)])
@SOME_BASES
def test_no_page_of_a_cache_is_lost_whichever_call_of_its_policy_fails(
    base: str, kind: type[CacheWalk], seed: int
) -> None:
    calls = [0]

    def count(number: int) -> bool:
        calls[0] = number
        return False

    walk = kind(failing(base, count), seed)
    for _ in range(30):
        walk.step()
    walk.finish()
    for bad in range(1, calls[0] + 1):
        walk = kind(failing(base, lambda number, bad=bad: number == bad), seed)
        for _ in range(30):
            walk.step()
        walk.finish()
        assert walk.failures


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("every", [1, 2, 5])
@pytest.mark.parametrize("kind", [CacheWalk, QuotaWalk])
def test_no_page_of_a_cache_is_lost_while_its_policy_goes_on_failing(
    base: str, every: int, kind: type[CacheWalk]
) -> None:
    for seed in range(2):
        walk = kind(failing(base, lambda number: number % every == 0), seed)
        for _ in range(40):
            walk.step()
        walk.finish()


class Mixed(EvictionPolicy):
    """Ranks that do not compare with each other."""

    name = "mixed"

    def rank(self, node: TreeNode) -> Any:
        return str(node.created) if node.created % 3 else -node.created


def test_ranks_that_do_not_compare_lose_nothing() -> None:
    for seed in range(5):
        walk = TreeWalk(Mixed(), 1, seed)
        for _ in range(40):
            walk.step()
        walk.finish()
        assert walk.failures


def test_the_error_names_the_policy_and_has_what_it_raised_as_its_cause() -> None:
    tree = RadixTree(policy=failing("lru", lambda number: True))
    with pytest.raises(PolicyError, match="the eviction policy 'lru' failed: FaultError: call 1") as caught:
        tree.insert([1], [0])
    assert isinstance(caught.value.__cause__, FaultError)
    assert len(caught.value.freed) == 0


def test_a_leaf_that_could_not_be_ranked_goes_first_unless_it_is_used_again() -> None:
    bad: set[str] = set()

    class Picky(EvictionPolicy):
        name = "picky"

        def rank(self, node: TreeNode) -> int:
            if bad:
                raise FaultError
            return node.last_access

    tree = RadixTree(policy=Picky())
    nodes = [tree.insert([i], [i]).node for i in range(4)]
    bad.add("all")
    for node in nodes[2:]:
        with pytest.raises(PolicyError):
            tree.match_prefix(node.token_ids)
    bad.clear()
    tree.match_prefix(nodes[2].token_ids)
    assert [tree.evict(1).tolist() for _ in range(4)] == [[3], [0], [1], [2]]
