"""Two pools for one model: layers that see everything keep all pages, layers that see a window keep fewer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from radixkv.memory.kv_pool import KVPool
from radixkv.memory.page_pool import PagePool


class SplitKVPool(PagePool):
    """The pages of a cache in the layers of full attention, and *window pages* in those that see a window of tokens.

    Attributes:
        full: None if all layers see a window.
        window: its last page is nobody's: it holds zeros, and stands wherever a page has no window page.
        of_page: int32 [num_pages + 1], the window page that each page of the cache has now; the cache changes it.
    """

    def __init__(self, full: KVPool | None, window: KVPool, of_page: NDArray[np.int32]) -> None:
        self.full, self.window, self.of_page = full, window, of_page
        self.scratch = window.num_pages - 1
        window.clear_page(self.scratch)

    @property
    def num_bytes(self) -> int:
        """Size of both."""
        return self.window.num_bytes + (0 if self.full is None else self.full.num_bytes)

    def bytes_of(self, pages: NDArray[np.int32], num_tokens: int) -> int:
        """KV bytes of the first `num_tokens` tokens in `pages`, where window pages count whole."""
        kept = int((self.of_page[pages] != self.scratch).sum()) * self.window.page_size * self.window.bytes_per_token
        return kept + (0 if self.full is None else self.full.bytes_of(pages, num_tokens))

    def page_tensors(self, page: int) -> list[Tensor]:
        """As `PagePool.page_tensors`; `page` has a window page."""
        window_page = int(self.of_page[page])
        assert window_page != self.scratch, f"page {page} has no window page"
        of_full = [] if self.full is None else self.full.page_tensors(page)
        return [*of_full, *self.window.page_tensors(window_page)]
