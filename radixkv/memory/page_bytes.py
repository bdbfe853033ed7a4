"""Pages as plain bytes: what a pool writes to a store below it, and fills its pages with again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from radixkv.memory.kv_pool import KVPool
from radixkv.memory.page_pool import copy_tokens
from radixkv.memory.quantized_pool import make_kv_pool


class PageBytes:
    """Moves pages of a pool to bytes and back, many at a time.

    The bytes of a page are those that it has in the pool, layer by layer, so that nothing is laid out anew. Pools with
    the same `layout` can read each other's.

    In the host's memory they are copied through memory views, which keep the interpreter's lock: each copy is of some
    KB, and to give the lock up for each of them costs more than the copying, while a thread reads the next pages.

    Attributes:
        payload_bytes: bytes of each page.
    """

    def __init__(self, pool: KVPool) -> None:
        self._pool = pool
        self._blocks = [block.view(torch.uint8) for block in pool.page_blocks()]  # [num_pages, bytes of a page]
        on_cpu = all(block.device.type == "cpu" for block in self._blocks)
        self._views = [block.numpy().data.cast("B") for block in self._blocks] if on_cpu else None
        sizes = [block.shape[1] for block in self._blocks]
        self.payload_bytes = sum(sizes)
        self._parts = [slice(end - size, end) for end, size in zip(np.cumsum(sizes).tolist(), sizes, strict=True)]
        self._one_page: PageBytes | None = None  # where pages that are full in part are copied to

    @property
    def layout(self) -> str:
        """What a payload is: how values lie in a page, and of which layers."""
        layers = ", ".join(f"{kv.num_kv_heads}x({kv.k_head_dim}+{kv.v_head_dim})" for kv in self._pool.layers)
        return f"{self._pool.layout}: {layers}"

    def read(self, pages: NDArray[np.int32], *, last_tokens: int | None = None) -> NDArray[np.uint8]:
        """A copy of the bytes of `pages`, [n, payload_bytes]. O(bytes).

        Args:
            last_tokens: of the last page only so many tokens mean something; what lies after them is zero in the copy.
        """
        payloads = np.empty((len(pages), self.payload_bytes), np.uint8)
        if last_tokens is not None and last_tokens < self._pool.page_size and len(pages):
            payloads[-1] = self._read_in_part(int(pages[-1]), last_tokens)
            pages = pages[:-1]
        if self._views is None:
            for block, part in zip(self._blocks, self._parts, strict=True):
                index = torch.from_numpy(pages.astype(np.int64)).to(block.device)
                payloads[: len(pages), part] = block.index_select(0, index).cpu().numpy()
        else:
            for payload, page in zip(payloads, pages.tolist(), strict=False):
                whole = payload.data
                for view, part in zip(self._views, self._parts, strict=True):
                    whole[part] = view[_place(page, part)]
        return payloads

    def write(self, pages: NDArray[np.int32], payloads: Sequence[bytes]) -> None:
        """Fill `pages`, all of them different, with `payloads` of `payload_bytes` each. O(bytes)."""
        assert all(len(payload) == self.payload_bytes for payload in payloads), "a payload of another size"
        if self._views is None:
            kept = [np.frombuffer(payload, np.uint8) for payload in payloads]
            for block, part in zip(self._blocks, self._parts, strict=True):
                index = torch.from_numpy(pages.astype(np.int64)).to(block.device)
                values = torch.from_numpy(np.stack([payload[part] for payload in kept]))
                block.index_copy_(0, index, values.to(block.device))
        else:
            for payload, page in zip(payloads, pages.tolist(), strict=True):
                whole = memoryview(payload)
                for view, part in zip(self._views, self._parts, strict=True):
                    view[_place(page, part)] = whole[part]

    def _read_in_part(self, page: int, num_tokens: int) -> NDArray[np.uint8]:
        """The bytes of a page as if nothing but zeros came after its first tokens: that may be another request's."""
        pool = self._pool
        if self._one_page is None:
            one = make_kv_pool(
                pool.layout,
                pool.layers,
                kv_dtype="auto" if pool.kv_dtype == str(pool.dtype).removeprefix("torch.") else pool.kv_dtype,
                num_pages=1,
                page_size=pool.page_size,
                dtype=pool.dtype,
                device=pool.device,
            )
            self._one_page = PageBytes(one)
        one_page = self._one_page._pool
        one_page.clear_page(0)
        copy_tokens(pool.page_tensors(page), one_page.page_tensors(0), num_tokens)
        payload: NDArray[np.uint8] = self._one_page.read(np.zeros(1, np.int32))[0]
        return payload


def _place(page: int, part: slice) -> slice:
    """Where the bytes of a page lie in a block whose pages are as large as `part`."""
    size = part.stop - part.start
    return slice(page * size, (page + 1) * size)
