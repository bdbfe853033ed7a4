"""A pool that keeps keys and values as codes of 8 or 4 bits, so that two to four times as many tokens fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from radixkv.errors import ConfigError
from radixkv.memory.kv_codes import KVCode, code_form, decode, encode, is_quantized, rotate, rotate_back
from radixkv.memory.kv_pool import KVLayout, KVPool, make_pool, pool_bytes_per_token
from radixkv.memory.kv_shape import LayerKV
from radixkv.memory.packing import HALVES, PAIRS


class QuantizedKVPool(KVPool):
    """Keys and values as `kv_codes` has them, behind the verbs of `KVPool`; what they return is `dtype`.

    Attributes:
        k, v: the codes, uint8, as `KVPool` or `LaneKVPool` lays bytes out; in int4 and fp4 a byte holds two components,
            neighbours in the layout "pairs" and else as `HALVES` says.
        k_scales, v_scales: per layer [num_pages, num_kv_heads, num_scales, page_size] in lanes and
            [num_pages, page_size, num_kv_heads, num_scales] else, of the form's `scale_dtype`.
        dtype: of the values; the codes are bytes.

    Invariant: a slot's codes and scales are of one token, and say all about it.

    Raises: ConfigError if the memory does not suffice, or codes of a head do not fill whole bytes or blocks.
    """

    holds_codes = True

    def __init__(
        self,
        layout: KVLayout,
        layers: Sequence[LayerKV],
        *,
        kv_dtype: str,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.form = code_form(kv_dtype)
        self._code = cast(KVCode, kv_dtype)
        self.layers, self.layout = tuple(layers), layout
        self._packing = PAIRS if layout == "pairs" else HALVES
        self.num_pages, self.page_size = num_pages, page_size
        self.dtype, self.device = dtype, torch.device(device)
        self._check_head_dims()
        shape = {"num_pages": num_pages, "page_size": page_size}
        self._codes = make_pool(layout, self._of_codes(), **shape, dtype=torch.uint8, device=device)
        self.k, self.v = self._codes.k, self._codes.v
        self._scales = _ScalePages(layout, self._of_scales(), **shape, dtype=self.form.scale_dtype, device=self.device)
        self.k_scales, self.v_scales = self._scales.k, self._scales.v

    @property
    def kv_dtype(self) -> str:
        return self._code

    @property
    def bytes_per_token(self) -> int:
        return quantized_bytes_per_token(self.layers, self.kv_dtype)

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        (k_codes, k_scales), (v_codes, v_scales) = self.encode_kv(k, v)
        self._codes.write(layer, slots, k_codes, v_codes)
        self._scales.write(layer, slots, k_scales, v_scales)

    def gather(self, layer: int, pages: Tensor) -> tuple[Tensor, Tensor]:
        k_codes, v_codes = self._codes.gather(layer, pages)
        k_scales, v_scales = self._scales.gather(layer, pages)
        k = decode(self._code, k_codes, k_scales, self._packing)
        v = decode(self._code, v_codes, v_scales, self._packing)
        if self.form.rotates_keys:
            k = rotate_back(k)
        return k.to(self.dtype), v.to(self.dtype)

    def as_kept(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        (k_codes, _), (v_codes, _) = self.encode_kv(k, v)
        return k_codes, v_codes

    def page_tensors(self, page: int) -> list[Tensor]:
        return [*self._codes.page_tensors(page), *self._scales.page_tensors(page)]

    def page_blocks(self) -> list[Tensor]:
        return [*self._codes.page_blocks(), *self._scales.page_blocks()]

    def encode_kv(self, k: Tensor, v: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Codes and scales of k and of v, [tokens, num_kv_heads, head_dim] each."""
        return encode(self._code, self.queries(k), self._packing), encode(self._code, v, self._packing)

    def queries(self, q: Tensor) -> Tensor:
        """What is to be multiplied with K's values as they are coded: [..., k_head_dim], rotated if K is."""
        return rotate(q) if self.form.rotates_keys else q

    def _of_codes(self) -> list[LayerKV]:
        """The layers' bytes of codes."""
        per_byte = self.form.codes_per_byte
        return [LayerKV(kv.num_kv_heads, kv.k_head_dim // per_byte, kv.v_head_dim // per_byte) for kv in self.layers]

    def _of_scales(self) -> list[LayerKV]:
        """The layers' scales, K's and V's."""
        count = self.form.num_scales
        return [LayerKV(kv.num_kv_heads, count(kv.k_head_dim), count(kv.v_head_dim)) for kv in self.layers]

    def _check_head_dims(self) -> None:
        for kv in self.layers:
            for dim in (kv.k_head_dim, kv.v_head_dim):
                if (reason := self.form.why_not(dim)) is not None:
                    raise ConfigError(f"{self.kv_dtype} KV {reason}; take int8")


class _ScalePages:
    """The scales of the codes, in pages of the same tokens."""

    def __init__(
        self,
        layout: KVLayout,
        layers: Sequence[LayerKV],
        *,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._in_lanes, self._page_size = layout == "lanes", page_size

        def empty(num_kv_heads: int, num_scales: int) -> Tensor:
            shape = (num_kv_heads, num_scales, page_size) if self._in_lanes else (page_size, num_kv_heads, num_scales)
            return torch.empty(num_pages, *shape, dtype=dtype, device=device)

        with torch.inference_mode(False):  # as in `KVPool`
            self.k = [empty(kv.num_kv_heads, kv.k_head_dim) for kv in layers]
            self.v = [empty(kv.num_kv_heads, kv.v_head_dim) for kv in layers]

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store those of tokens, [tokens, num_kv_heads, num_scales]."""
        for pages, scales in ((self.k[layer], k), (self.v[layer], v)):
            if pages.numel() == 0:  # a form without scales
                continue
            if self._in_lanes:
                pages[slots // self._page_size, :, :, slots % self._page_size] = scales
            else:
                pages.flatten(0, 1).index_copy_(0, slots, scales)

    def gather(self, layer: int, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Those of pages, [n * page_size, num_kv_heads, num_scales]."""
        k, v = (scales[layer].index_select(0, pages) for scales in (self.k, self.v))
        if self._in_lanes:
            k, v = k.permute(0, 3, 1, 2), v.permute(0, 3, 1, 2)
        return k.flatten(0, 1), v.flatten(0, 1)

    def page_tensors(self, page: int) -> list[Tensor]:
        """As `PagePool.page_tensors`."""
        tokens_at = 2 if self._in_lanes else 0
        return [pages[page].movedim(tokens_at, 0).unsqueeze(1) for pages in (*self.k, *self.v)]

    def page_blocks(self) -> list[Tensor]:
        """As `KVPool.page_blocks`."""
        return [pages.flatten(1) for pages in (*self.k, *self.v) if pages.numel()]


def make_kv_pool(
    layout: KVLayout,
    layers: Sequence[LayerKV],
    *,
    kv_dtype: str,
    num_pages: int,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> KVPool:
    """A pool of that layout which keeps KV as `kv_dtype` says; "auto" keeps it in `dtype`.

    Raises: ConfigError if there is no such form, or the memory does not suffice.
    """
    shape = {"num_pages": num_pages, "page_size": page_size}
    if kv_dtype == "auto":
        return make_pool(layout, layers, **shape, dtype=dtype, device=device)
    return QuantizedKVPool(layout, layers, kv_dtype=kv_dtype, **shape, dtype=dtype, device=device)


def kv_bytes_per_token(layers: Sequence[LayerKV], kv_dtype: str, dtype: torch.dtype) -> int:
    """Bytes of one token over `layers` in the pool that `make_kv_pool` makes, scales included.

    >>> [kv_bytes_per_token([LayerKV(2, 64, 64)], form, torch.bfloat16) for form in ("auto", "int8", "int4", "fp4")]
    [512, 264, 144, 144]
    """
    if is_quantized(kv_dtype):
        return quantized_bytes_per_token(layers, kv_dtype)
    return pool_bytes_per_token(layers, dtype)


def quantized_bytes_per_token(layers: Sequence[LayerKV], kv_dtype: str) -> int:
    """KV bytes of one token over `layers` as codes and scales."""
    form = code_form(kv_dtype)
    return sum(
        kv.num_kv_heads * (form.bytes_per_vector(kv.k_head_dim) + form.bytes_per_vector(kv.v_head_dim)) for kv in layers
    )
