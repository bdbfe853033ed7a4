"""Free pages and reference counts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from radixkv.config.checks import checked_int
from radixkv.errors import InvalidRequestError, InvariantError, OutOfPagesError


class TokenToKVPoolAllocator:
    """Free list and reference counts over `num_pages` pages.

    Invariant, proved by `check_invariants`: a page is on the free list, once, if and only if its count is 0.

    >>> allocator = TokenToKVPoolAllocator(4)
    >>> pages = allocator.alloc(3)
    >>> allocator.retain(pages[:1])
    >>> len(allocator.release(pages))       # the first page has one reference left
    2
    >>> allocator.num_free
    3
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages = checked_int("num_pages", num_pages, 1)
        self._free = np.arange(num_pages - 1, -1, -1, dtype=np.int32)  # a stack: [0, num_free) are free
        self._num_free = num_pages
        self._ref_counts = np.zeros(num_pages, np.int32)

    @property
    def num_free(self) -> int:
        """Pages without a reference. O(1)."""
        return self._num_free

    @property
    def num_used(self) -> int:
        """Pages with at least one reference. O(1)."""
        return self.num_pages - self._num_free

    def ref_count(self, page: int) -> int:
        """References on `page`."""
        return int(self._ref_counts[page])

    def ref_counts(self, pages: NDArray[np.int32]) -> NDArray[np.int32]:
        """References on each of `pages`."""
        return self._ref_counts[pages]

    def alloc(self, num_pages: int) -> NDArray[np.int32]:
        """Take `num_pages` free pages, each with one reference. O(num_pages).

        Returns: int32 page ids, shape [num_pages].
        Raises: OutOfPagesError if fewer are free (nothing is taken then); InvalidRequestError for a negative number.
        """
        if num_pages < 0:
            raise InvalidRequestError(f"{num_pages} pages cannot be allocated; ask for at least 0")
        if num_pages > self._num_free:
            raise OutOfPagesError(needed=num_pages, free=self._num_free, evictable=0, total=self.num_pages)
        first = self._num_free - num_pages
        pages = self._free[first : self._num_free][::-1].copy()
        self._num_free = first
        self._ref_counts[pages] = 1
        return pages

    def retain(self, pages: NDArray[np.int32]) -> None:
        """Add a reference to each of `pages`, which are distinct and in use. O(len(pages))."""
        counts = self._ref_counts[pages]
        assert counts.size == 0 or counts.min() > 0, "a free page was retained"
        self._ref_counts[pages] = counts + 1

    def release(self, pages: NDArray[np.int32]) -> NDArray[np.int32]:
        """Take a reference from each of `pages`, which are distinct and in use. O(len(pages)).

        Returns: those of them that have none left and went back to the free list.
        """
        counts = self._ref_counts[pages] - 1
        assert counts.size == 0 or counts.min() >= 0, "a free page was released"
        self._ref_counts[pages] = counts
        freed: NDArray[np.int32] = pages[counts == 0]
        self._free[self._num_free : self._num_free + len(freed)] = freed[::-1]
        self._num_free += len(freed)
        return freed

    def check_invariants(self) -> None:
        """Prove the invariant of the class docstring. O(num_pages). Raises: InvariantError."""
        check_free_list(self._free[: self._num_free], self._ref_counts)


def check_free_list(free: NDArray[np.int32], ref_counts: NDArray[np.int32]) -> None:
    """Prove that `free` lists the pages whose count is 0, each once, and that no count is negative. O(pages log pages).

    Raises: InvariantError.
    """
    without_references = np.flatnonzero(ref_counts == 0)
    if not np.array_equal(np.sort(free), without_references):
        raise InvariantError(
            f"free list {sorted(free.tolist())} differs from the pages without references {without_references.tolist()}"
        )
    if ref_counts.min() < 0:
        raise InvariantError(f"negative reference counts: {ref_counts.tolist()}")
