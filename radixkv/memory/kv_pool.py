"""The bytes: per layer the pages of K and of V, and how many of them fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from torch import Tensor

from radixkv.errors import ConfigError
from radixkv.memory.kv_shape import LayerKV

CGROUP_FILES = (  # (limit, usage) of version 2 and version 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
DEFAULT_MEM_FRACTION = {"cpu": 0.4, "cuda": 0.85}


class KVPool:
    """Keys and values of every layer, in pages.

    Attributes:
        k, v: per layer a tensor [num_pages, page_size, num_kv_heads, head_dim] (FlashInfer's NHD).

    The memory is not touched before it is written, so the CPU's pages of it are committed as they are used.

    Raises: ConfigError if the memory does not suffice.
    """

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

        def pages(num_heads: int, head_dim: int) -> Tensor:
            return torch.empty(num_pages, page_size, num_heads, head_dim, dtype=dtype, device=device)

        try:
            self.k = [pages(layer.num_kv_heads, layer.k_head_dim) for layer in self.layers]
            self.v = [pages(layer.num_kv_heads, layer.v_head_dim) for layer in self.layers]
        except RuntimeError as error:  # torch has no narrower error for the CPU's memory
            raise ConfigError(
                f"no room on {device} for a KV pool of {num_pages * page_size} tokens of {self.bytes_per_token} bytes; "
                "set a smaller kv_cache_tokens or mem_fraction"
            ) from error

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
        self.k[layer].flatten(0, 1).index_copy_(0, slots, k.to(self.dtype))
        self.v[layer].flatten(0, 1).index_copy_(0, slots, v.to(self.dtype))

    def copy_page(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the KV of the first `num_tokens` slots of page `source` to page `target`, in every layer."""
        for pages in (*self.k, *self.v):
            pages[target, :num_tokens].copy_(pages[source, :num_tokens])


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
    bytes_per_token: int, page_size: int, *, device: torch.device, mem_fraction: float | None = None
) -> int:
    """How many pages `mem_fraction` of the free memory of `device` holds.

    Raises: ConfigError if not even one does.
    """
    fraction = mem_fraction if mem_fraction is not None else DEFAULT_MEM_FRACTION.get(device.type, 0.5)
    free_bytes = available_bytes(device)
    num_pages = int(free_bytes * fraction) // (bytes_per_token * page_size)
    if num_pages < 1:
        raise ConfigError(
            f"{fraction:.0%} of the {free_bytes} bytes free on {device} hold no page of {page_size} tokens at "
            f"{bytes_per_token} bytes a token; free memory or raise mem_fraction"
        )
    return min(num_pages, (2**31 - 1) // page_size)


def _read_int(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):  # no such control group, or "max": no limit
        return None
