"""The unpinned leaves, in the order in which they are to be evicted."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from heapq import heappop, heappush
from typing import Any, NamedTuple, NoReturn, cast

from radixkv.cache.eviction.policy import EvictionPolicy, hook
from radixkv.cache.tree.node import TreeNode
from radixkv.errors import PolicyError

Entry = tuple[Any, ...]
"""(rank, serial) of a leaf that is linked with others in order; (rank, serial, number, leaf) of one that is in a heap,
where no two entries have the same number."""

SLACK = 64  # stale entries that are not worth a sweep
SWEEP = 16  # entries that one operation sweeps at most


class Place(NamedTuple):
    """Where the first leaf of a queue stands: `order` compares with that of others with the same policy."""

    order: tuple[Any, ...]
    node: TreeNode


class _Ends:
    """Comes after the last of the linked leaves, and before the first."""

    __slots__ = ("after", "before", "node")

    def __init__(self) -> None:
        self.node = cast("TreeNode", self)  # as its neighbours see it
        self.before = self.after = self.node


class _Run:
    """Leaves of one group, the smallest rank first.

    Ranks mostly arrive in order (under LRU a leaf that was just used has the largest rank of all), so these leaves are
    linked with each other: one leaves its place at once. Those that come out of order go to a heap, where the entry
    of a leaf that left stays behind, stale. The smallest is the smaller of two heads.

    A heap with many stale entries is swept a few entries at a time: `unswept` is what is left of it, still a heap.
    """

    __slots__ = ("ends", "heap", "unswept")

    def __init__(self) -> None:
        self.ends = _Ends()
        self.heap: list[Entry] = []
        self.unswept: list[Entry] = []

    def place(self, node: TreeNode, rank: Any, serial: int, number: int) -> bool:
        """Enter a leaf that is in no run. Returns: whether it went to the heap."""
        last = self.ends.before
        before: Entry = last.entry if last is not self.ends.node else ()  # type: ignore[assignment]
        if not before or (before[0] <= rank and (before[1] < serial or before[0] < rank)):
            self.append(node, (rank, serial))
            return False
        entry = (rank, serial, number, node)
        heappush(self.heap, entry)
        node.entry = entry
        return True

    def append(self, node: TreeNode, entry: Entry) -> None:
        """Link a leaf that is in no run after all others."""
        ends = self.ends
        last = ends.before
        last.after = ends.before = node
        node.before, node.after = last, ends.node
        node.entry = entry

    def head(self) -> TreeNode | None:
        """The leaf of the smallest rank; None if there is none."""
        node: TreeNode | None = self.ends.after
        if node is self.ends.node:
            node = None
        if not self.heap and not self.unswept:
            return node
        for heap in (self.heap, self.unswept):
            while heap and heap[0][3].entry is not heap[0]:
                heappop(heap)
            if heap and (node is None or heap[0] < node.entry):  # type: ignore[operator]
                node = heap[0][3]
        return node

    def tail(self) -> TreeNode | None:
        """The last leaf of those that came in order, unless it is the only one."""
        last = self.ends.before
        return None if last is self.ends.after else last

    def sweep(self) -> None:
        """Go on with forgetting the stale entries of the heap. O(SWEEP log leaves)."""
        if not self.unswept:
            self.heap, self.unswept = self.unswept, self.heap
        for _ in range(min(SWEEP, len(self.unswept))):
            entry = self.unswept.pop()  # without its last entry a heap is still one
            if entry[3].entry is entry:
                heappush(self.heap, entry)

    def leaves(self) -> Iterator[TreeNode]:
        """All of them, in no order."""
        node = self.ends.after
        while node is not self.ends.node:
            yield node
            node = node.after  # type: ignore[assignment]
        for heap in (self.heap, self.unswept):
            yield from (entry[3] for entry in heap if entry[3].entry is entry)


class LeafQueue:
    """The unpinned leaves in eviction order, kept in order at every change.

    Adding, updating and evicting cost O(1) where ranks come in order, as they do under LRU, and O(log leaves) where
    they do not; nothing ever re-sorts the leaves. Removing costs O(1): an entry in a heap goes stale and is skipped
    later. Once more than half of the entries of a heap are stale, each operation sweeps a few of them.

    Leaves with a `keep_until` in the future come after all others, the one that expires first in front: they are kept
    as long as anything else can go, and can still go when nothing else is left.

    Methods of a policy may fail. A leaf that could not be ranked for that goes before all others, unless it is ranked
    anew before; then and there the caller gets a PolicyError. So the queue holds the same leaves whatever fails.
    """

    def __init__(self, policy: EvictionPolicy, clock: Callable[[], float]) -> None:
        self.serial = 0  # of the last that came; the later ones count as younger
        self._policy = policy
        self._rank = policy.rank
        self._group = hook(policy, "group")
        self._urgency = policy.urgency if self._group is not None else None
        self._both_ends = policy.both_ends
        self._is_by_use = policy.ranks_by_last_access and self._group is None
        self._clock = clock
        self._run = _Run()  # where there are no groups
        self._ends = self._run.ends
        self._groups: dict[Hashable, _Run] = {}
        self._kept = _Run()
        self._unranked = _Run()  # in the order in which ranking them failed
        self._size = 0
        self._in_heaps = 0  # leaves; stale entries come on top

    def __len__(self) -> int:
        return self._size

    @property
    def num_entries(self) -> int:
        """Leaves, and stale entries in memory. O(groups)."""
        in_heaps = sum(len(run.heap) + len(run.unswept) for run in self._runs())
        return self._size - self._in_heaps + in_heaps

    def __iter__(self) -> Iterator[TreeNode]:
        """The leaves; within a group the next to be evicted comes first. O(leaves log leaves)."""
        yield from self._unranked.leaves()
        for run in self._runs():
            yield from sorted(run.leaves(), key=lambda node: node.entry[:2])  # type: ignore[index]

    def add(self, node: TreeNode) -> None:
        """Enter a leaf that is not in the queue. Raises: PolicyError; it is in the queue then."""
        assert node.entry is None, node
        self._size += 1
        self.serial += 1
        self._enter(node, self.serial)

    def add_used(self, node: TreeNode) -> None:
        """As `add`, for a leaf that is used now and was not in the tree before."""
        if node.keep_until or not self._is_by_use:
            self.add(node)
            return
        self._size += 1
        self.serial = serial = self.serial + 1
        self._run.append(node, (node.last_access, serial))

    def update(self, node: TreeNode) -> None:
        """Give a leaf the place that its rank asks for now. Raises: PolicyError; it goes first then."""
        self.serial += 1
        self._enter(node, self.serial)

    def replace(self, old: TreeNode, new: TreeNode) -> None:
        """Let `new`, which has the first part of the edge of `old`, be in the queue instead of it.

        Its rank is asked for; where that is the same it takes the same place. Raises: PolicyError; it goes first then.
        """
        entry, before, after = old.entry, old.before, old.after
        assert entry is not None, old
        if before is not None and after is not None and (self._is_by_use or entry[0] is None):
            new.before, new.after, new.entry = before, after, entry
            before.after = after.before = new
            old.before = old.after = old.entry = None
            return
        self.serial += 1
        self._leave(old)
        self._enter(new, entry[1])

    def _enter(self, node: TreeNode, serial: int) -> None:
        try:
            if node.keep_until and node.keep_until > self._clock():
                rank, run = node.keep_until, self._kept
            else:
                rank, run = self._rank(node), self._run if self._group is None else self._run_of(node)
            if node.entry is not None:
                self._leave(node)
            self._in_heaps += run.place(node, rank, serial, self.serial)
            if run.unswept or len(run.heap) > 2 * self._in_heaps + SLACK:
                run.sweep()
        except BaseException as error:
            self.set_aside(node)
            self._fail(error)

    def use(self, node: TreeNode) -> None:
        """As `update`, for a leaf that was just used: under LRU it goes to the end, at little cost."""
        if node.keep_until or not self._is_by_use:
            self.update(node)
            return
        self.serial = serial = self.serial + 1
        after, ends = node.after, self._ends
        if after is None:
            self._leave_heap()
        else:
            before = node.before
            before.after, after.before = after, before  # type: ignore[union-attr]
        last = ends.before
        last.after = ends.before = node
        node.before, node.after = last, ends  # type: ignore[assignment]
        node.entry = (node.last_access, serial)

    def _leave_heap(self) -> None:
        """Note that an entry of the heap goes stale."""
        self._in_heaps -= 1
        if self._run.unswept or len(self._run.heap) > 2 * self._in_heaps + SLACK:
            self._run.sweep()

    def remove(self, node: TreeNode) -> None:
        """Take out a leaf."""
        assert node.entry is not None, node
        after = node.after
        if after is not None:  # as `_leave`, which this saves a call of
            before = node.before
            before.after, after.before = after, before  # type: ignore[union-attr]
            node.before = node.after = None
        else:
            self._in_heaps -= 1
        node.entry = None
        self._size -= 1

    def first(self) -> TreeNode:
        """The leaf to be evicted next; it stays in the queue. Raises: PolicyError."""
        node = self._unranked.ends.after
        if node is not self._unranked.ends.node:
            return node
        try:
            kept = self._kept
            if kept.heap or kept.unswept or kept.ends.after is not kept.ends.node:
                self._release_expired()
            found = self._run.head() if self._group is None else self._most_urgent()
        except Exception as error:
            self._skip_heaps(error)
            self._fail(error)
        if found is None:
            found = self._kept.head()
        assert found is not None, "the queue is empty"
        return found

    def first_place(self) -> Place:
        """The leaf to be evicted next, to be compared with those of other queues. Raises: PolicyError."""
        node = self.first()
        rank, serial = cast("Entry", node.entry)[:2]
        if node is self._unranked.ends.after:
            return Place((0, serial), node)
        if node is self._kept.head():
            return Place((2, rank, serial), node)
        if self._urgency is None:
            return Place((1, rank, serial), node)
        try:
            return Place((1, self._urgency(node), rank, serial), node)
        except BaseException as error:
            self.set_aside(node)
            self._fail(error)

    def next_expiry(self) -> float | None:
        """When the first of the kept leaves is kept no more; None if none is kept. O(1)."""
        node = self._kept.head()
        return None if node is None else node.keep_until

    def pop(self) -> TreeNode:
        """Take out the leaf to be evicted next. Raises: PolicyError."""
        node = self.first()
        self.remove(node)
        return node

    def _release_expired(self) -> None:
        now = self._clock()
        while (node := self._kept.head()) is not None and node.keep_until <= now:
            self.update(node)

    def _most_urgent(self) -> TreeNode | None:
        assert self._urgency is not None, "groups without urgency"
        heads = {group: run.head() for group, run in self._groups.items()}
        ends = []
        for group, head in heads.items():
            if head is None:
                del self._groups[group]
            else:
                ends.append(head)
        if self._both_ends:
            ends += [tail for run in self._groups.values() if (tail := run.tail()) is not None]
        first, least = None, 0.0
        for node in ends:
            try:
                urgency = self._urgency(node)
                if first is None or urgency < least:
                    first, least = node, urgency
            except BaseException:  # the others must not wait for it for ever
                self.set_aside(node)
                raise
        return first

    def _skip_heaps(self, error: Exception) -> None:
        """Let the heads of all heaps go first, so that ranks which do not compare fail only once."""
        heads = [heap[0] for run in self._runs() for heap in (run.heap, run.unswept) if heap]
        for *_, node in heads if not isinstance(error, PolicyError) else ():
            if any(node.entry is head for head in heads):
                self.set_aside(node)

    def _run_of(self, node: TreeNode) -> _Run:
        assert self._group is not None
        return self._groups.setdefault(self._group(node), _Run())

    def set_aside(self, node: TreeNode) -> None:
        """Let a leaf of the queue that the policy failed on go before all others."""
        self._leave(node)
        self._unranked.append(node, (None, self.serial))

    def _leave(self, node: TreeNode) -> None:
        """Take a leaf out of its run; nothing to do for one that is in none."""
        after = node.after
        if after is not None:
            before = node.before
            before.after, after.before = after, before  # type: ignore[union-attr]
            node.before = node.after = None
        elif node.entry is not None:
            self._in_heaps -= 1
        node.entry = None

    def _runs(self) -> list[_Run]:
        return [self._run, self._kept, *self._groups.values()]

    def _fail(self, error: BaseException) -> NoReturn:
        if isinstance(error, PolicyError) or not isinstance(error, Exception):
            raise error
        raise PolicyError(self._policy.name, error) from error
