"""From a running request to the pages of its tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from radixkv.errors import ConfigError


class ReqToTokenPool:
    """One row a running request: the page of each `page_size` of its tokens, in order.

    The lease of a request keeps its pages in the row; backends read it.

    Token t of the request in row r lies in slot `table[r, t // page_size] * page_size + t % page_size`.

    >>> pool = ReqToTokenPool(max_requests=2, max_tokens=64, page_size=16)
    >>> row = pool.alloc()
    >>> pool.row(row)[:2] = [7, 3]                 # a lease writes it: `cache.acquire(ids, row=pool.row(row))`
    >>> pool.pages(row, 18).tolist()
    [7, 3]
    """

    def __init__(self, *, max_requests: int, max_tokens: int, page_size: int) -> None:
        if min(max_requests, max_tokens, page_size) < 1:
            raise ConfigError(
                "max_requests, max_tokens and page_size must be at least 1; got "
                f"{max_requests}, {max_tokens} and {page_size}"
            )
        self.page_size = page_size
        self.table: NDArray[np.int32] = np.zeros((max_requests, -(-max_tokens // page_size)), np.int32)
        self._free = list(range(max_requests - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Rows that no request has."""
        return len(self._free)

    def alloc(self) -> int:
        """Take a free row; the scheduler asks only while there is one."""
        return self._free.pop()

    def free(self, row: int) -> None:
        """Give a row back."""
        assert row not in self._free, f"row {row} is free already"
        self._free.append(row)

    def row(self, row: int) -> NDArray[np.int32]:
        """All of a row; a view, in which the lease of its request keeps its pages."""
        pages: NDArray[np.int32] = self.table[row]
        return pages

    def pages(self, row: int, num_tokens: int) -> NDArray[np.int32]:
        """The pages of the first `num_tokens` tokens; a view."""
        return self.table[row, : -(-num_tokens // self.page_size)]
