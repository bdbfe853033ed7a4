"""Window pages as plain bytes, in parts of one size: what goes to a store of pages and comes back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from radixkv.memory.page_bytes import PageBytes
from radixkv.memory.split_pool import SplitKVPool


class WindowBytes:
    """Moves what a split pool keeps of pages in the layers that see a window to bytes and back.

    The bytes of a page are those of its window page, cut every `part_bytes`; zeros fill the last part.

    Attributes:
        part_bytes: bytes of each part.
        num_parts: of each page.
        window_tokens: that the layers see.
    """

    def __init__(self, pool: SplitKVPool, part_bytes: int, window_tokens: int) -> None:
        self._of_page, self._scratch = pool.of_page, pool.scratch
        self._bytes = PageBytes(pool.window)
        self.part_bytes, self.window_tokens = part_bytes, window_tokens
        self.num_parts = -(-self._bytes.payload_bytes // part_bytes)

    @property
    def layout(self) -> str:
        """What lies in the bytes of a page."""
        return self._bytes.layout

    def read(self, window_page: int, num_tokens: int) -> NDArray[np.uint8]:
        """A copy of a window page, [num_parts, part_bytes], zeros after its first `num_tokens` tokens. O(bytes)."""
        content = np.zeros((self.num_parts, self.part_bytes), np.uint8)
        (payload,) = self._bytes.read(np.array([window_page], np.int32), last_tokens=num_tokens)
        content.reshape(-1)[: len(payload)] = payload
        return content

    def write(self, page: int, parts: Sequence[bytes]) -> None:
        """Fill the window page of a page of the cache, which has one, with all of its parts. O(bytes)."""
        assert self._of_page[page] != self._scratch, f"page {page} has no window page"
        payload = b"".join(parts)[: self._bytes.payload_bytes]
        self._bytes.write(self._of_page[page : page + 1], [payload])
