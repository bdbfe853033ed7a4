"""Page ids as the tree keeps them: int32 bytes, or a window on bytes that all nodes share."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.token_ids import TOKEN_BYTES, int32_array
from radixkv.errors import InvalidPagesError, InvalidTokenIdsError, TokenIdsTypeError

PAGE_ID_BYTES = TOKEN_BYTES

PageBytes: TypeAlias = "bytes | memoryview[int]"
"""Little-endian int32 page ids; immutable."""

# 0, 1, 2, …: an allocator hands out fresh pages in order, and pages that were freed together come back together, so
# the pages of a node are often consecutive numbers. Such a node keeps a window on this constant (1 MiB) instead of a
# copy: finding that out is one memcmp, a fraction of what writing to memory outside the cache costs.
_CONSECUTIVE = np.arange(2**18, dtype=np.int32).tobytes()
_CONSECUTIVE_VIEW = memoryview(_CONSECUTIVE)
_WORTH_A_WINDOW = 64  # pages: a window is an object of 200 bytes


def page_array(pages: Any) -> NDArray[np.int32]:
    """`pages` as a contiguous int32 array; values that are int32 already are not looked at.

    Raises: InvalidPagesError if they are not one sequence of integers that int32 can hold.
    """
    try:
        return int32_array(pages)
    except (InvalidTokenIdsError, TokenIdsTypeError) as error:
        raise InvalidPagesError(f"page ids: {str(error).replace('token id', 'page id')}") from error


def page_bytes(pages: NDArray[np.int32], known: int = 0) -> PageBytes:
    """`pages` to be kept, those after the first `known`. O(pages). Raises: InvalidPagesError if one is negative."""
    kept = pages[known:]
    num_pages = len(kept)
    if num_pages >= _WORTH_A_WINDOW:
        first = kept.item(0)
        if first >= 0 and kept.item(num_pages - 1) - first == num_pages - 1:
            start = first * PAGE_ID_BYTES
            if _CONSECUTIVE.startswith(kept.data, start):
                return _CONSECUTIVE_VIEW[start : start + num_pages * PAGE_ID_BYTES]
    if num_pages and kept.item(kept.argmin()) < 0:
        position = known + int((kept < 0).argmax())
        raise InvalidPagesError(f"page ids: page id {pages[position]} at position {position} lies outside [0, 2**31)")
    return kept.tobytes()


def leading_pages(pages: PageBytes, size: int) -> PageBytes:
    """The first `size` bytes of `pages`. O(1): a window if there are many, and a copy once half of them is useless."""
    if size < _WORTH_A_WINDOW * PAGE_ID_BYTES:
        return bytes(pages[:size])
    window = (pages if type(pages) is memoryview else memoryview(pages))[:size]
    whole = window.obj
    return window if whole is _CONSECUTIVE or 2 * size > len(whole) else bytes(window)  # type: ignore[arg-type]
