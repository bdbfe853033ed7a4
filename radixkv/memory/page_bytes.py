"""Pages as plain bytes: what a pool writes to a store below it, and fills its pages with again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixkv.memory.kv_pool import KVPool


class PageBytes:
    """Moves pages of a pool to bytes and back, many at a time.

    The bytes of a page are its `page_tensors` in order, each with its tokens in order: they do not depend on how the
    pool lays a page out, so that pools of the same shape and kind of values can read each other's.

    Attributes:
        payload_bytes: bytes of each page.
    """

    def __init__(self, pool: KVPool) -> None:
        self._device = pool.device
        self._page_size = pool.page_size
        self._views = [pages for pages in pool.all_pages() if pages.numel()]
        self._sizes = [pages[0].numel() * pages.element_size() for pages in self._views]
        self.payload_bytes = sum(self._sizes)

    @property
    def layout(self) -> str:
        """What a payload is: the kinds and shapes of values in order."""
        kinds = [(str(view.dtype).removeprefix("torch."), tuple(view.shape[1:])) for view in self._views]
        return "; ".join(f"{kind} {'x'.join(map(str, shape))}" for kind, shape in kinds)

    def read(self, pages: NDArray[np.int32], *, last_tokens: int | None = None) -> NDArray[np.uint8]:
        """A copy of the bytes of `pages`, [n, payload_bytes]. O(bytes).

        Args:
            last_tokens: of the last page only so many tokens mean something; what lies after them is zero in the copy.
        """
        payloads = np.empty((len(pages), self.payload_bytes), np.uint8)
        index = torch.from_numpy(pages.astype(np.int64)).to(self._device)
        start = 0
        for view, size in zip(self._views, self._sizes, strict=True):
            found = view.index_select(0, index)
            if last_tokens is not None and len(pages):
                _clear_after(found[-1], last_tokens)
            part = found.cpu().contiguous().flatten().view(torch.uint8).numpy()
            payloads[:, start : start + size] = part.reshape(len(pages), size)
            start += size
        return payloads

    def write(self, pages: NDArray[np.int32], payloads: Sequence[bytes]) -> None:
        """Fill `pages`, all of them different, with `payloads` of `payload_bytes` each. O(bytes)."""
        assert all(len(payload) == self.payload_bytes for payload in payloads), "a payload of another size"
        rows = np.frombuffer(b"".join(payloads), np.uint8).reshape(len(payloads), self.payload_bytes)
        index = torch.from_numpy(pages.astype(np.int64)).to(self._device)
        start = 0
        for view, size in zip(self._views, self._sizes, strict=True):
            part = torch.from_numpy(rows[:, start : start + size].copy())
            values = part.flatten().view(view.dtype).reshape(len(pages), *view.shape[1:])
            view.index_copy_(0, index, values.to(self._device))
            start += size


def _clear_after(page: Tensor, num_tokens: int) -> None:
    """Make what lies after the first tokens of a page zero; `page` is [page_size / w, w, ...]."""
    whole, rest = divmod(num_tokens, page.shape[1])
    if rest:
        page[whole, rest:].zero_()
    page[whole + (rest > 0) :].zero_()
