"""`LeafQueue`: whatever happens to the leaves, they come out in the order that sorting them anew would give."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radixkv.cache.eviction.policies import LRUPolicy
from radixkv.cache.eviction.policy import EvictionPolicy
from radixkv.cache.tree.leaf_queue import SLACK, SWEEP, LeafQueue
from radixkv.cache.tree.node import TreeNode
from strategies import FakeClock


class ByState(EvictionPolicy):
    """Ranks nodes by their state, whatever it is; counts how often it is asked."""

    name = "by state"

    def __init__(self) -> None:
        self.times_asked = 0

    def rank(self, node: TreeNode) -> Any:
        self.times_asked += 1
        return node.state


class InGroups(ByState):
    """Groups by the end of the node; groups take turns by an urgency that changes without anybody being told."""

    name = "in groups"

    def __init__(self, urgencies: dict[int, int]) -> None:
        super().__init__()
        self.urgencies = urgencies

    def group(self, node: TreeNode) -> int:
        return node.end

    def urgency(self, node: TreeNode) -> float:
        return self.urgencies[node.end]


def leaf(state: Any, group: int = 0) -> TreeNode:
    node = TreeNode(b"", b"", group, None, 0)
    node.state = state
    return node


class Oracle:
    """A list of (leaf, when its rank was asked for, the rank then); the first to go is looked for among all."""

    def __init__(self, clock: FakeClock, urgencies: dict[int, int] | None = None) -> None:
        self.clock = clock
        self.urgencies = urgencies
        self.leaves: list[tuple[TreeNode, int, Any]] = []
        self.asked = 0

    def put(self, node: TreeNode) -> None:
        self.asked += 1
        self.remove(node)
        self.leaves.append((node, self.asked, node.state))

    def remove(self, node: TreeNode) -> None:
        self.leaves = [entry for entry in self.leaves if entry[0] is not node]

    def first(self) -> TreeNode:
        now = self.clock()

        def order(entry: tuple[TreeNode, int, Any]) -> tuple[Any, ...]:
            node, asked, rank = entry
            if node.keep_until > now:
                return (True, 0, node.keep_until, asked)
            urgency = 0 if self.urgencies is None else self.urgencies[node.end]
            return (False, urgency, rank, asked)

        return min(self.leaves, key=order)[0]


def states(queue: LeafQueue, num: int) -> list[Any]:
    return [queue.pop().state for _ in range(num)]


def test_smallest_rank_first_and_among_equals_the_first_to_come() -> None:
    queue = LeafQueue(ByState(), FakeClock())
    for state in [(3, "a"), (1, "b"), (2, "c"), (1, "a"), (3, "a")]:
        queue.add(leaf(state))
    assert len(queue) == 5
    assert [node.state for node in queue] == [(1, "a"), (1, "b"), (2, "c"), (3, "a"), (3, "a")]
    assert states(queue, 5) == [(1, "a"), (1, "b"), (2, "c"), (3, "a"), (3, "a")]
    equals = [leaf(7) for _ in range(5)]
    for node in equals:
        queue.add(node)
    queue.update(equals[1])
    queue.remove(equals[3])
    queue.add(equals[3])
    assert [equals.index(queue.pop()) for _ in range(5)] == [0, 2, 4, 1, 3]
    assert len(queue) == 0
    assert list(queue) == []


def test_what_left_the_queue_has_no_entry() -> None:
    queue = LeafQueue(ByState(), FakeClock())
    nodes = [leaf(number) for number in range(3)]
    for node in nodes:
        queue.add(node)
        assert node.entry is not None
    queue.remove(nodes[0])
    assert queue.pop() is nodes[1]
    assert [node.entry is None for node in nodes] == [True, True, False]
    with pytest.raises(AssertionError):
        queue.add(nodes[2])
    with pytest.raises(AssertionError):
        queue.remove(nodes[0])
    queue.pop()
    with pytest.raises(AssertionError, match="the queue is empty"):
        queue.pop()


operations = st.lists(
    st.tuples(st.sampled_from(["add", "add", "update", "remove", "pop", "wait"]), st.integers(0, 9), st.integers(0, 5)),
    max_size=60,
)


def drive(
    queue: LeafQueue,
    oracle: Oracle,
    clock: FakeClock,
    steps: list[tuple[str, int, int]],
    change: Callable[[TreeNode, int], None],
    new_leaf: Callable[[int, int], TreeNode] = lambda number, choice: leaf(number, group=choice % 3),
) -> None:
    """Do `steps` with both; `change` is what an update does to a node before the queue is told."""
    nodes: list[TreeNode] = []
    for verb, choice, number in steps:
        if verb == "add":
            nodes.append(new_leaf(number, choice))
            queue.add(nodes[-1])
            oracle.put(nodes[-1])
        elif verb == "wait":
            clock.now_s += number
        elif nodes and verb == "pop":
            expected = oracle.first()
            assert queue.pop() is expected
            oracle.remove(expected)
            nodes.remove(expected)
        elif nodes:
            node = nodes[choice % len(nodes)]
            if verb == "update":
                change(node, number)
                queue.update(node)
                oracle.put(node)
            else:
                queue.remove(node)
                oracle.remove(node)
                nodes.remove(node)
        assert len(queue) == len(nodes)
        assert {id(node) for node in queue} == set(map(id, nodes))
    while nodes:
        expected = oracle.first()
        assert queue.pop() is expected
        oracle.remove(expected)
        nodes.remove(expected)


FIXED = settings(derandomize=True, database=None, deadline=None, max_examples=60)


@FIXED
@given(operations)
def test_any_ranks_in_any_order(steps: list[tuple[str, int, int]]) -> None:
    clock = FakeClock()

    def change(node: TreeNode, number: int) -> None:
        node.state = number

    drive(LeafQueue(ByState(), clock), Oracle(clock), clock, steps, change)


@FIXED
@given(operations, st.permutations(range(3)))
def test_groups_take_turns(steps: list[tuple[str, int, int]], order: list[int]) -> None:
    clock, urgencies = FakeClock(), dict(enumerate(order))

    def change(node: TreeNode, number: int) -> None:
        node.state = number
        node.end = number % 3  # it may change sides
        urgencies.update({group: (urgency + 1) % 3 for group, urgency in urgencies.items()})

    drive(LeafQueue(InGroups(urgencies), clock), Oracle(clock, urgencies), clock, steps, change)


@FIXED
@given(operations)
def test_what_is_used_under_lru_goes_to_the_end(steps: list[tuple[str, int, int]]) -> None:
    queue = LeafQueue(LRUPolicy(), FakeClock())
    nodes: list[TreeNode] = []
    for tick, (verb, choice, number) in enumerate(steps):
        if verb == "add":
            nodes.append(leaf(None))
            nodes[-1].last_access = tick - number  # it may have become a leaf long after its last use
            queue.add(nodes[-1])
        elif nodes and verb == "update":
            used = nodes[choice % len(nodes)]
            used.last_access = tick
            queue.use(used)
        elif nodes and verb == "remove":
            queue.remove(nodes.pop(choice % len(nodes)))
        elif nodes and verb == "pop":
            popped = queue.pop()
            assert popped.last_access == min(node.last_access for node in nodes)
            nodes.remove(popped)
        assert [node.last_access for node in queue] == sorted(node.last_access for node in nodes)


class BothEnds(EvictionPolicy):
    """The oldest or the youngest of each group goes, whichever is worth less; worths have nothing to do with age."""

    name = "both ends"
    both_ends = True

    def rank(self, node: TreeNode) -> int:
        return node.last_access

    def group(self, node: TreeNode) -> int:
        return node.end

    def urgency(self, node: TreeNode) -> float:
        return node.state


@FIXED
@given(operations, st.permutations(range(200)))
def test_both_ends_of_each_group(steps: list[tuple[str, int, int]], worths: list[int]) -> None:
    queue = LeafQueue(BothEnds(), FakeClock())
    nodes: list[TreeNode] = []
    for tick, (verb, choice, number) in enumerate(steps):
        if verb == "add":
            nodes.append(leaf(worths.pop(), group=number % 3))
            nodes[-1].last_access = tick
            queue.add(nodes[-1])
        elif nodes and verb == "update":
            used = nodes[choice % len(nodes)]
            used.last_access, used.end = tick, number % 3
            queue.use(used)
        elif nodes and verb == "remove":
            queue.remove(nodes.pop(choice % len(nodes)))
        elif nodes and verb == "pop":
            groups = [[node for node in nodes if node.end == group] for group in range(3)]
            ends = [end(group, key=lambda node: node.last_access) for group in groups if group for end in (min, max)]
            popped = queue.pop()
            assert popped is min(ends, key=lambda node: node.state)
            assert popped.entry is None
            nodes.remove(popped)
        assert len(queue) == len(nodes)
        assert {id(node) for node in queue} == set(map(id, nodes))


def test_leaves_of_the_same_use_never_tie() -> None:
    """An insert may make two leaves, of a whole page and of less, and touch a third one."""
    queue = LeafQueue(LRUPolicy(), FakeClock())
    nodes = [leaf(None) for _ in range(8)]
    for node in nodes[:2]:
        queue.add_used(node)
    nodes[2].last_access = 9
    queue.add_used(nodes[2])
    for node in nodes[3:]:
        queue.add(node)  # out of order
    for node in nodes[:2]:
        queue.use(node)
    assert [node.last_access for node in queue] == [0] * 7 + [9]
    assert {id(queue.pop()) for _ in range(8)} == {id(node) for node in nodes}


# -- keep_until ------------------------------------------------------------------------------------------------------


def kept(state: int, until: float) -> TreeNode:
    node = leaf(state)
    node.keep_until = until
    return node


def test_kept_leaves_go_last_and_those_that_expire_first_in_front() -> None:
    queue = LeafQueue(ByState(), FakeClock())
    for node in [kept(1, 9), kept(2, 5), leaf(8), kept(3, 7), leaf(9)]:
        queue.add(node)
    assert states(queue, 5) == [8, 9, 2, 3, 1], "and they can go when nothing else is left"


def test_once_expired_a_leaf_is_like_any_other() -> None:
    clock = FakeClock()
    queue = LeafQueue(ByState(), clock)
    for node in [kept(1, 5), kept(4, 5.5), kept(2, 6), leaf(3)]:
        queue.add(node)
    clock.now_s = 5.5  # the moment itself is past it
    assert states(queue, 4) == [1, 3, 4, 2]


def test_keeping_longer_moves_a_leaf_that_is_queued() -> None:
    clock = FakeClock()
    queue = LeafQueue(ByState(), clock)
    nodes = [leaf(1), kept(2, 3), kept(3, 4)]
    for node in nodes:
        queue.add(node)
    nodes[0].keep_until, nodes[1].keep_until = 9, 8
    queue.update(nodes[0])
    queue.update(nodes[1])
    clock.now_s = 4
    assert states(queue, 3) == [3, 2, 1]


@FIXED
@given(operations)
def test_keeping_amid_everything_else(steps: list[tuple[str, int, int]]) -> None:
    """No two ranks are equal, and no two leaves expire together: what expires may be asked for its rank again."""
    clock, serials = FakeClock(), count(1)

    def keep(node: TreeNode, seconds: int) -> None:
        node.keep_until = max(node.keep_until, clock.now_s + seconds + next(serials) / 1e6)

    def new_leaf(number: int, choice: int) -> TreeNode:
        node = leaf((number, next(serials)))
        if choice % 2:
            keep(node, choice)
        return node

    def change(node: TreeNode, number: int) -> None:
        node.state = (number, next(serials))
        if number % 3 == 0:
            keep(node, number)

    drive(LeafQueue(ByState(), clock), Oracle(clock), clock, steps, change, new_leaf)


# -- cost ------------------------------------------------------------------------------------------------------------


def test_stale_entries_stay_in_proportion_to_the_leaves() -> None:
    queue = LeafQueue(ByState(), FakeClock())
    nodes = [leaf(0) for _ in range(100)]
    for node in nodes:
        queue.add(node)
    for number in range(10_000):
        node = nodes[number * 37 % 100]
        node.state = number * 7919 % 1000
        queue.update(node)
        assert queue.num_entries <= 2 * len(queue) + SLACK + 1
    for node in nodes[10:]:
        queue.remove(node)
    for _ in range(2 * len(nodes) // SWEEP):  # each sweeps a few of the entries that are stale now
        queue.update(nodes[0])
    assert queue.num_entries <= 2 * len(queue) + SLACK + 1
    assert states(queue, 10) == sorted(node.state for node in nodes[:10])


def test_nothing_ranks_all_the_leaves_again() -> None:
    rng = random.Random(1)
    ranker = ByState()
    queue = LeafQueue(ranker, FakeClock())
    nodes = [leaf(rng.random()) for _ in range(10_000)]
    for node in nodes:
        queue.add(node)
    asked = ranker.times_asked
    for _ in range(1_000):
        queue.pop()
    assert ranker.times_asked <= asked + 1_000
    for node in [node for node in nodes if node.entry is not None][:1_000]:
        node.state += 1
        queue.update(node)
    assert ranker.times_asked <= asked + 2_000
