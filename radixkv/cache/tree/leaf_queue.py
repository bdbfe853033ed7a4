"""The unpinned leaves, in the order in which they are to be evicted."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from heapq import heapify, heappop, heappush
from typing import Any

from radixkv.cache.eviction.policy import EvictionPolicy, hook
from radixkv.cache.tree.node import TreeNode

Entry = tuple[Any, int, TreeNode]
"""(rank, serial, node): stands for the node as long as it is the node's `entry`; after that it is stale."""

SLACK = 64  # stale entries that are not worth a sweep


class _Run:
    """Entries of one group, the smallest first.

    Ranks mostly arrive in order (under LRU a leaf that was just used has the largest rank of all), so they are
    appended to a deque; those that do not go to a heap. The smallest is the smaller of two heads.
    """

    __slots__ = ("in_order", "out_of_order")

    def __init__(self) -> None:
        self.in_order: deque[Entry] = deque()
        self.out_of_order: list[Entry] = []

    def __len__(self) -> int:
        return len(self.in_order) + len(self.out_of_order)

    def pop(self) -> TreeNode | None:
        """Take out the first node; None if all entries are stale."""
        in_order, heap = self.in_order, self.out_of_order
        while in_order or heap:
            from_heap = heap and (not in_order or heap[0] < in_order[0])
            entry = heappop(heap) if from_heap else in_order.popleft()
            node = entry[2]
            if node.entry is entry:
                return node
        return None

    def head(self) -> TreeNode | None:
        """The node that `pop` would take out."""
        in_order, heap = self.in_order, self.out_of_order
        while in_order and in_order[0][2].entry is not in_order[0]:
            in_order.popleft()
        while heap and heap[0][2].entry is not heap[0]:
            heappop(heap)
        heads = [run[0] for run in (in_order, heap) if run]
        return min(heads)[2] if heads else None

    def tail(self) -> TreeNode | None:
        """The last node of those that came in order, unless it is the only one."""
        in_order = self.in_order
        while in_order and in_order[-1][2].entry is not in_order[-1]:
            in_order.pop()
        return in_order[-1][2] if len(in_order) > 1 else None

    def sweep(self) -> None:
        """Forget stale entries."""
        entries = [entry for entry in self.in_order if entry[2].entry is entry]
        self.in_order.clear()
        self.in_order.extend(entries)
        self.out_of_order = [entry for entry in self.out_of_order if entry[2].entry is entry]
        heapify(self.out_of_order)

    def entries(self) -> Iterator[Entry]:
        for run in (self.in_order, self.out_of_order):
            yield from (entry for entry in run if entry[2].entry is entry)


class LeafQueue:
    """The unpinned leaves in eviction order, kept in order at every change.

    Adding, updating and popping cost O(1) where ranks come in order, as they do under LRU, and O(log leaves) at most;
    nothing ever re-sorts the leaves. Removing costs O(1): the entry goes stale and is skipped later. Whenever more
    than half of the entries are stale they are swept out, which costs O(1) a change, amortised.

    Leaves with a `keep_until` in the future come after all others, the one that expires first in front: they are kept
    as long as anything else can go, and can still go when nothing else is left.
    """

    def __init__(self, policy: EvictionPolicy, clock: Callable[[], float]) -> None:
        self._rank = policy.rank
        self._group = hook(policy, "group")
        self._urgency = policy.urgency if self._group is not None else None
        self._both_ends = policy.both_ends
        self._is_by_use = policy.ranks_by_last_access and self._group is None
        self._clock = clock
        self._run = _Run()  # where there are no groups
        self._used = self._run.in_order
        self._most_used = SLACK  # entries that may gather there before `use` has them swept
        self._groups: dict[Hashable, _Run] = {}
        self._kept = _Run()
        self._serial = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    @property
    def num_entries(self) -> int:
        """Entries in memory, stale ones among them. O(groups)."""
        return sum(len(run) for run in self._runs())

    def __iter__(self) -> Iterator[TreeNode]:
        """The leaves; within a group the next to be evicted comes first. O(leaves log leaves)."""
        for run in self._runs():
            yield from (entry[2] for entry in sorted(run.entries(), key=lambda entry: entry[:2]))

    def add(self, node: TreeNode) -> None:
        """Enter a node that is not in the queue."""
        assert node.entry is None, node
        self._size += 1
        self.update(node)

    def add_used(self, node: TreeNode) -> None:
        """As `add`, for a node that is used now and was not in the tree before."""
        if node.keep_until or not self._is_by_use:
            self.add(node)
            return
        self._size += 1
        self._serial = serial = self._serial + 1
        node.entry = entry = (node.last_access, serial, node)
        self._used.append(entry)

    def update(self, node: TreeNode) -> None:
        """Give a node that is in the queue the place that its rank asks for now."""
        self._serial = serial = self._serial + 1
        if node.keep_until and node.keep_until > self._clock():
            node.entry = entry = (node.keep_until, serial, node)
            run = self._kept
        else:
            node.entry = entry = (self._rank(node), serial, node)
            run = self._run if self._group is None else self._groups.setdefault(self._group(node), _Run())
        in_order = run.in_order
        if not in_order or in_order[-1][0] <= entry[0]:  # serials grow, so equal ranks are in order too
            in_order.append(entry)
        else:
            heappush(run.out_of_order, entry)
        if len(in_order) + len(run.out_of_order) > 2 * self._size + SLACK:
            self._sweep()

    def use(self, node: TreeNode) -> None:
        """As `update`, for a node in the queue that was just used: under LRU it goes to the end, at little cost."""
        if node.keep_until or not self._is_by_use:
            self.update(node)
            return
        self._serial = serial = self._serial + 1
        node.entry = entry = (node.last_access, serial, node)
        used = self._used
        used.append(entry)
        if len(used) > self._most_used:
            self._sweep()

    def remove(self, node: TreeNode) -> None:
        """Take out a node that is in the queue."""
        assert node.entry is not None, node
        node.entry = None
        self._size -= 1

    def pop(self) -> TreeNode:
        """Take out the node to be evicted next."""
        kept = self._kept
        if kept.in_order or kept.out_of_order:
            self._release_expired()
        node = self._run.pop() if self._group is None else self._pop_most_urgent()
        if node is None:
            node = self._kept.pop()
        assert node is not None, "pop from an empty queue"
        node.entry = None
        self._size -= 1
        return node

    def _release_expired(self) -> None:
        now = self._clock()
        while (node := self._kept.head()) is not None and node.keep_until <= now:
            self.update(node)

    def _pop_most_urgent(self) -> TreeNode | None:
        assert self._urgency is not None, "groups without urgency"
        ends = [head for run in self._groups.values() if (head := run.head()) is not None]
        if self._both_ends:
            ends += [tail for run in self._groups.values() if (tail := run.tail()) is not None]
        return min(ends, key=self._urgency, default=None)  # its entry goes stale

    def _runs(self) -> list[_Run]:
        return [self._run, self._kept, *self._groups.values()]

    def _sweep(self) -> None:
        for run in self._runs():
            run.sweep()
        self._groups = {group: run for group, run in self._groups.items() if run}
        self._most_used = 2 * self._size + SLACK
