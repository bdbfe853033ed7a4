"""The bytes: per layer the pages of K and of V, and how many of them fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixkv.errors import ConfigError
from radixkv.memory.huge_pages import prefer_huge_pages
from radixkv.memory.kv_shape import LayerKV
from radixkv.memory.page_pool import PagePool

CGROUP_FILES = (  # (limit, usage) of version 2 and version 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
REGISTER_BYTES, MEMORY_PAGE_BYTES = 64, 4096
DEFAULT_MEM_FRACTION = {"cpu": 0.4, "cuda": 0.85}


KVLayout = Literal["nhd", "pairs", "lanes", "latent"]
"""How the KV of a page lies: see `KVPool` ("nhd"), `LaneKVPool` ("lanes") and `latent_pool.LatentKVPool` ("latent").

"pairs" is "nhd" for codes of 4 bits, of which a byte holds neighbours (`packing.PAIRS`); all other KV lies as in "nhd".
"""


class KVPool(PagePool):
    """Keys and values of every layer, in pages.

    Attributes:
        k, v: per layer a tensor [num_pages, page_size, num_kv_heads, head_dim] (FlashInfer's NHD).
        k_scales, v_scales: per layer the scales of codes; empty tensors here, where values are kept as they are.
        holds_codes: whether KV is kept as codes, so that only `write` may store it.

    The memory is not touched before it is written, so the CPU's pages of it are committed as they are used.

    Raises: ConfigError if the memory does not suffice.
    """

    layout: KVLayout = "nhd"
    holds_codes = False

    def __init__(
        self,
        layers: Sequence[LayerKV],
        *,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.layers = tuple(layers)
        self.num_pages, self.page_size = num_pages, page_size
        self.dtype, self.device = dtype, torch.device(device)
        try:
            with torch.inference_mode(False):  # pages outlive whatever mode they were made in, and are written in any
                tensors = [self._tensors(layer) for layer in self.layers]
        except (RuntimeError, MemoryError) as error:  # torch has no narrower error for the CPU's memory
            raise ConfigError(
                f"no room on {device} for a KV pool of {num_pages * page_size} tokens of {self.bytes_per_token} bytes; "
                "set a smaller kv_cache_tokens or mem_fraction"
            ) from error
        self.k, self.v = [k for k, _ in tensors], [v for _, v in tensors]
        for pages in (*self.k, *self.v):
            prefer_huge_pages(pages)
        no_scales = torch.empty(0, dtype=torch.bfloat16, device=self.device)
        self.k_scales, self.v_scales = [no_scales] * len(tensors), [no_scales] * len(tensors)

    @property
    def kv_dtype(self) -> str:
        """What a value is kept as."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def bytes_per_token(self) -> int:
        """KV bytes of one token over all layers."""
        return pool_bytes_per_token(self.layers, self.dtype)

    @property
    def num_bytes(self) -> int:
        """Size of the whole pool."""
        return self.bytes_per_token * self.num_pages * self.page_size

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store the KV of tokens in `slots`, int64 [tokens]; k and v are [tokens, num_kv_heads, head_dim]."""
        k, v = self.as_kept(k, v)
        self.k[layer].flatten(0, 1).index_copy_(0, slots, k)
        self.v[layer].flatten(0, 1).index_copy_(0, slots, v)

    def as_kept(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of tokens, [tokens, num_kv_heads, head_dim], as `k` and `v` keep them; scales are left out."""
        return k.to(self.dtype), v.to(self.dtype)

    def gather(self, layer: int, pages: Tensor) -> tuple[Tensor, Tensor]:
        """A copy of the KV in `pages` (int64 [n]): K and V as [n * page_size, num_kv_heads, head_dim]."""
        return self.k[layer].index_select(0, pages).flatten(0, 1), self.v[layer].index_select(0, pages).flatten(0, 1)

    def queries(self, q: Tensor) -> Tensor:
        """What is to be multiplied with K as it is kept: q [..., k_head_dim], unless keys are kept otherwise."""
        return q

    def page_tensors(self, page: int) -> list[Tensor]:
        return [pages[page].unsqueeze(1) for pages in (*self.k, *self.v)]

    def page_blocks(self) -> list[Tensor]:
        """Views of all that the pool keeps, [num_pages, values of a page]: a page is contiguous in each. O(layers)."""
        return [pages.flatten(1) for pages in (*self.k, *self.v)]

    def bytes_of(self, pages: NDArray[np.int32], num_tokens: int) -> int:
        """KV bytes of the first `num_tokens` tokens in `pages`."""
        return num_tokens * self.bytes_per_token

    def _tensors(self, layer: LayerKV) -> tuple[Tensor, Tensor]:
        k, v = (
            torch.empty(self.num_pages, *shape, dtype=self.dtype, device=self.device)
            for shape in (self._k_shape(layer), self._v_shape(layer))
        )
        return k, v

    def _k_shape(self, layer: LayerKV) -> tuple[int, ...]:
        return (self.page_size, layer.num_kv_heads, layer.k_head_dim)

    def _v_shape(self, layer: LayerKV) -> tuple[int, ...]:
        return (self.page_size, layer.num_kv_heads, layer.v_head_dim)


class LaneKVPool(KVPool):
    """KV laid out for vector registers: the tokens of a page lie side by side in K, so that a register holds one
    component of many tokens and scores need no sums across its lanes.

    Attributes:
        k: [num_pages, num_kv_heads, k_head_dim / w, page_size, w] per layer
        v: [num_pages, num_kv_heads, page_size / w, v_head_dim, w]

    with w = 1 in float32, w = 2 in 16 bit (the processor's dot products of 16 bit take neighbouring pairs) and w = 4
    for the codes of `QuantizedKVPool`. The V of a page's head follows its K in memory: the
    processor fetches by itself what follows what was read. Behind the last value the memory goes on for a register's
    width, so that one that begins inside may be read whole.
    """

    layout: KVLayout = "lanes"

    @property
    def width(self) -> int:
        """Values that lie together, w above."""
        return 4 // self.dtype.itemsize

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        page, offset, width = slots // self.page_size, slots % self.page_size, self.width
        k, v = self.as_kept(k, v)
        self.k[layer][page, :, :, offset] = k.unflatten(2, (-1, width))
        self.v[layer][page, :, offset // width, :, offset % width] = v

    def gather(self, layer: int, pages: Tensor) -> tuple[Tensor, Tensor]:
        k = self.k[layer].index_select(0, pages).permute(0, 3, 1, 2, 4)  # [n, page_size, heads, dim / w, w]
        v = self.v[layer].index_select(0, pages).permute(0, 2, 4, 1, 3)  # [n, page_size / w, w, heads, dim]
        return k.flatten(3, 4).flatten(0, 1), v.flatten(0, 2)

    def page_tensors(self, page: int) -> list[Tensor]:
        return [
            *(k[page].permute(2, 0, 1, 3).unsqueeze(1) for k in self.k),  # [page_size, 1, heads, dim / w, w]
            *(v[page].permute(1, 3, 0, 2) for v in self.v),  # [page_size / w, w, heads, dim]
        ]

    def page_blocks(self) -> list[Tensor]:
        blocks = []
        for k, v in zip(self.k, self.v, strict=True):  # which alternate head by head in the same memory
            size = k[0].numel() + v[0].numel()
            blocks.append(k.as_strided((self.num_pages, size), (size, 1)))
        return blocks

    def _tensors(self, layer: LayerKV) -> tuple[Tensor, Tensor]:
        k_shape, v_shape = self._k_shape(layer), self._v_shape(layer)
        k_size, v_size = math.prod(k_shape[1:]), math.prod(v_shape[1:])
        num_values = self.num_pages * layer.num_kv_heads * (k_size + v_size)
        num_bytes = num_values * self.dtype.itemsize
        whole = np.empty(num_bytes + MEMORY_PAGE_BYTES + REGISTER_BYTES, np.uint8)  # numpy asks for huge pages
        start = -whole.ctypes.data % MEMORY_PAGE_BYTES
        values = torch.from_numpy(whole)[start : start + num_bytes].view(self.dtype)
        heads = values.view(self.num_pages, layer.num_kv_heads, k_size + v_size)
        return heads[:, :, :k_size].unflatten(2, k_shape[1:]), heads[:, :, k_size:].unflatten(2, v_shape[1:])

    def _k_shape(self, layer: LayerKV) -> tuple[int, ...]:
        return (layer.num_kv_heads, layer.k_head_dim // self.width, self.page_size, self.width)

    def _v_shape(self, layer: LayerKV) -> tuple[int, ...]:
        return (layer.num_kv_heads, self.page_size // self.width, layer.v_head_dim, self.width)


_KINDS: dict[KVLayout, type[KVPool]] = {"nhd": KVPool, "pairs": KVPool, "lanes": LaneKVPool}


def register_pool(kind: type[KVPool]) -> None:
    """Make a kind of pool known by its layout."""
    _KINDS[kind.layout] = kind


def make_pool(
    layout: KVLayout,
    layers: Sequence[LayerKV],
    *,
    num_pages: int,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> KVPool:
    """A pool of that layout. Raises: ConfigError if the memory does not suffice."""
    return _KINDS[layout](layers, num_pages=num_pages, page_size=page_size, dtype=dtype, device=device)


def pool_bytes_per_token(layers: Sequence[LayerKV], dtype: torch.dtype) -> int:
    """KV bytes of one token over `layers`."""
    return sum(layer.num_kv_heads * (layer.k_head_dim + layer.v_head_dim) for layer in layers) * dtype.itemsize


def available_bytes(device: torch.device) -> int:
    """Memory on `device` that nothing uses now; on the CPU within the control group's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = int(psutil.virtual_memory().available)
    for limit_file, usage_file in CGROUP_FILES:
        limit, usage = _read_int(limit_file), _read_int(usage_file)
        if limit is not None and usage is not None:
            available = min(available, max(0, limit - usage))
    return available


def num_pages_that_fit(
    bytes_per_token: int,
    page_size: int,
    *,
    device: torch.device,
    mem_fraction: float | None = None,
    taken_bytes: int = 0,
) -> int:
    """How many pages `mem_fraction` of the free memory of `device` holds, beside `taken_bytes` of it.

    Raises: ConfigError if not even one does.
    """
    num_bytes = kv_budget_of(device, mem_fraction) - taken_bytes
    num_pages = num_bytes // (bytes_per_token * page_size)
    if num_pages < 1:
        raise ConfigError(
            f"a page of {page_size} tokens needs {page_size * bytes_per_token} bytes; mem_fraction allows {num_bytes} "
            f"of those free on {device}; free memory or raise mem_fraction"
        )
    return min(num_pages, (2**31 - 1) // page_size)


def kv_budget_of(device: torch.device, mem_fraction: float | None = None) -> int:
    """Bytes for KV: `mem_fraction` of the free memory of `device`, by default 0.85 of a GPU's and 0.4 of the CPU's."""
    fraction = mem_fraction if mem_fraction is not None else DEFAULT_MEM_FRACTION.get(device.type, 0.5)
    return int(available_bytes(device) * fraction)


def _read_int(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):  # no such control group, or "max": no limit
        return None
