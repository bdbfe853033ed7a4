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

    def read(self, window_pages: Sequence[int], num_tokens: Sequence[int]) -> NDArray[np.uint8]:
        """A copy of window pages, [n, num_parts, part_bytes]. O(bytes).

        Args:
            num_tokens: in each of them; zeros come after these. All but the last one are full.
        """
        payloads = self._bytes.read(np.array(window_pages, np.int32), last_tokens=num_tokens[-1])
        content = np.zeros((len(payloads), self.num_parts * self.part_bytes), np.uint8)
        content[:, : payloads.shape[1]] = payloads
        return content.reshape(len(payloads), self.num_parts, self.part_bytes)

    def write(self, pages: NDArray[np.int32], parts: Sequence[bytes]) -> None:
        """Fill the window pages of pages of the cache, which have one each, with all of their parts. O(bytes)."""
        window_pages = self._of_page[pages]
        assert (window_pages != self._scratch).all(), "a page without a window page cannot be filled"
        step, size = self.num_parts, self._bytes.payload_bytes
        self._bytes.write(window_pages, [b"".join(parts[i : i + step])[:size] for i in range(0, len(parts), step)])
