"""The bytes of pages that hold nothing, so that stores find the window pages which follow them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from radixkv.memory.page_bytes import PageBytes
from radixkv.memory.split_pool import SplitKVPool

_PARTS = 8  # of a window page, each as large as a blank page: these take an eighth of the bytes besides


class BlankPages:
    """As `PageBytes`, for a pool whose layers all see a window: pages of its cache are mere numbers.

    Attributes:
        payload_bytes: bytes of each page, all zero.
    """

    def __init__(self, pool: SplitKVPool) -> None:
        self.payload_bytes = -(-PageBytes(pool.window).payload_bytes // _PARTS)

    @property
    def layout(self) -> str:
        """What a payload is."""
        return "nothing"

    def read(self, pages: NDArray[np.int32], *, last_tokens: int | None = None) -> NDArray[np.uint8]:
        """Zeros, [n, payload_bytes]."""
        return np.zeros((len(pages), self.payload_bytes), np.uint8)

    def write(self, pages: NDArray[np.int32], payloads: Sequence[bytes]) -> None:
        """There is nothing to fill."""
