"""A model of a memory in which tensors come and go, to see the holes that they leave."""

from __future__ import annotations

from typing import NamedTuple

from sortedcontainers import SortedList


class Block(NamedTuple):
    """The bytes `[start, start + num_bytes)`."""

    start: int
    num_bytes: int

    @property
    def end(self) -> int:
        return self.start + self.num_bytes


class Arena:
    """Blocks in one address space. A new one takes the smallest hole that holds it (of equal ones the lowest), else it
    goes behind the last block; a freed one joins the holes beside it. This is best fit, as PyTorch's allocator for GPUs
    does it, without its rounding.

    Invariant: held and hole bytes together are `end`.

    >>> arena = Arena()
    >>> a, b, c = (arena.alloc(size) for size in (10, 20, 10))
    >>> arena.free(b)
    >>> arena.alloc(30), arena.hole_bytes, arena.held_bytes
    (Block(start=40, num_bytes=30), 20, 50)

    Attributes:
        held_bytes: in blocks.
        peak_held_bytes: the most that was held at one time.
        end: where the last block ends: what the memory must have.
        peak_end: the largest `end` so far.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        self.held_bytes = self.peak_held_bytes = self.end = self.peak_end = 0
        self._limit_bytes = limit_bytes
        self._by_size: SortedList = SortedList()  # (bytes, start) of each hole
        self._by_start: SortedList = SortedList()  # (start, bytes)

    @property
    def hole_bytes(self) -> int:
        """Bytes below `end` that nothing holds. O(1)."""
        return self.end - self.held_bytes

    def hole_bytes_smaller_than(self, num_bytes: int) -> int:
        """Bytes in holes that a block of that size does not fit into. O(holes)."""
        return sum(hole_bytes for hole_bytes, _ in self._by_size.irange(maximum=(num_bytes, -1)))

    def fits(self, num_bytes: int) -> bool:
        """Whether a block of that size has a place: a hole, or the room behind the last block. O(log holes)."""
        in_a_hole = self._by_size.bisect_left((num_bytes, 0)) < len(self._by_size)
        return in_a_hole or self._limit_bytes is None or self.end + num_bytes <= self._limit_bytes

    def alloc(self, num_bytes: int) -> Block:
        """Take a block; it must fit. O(log holes)."""
        assert self.fits(num_bytes), "ask first"
        index = self._by_size.bisect_left((num_bytes, 0))
        if index < len(self._by_size):
            hole_bytes, start = self._by_size[index]
            self._remove_hole(start, hole_bytes)
            if hole_bytes > num_bytes:
                self._add_hole(start + num_bytes, hole_bytes - num_bytes)
        else:
            start, self.end = self.end, self.end + num_bytes
        self.held_bytes += num_bytes
        self.peak_held_bytes = max(self.peak_held_bytes, self.held_bytes)
        self.peak_end = max(self.peak_end, self.end)
        return Block(start, num_bytes)

    def free(self, block: Block) -> None:
        """Give a block back. O(log holes)."""
        self.held_bytes -= block.num_bytes
        start, end = block.start, block.end
        index = self._by_start.bisect_left((start, 0))
        if index < len(self._by_start) and self._by_start[index][0] == end:
            after_start, after_bytes = self._by_start[index]
            self._remove_hole(after_start, after_bytes)
            end += after_bytes
        if index and sum(self._by_start[index - 1]) == start:
            before_start, before_bytes = self._by_start[index - 1]
            self._remove_hole(before_start, before_bytes)
            start = before_start
        if end == self.end:
            self.end = start
        else:
            self._add_hole(start, end - start)

    def _add_hole(self, start: int, num_bytes: int) -> None:
        self._by_size.add((num_bytes, start))
        self._by_start.add((start, num_bytes))

    def _remove_hole(self, start: int, num_bytes: int) -> None:
        self._by_size.remove((num_bytes, start))
        self._by_start.remove((start, num_bytes))
