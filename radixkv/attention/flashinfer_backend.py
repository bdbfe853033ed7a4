"""Attention on NVIDIA GPUs by FlashInfer's kernels, which read the pages in place."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from radixkv.attention.backend import (
    AttentionNeeds,
    AttentionParams,
    LayerAttention,
    why_not_keys_and_values,
)
from radixkv.attention.flashinfer_choice import DTYPES, why_not_fp4_here, why_not_here, why_not_layer
from radixkv.attention.flashinfer_plan import KindPlan, KindWrappers, first_tokens, page_lists, share
from radixkv.attention.metadata import AttentionMetadata
from radixkv.attention.shared_prefix import BreakEven, plan_cascade
from radixkv.errors import UnsupportedBackendError
from radixkv.kernels.flashinfer_paged import (
    NO_WINDOW,
    AttentionKind,
    GraphBuffers,
    KVPages,
    PagedDecode,
    PrefillBackend,
)
from radixkv.memory.fp4_codes import GLOBAL_SCALE
from radixkv.memory.kv_pool import KVLayout, KVPool
from radixkv.memory.quantized_pool import kv_bytes_per_token

DEVICE_TYPE = "cuda"
CODES = {  # what KV may be kept as besides, and how FlashInfer knows it
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "fp4": torch.uint8,
}
WORKSPACE_BYTES = 256 << 20  # partial results of KV that is split over many processors

# What a level of shared parts must spare each layer to pay for its three or so more kernels: 25 µs of reading at
# 4 TB/s. Two-level decodes of 128 sequences over 8 KV heads of 128 in 16 bit are known to be half as fast as plain ones
# where 128 tokens are shared (64 MiB spared), and twice as fast at 256.
LEVEL_BYTES = 100 << 20
MIN_SHARING_SEQUENCES = 4
MIN_SHARED_TOKENS = 256

# And what sharing must spare each layer to be faster than a graph of plain decodes: 250 µs, as long as Python takes to
# launch a layer's kernels one by one.
GRAPH_BYTES = 1 << 30


class LayerPages(NamedTuple):
    """What is computed of a layer, and its pages in the type that they are of."""

    kind: AttentionKind
    pages: KVPages


class FlashInferBackend:
    """KV in float16, bfloat16, fp8_e4m3, fp8_e5m2 and fp4 on CUDA.

    Sequences that compute one token run by the decode kernels and all others by the prefill kernels, one call each:
    in a joint prefill call the tiles are as high as the extends need, and a decode would leave them nearly empty.
    Layers that differ in heads, window or soft cap have plans of their own; each plan's layers run alike. Where several
    decodes share a prefix and it pays, the prefix is read once, level by level of the tree.

    Args:
        break_even: from where on a shared prefix is read once; as a default where it spares `LEVEL_BYTES` a layer.
        prefill: FlashInfer's implementation for extends; fa2 splits long cached KV over many processors, fa3 does not,
            and reads no fp4.

    Raises: UnsupportedBackendError if `prefill` cannot read such KV.
    """

    name = "flashinfer"

    def __init__(
        self,
        pool: KVPool,
        needs: AttentionNeeds,
        *,
        break_even: BreakEven | None = None,
        prefill: PrefillBackend = "fa2",
    ) -> None:
        if prefill == "fa3" and needs.kv_dtype == "fp4":
            raise UnsupportedBackendError("FlashInfer's fa3 reads no fp4 KV; take fa2 or auto")
        self.pool = pool
        self.num_layers = len(pool.layers)
        self._kv_dtype = needs.kv_dtype
        self._pages = [_pages(pool, layer, needs) for layer in range(self.num_layers)]
        self._break_even = break_even or _break_even(pool)
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=pool.device)
        self._kinds = [_kind(layer, needs) for layer in needs.layers]
        self._wrappers = {kind: KindWrappers(kind, self._workspace, prefill) for kind in dict.fromkeys(self._kinds)}
        self._graph_buffers: dict[AttentionKind, GraphBuffers] = {}

    @staticmethod
    def why_not(needs: AttentionNeeds) -> str | None:
        if (reason := why_not_keys_and_values(needs)) is not None:
            return reason
        if needs.kv_dtype not in ("auto", *CODES):
            return f"reads KV in the model's dtype or as {', '.join(CODES)}, not as {needs.kv_dtype}"
        if needs.device.type != DEVICE_TYPE:
            return f"runs on CUDA, and the model is on {needs.device}"
        if needs.dtype not in DTYPES:
            return f"reads float16 and bfloat16 KV, and the model's is {needs.dtype}"
        for number, layer in enumerate(needs.layers):
            if (reason := why_not_layer(layer)) is not None:
                return f"{reason}, as layer {number} asks"
        if needs.kv_dtype == "fp4" and (reason := why_not_fp4_here(needs.device)) is not None:
            return reason
        return why_not_here(needs.device)

    @staticmethod
    def leaves_to_others(needs: AttentionNeeds) -> bool:
        """True of fp4: nothing says that it is faster than Triton here, whose kernels need no CUDA compiler."""
        return needs.kv_dtype == "fp4"

    @staticmethod
    def layout(needs: AttentionNeeds) -> KVLayout:
        return "pairs" if needs.kv_dtype == "fp4" else "nhd"

    def plan(self, metadata: AttentionMetadata) -> FlashInferPlan:
        qo_lens = metadata.qo_lens
        decodes = share(metadata, np.flatnonzero(qo_lens == 1), self.pool.device)
        extends = share(metadata, np.flatnonzero(qo_lens > 1), self.pool.device)
        cascade = plan_cascade(metadata, self._break_even)
        of_kinds = {
            kind: wrappers.plan(metadata, decodes, extends, cascade) for kind, wrappers in self._wrappers.items()
        }
        return FlashInferPlan(self, metadata.slots, of_kinds)

    def pays_to_share(self, metadata: AttentionMetadata) -> bool:
        """Whether reading shared prefixes once, which a graph plan does not do, spares more than a graph would."""
        parts = plan_cascade(metadata, self._break_even).parts
        saved_tokens = sum((part.last - part.first) * (len(part.sequences) - 1) for part in parts)
        sharing = [
            layer for layer, kind in zip(self.pool.layers, self._kinds, strict=True) if kind.window_left == NO_WINDOW
        ]
        bytes_per_token = kv_bytes_per_token(sharing, self._kv_dtype, self.pool.dtype)
        return saved_tokens * bytes_per_token > self.num_layers * GRAPH_BYTES

    def graph_plan(self, slots: Tensor, max_pages: int) -> FlashInferGraphPlan:
        """See `GraphableBackend`. All graph plans use the same workspace and the same buffers."""
        batch_size = len(slots)
        for kind in self._wrappers:
            buffers = self._graph_buffers.get(kind)
            if buffers is None or not buffers.holds(batch_size, max_pages):
                self._graph_buffers[kind] = GraphBuffers.empty(batch_size, max_pages, self.pool.device)
        decodes = {
            kind: PagedDecode(kind, self._workspace, buffers.first(batch_size))
            for kind, buffers in self._graph_buffers.items()
        }
        return FlashInferGraphPlan(self, slots, decodes)

    def layer(self, number: int) -> LayerPages:
        """What the kernels must know of a layer."""
        return LayerPages(self._kinds[number], self._pages[number])


class FlashInferPlan:
    """The attention of one batch, by wrappers that are planned for it. See `AttentionPlan`."""

    def __init__(self, backend: FlashInferBackend, slots: Tensor, of_kinds: dict[AttentionKind, KindPlan]) -> None:
        self._backend, self._slots, self._of_kinds = backend, slots, of_kinds

    def store_kv(self, layer: int, k: Tensor, v: Tensor) -> None:
        self._backend.pool.write(layer, self._slots, k, v)

    def attend(self, layer: int, q: Tensor, params: AttentionParams) -> Tensor:
        kind, pages = self._backend.layer(layer)
        assert _window_left(params) == kind.window_left, f"layer {layer} changed its window"
        return self._of_kinds[kind].attend(q.contiguous(), pages)


class FlashInferGraphPlan:
    """Decodes of one batch size, by wrappers over buffers that stay. See `GraphPlan`."""

    def __init__(self, backend: FlashInferBackend, slots: Tensor, decodes: dict[AttentionKind, PagedDecode]) -> None:
        self._backend, self._slots, self._decodes = backend, slots, decodes

    def update(self, metadata: AttentionMetadata) -> None:
        sequences = np.arange(metadata.num_sequences)
        batch_size = len(self._slots)
        assert metadata.num_sequences == metadata.num_tokens == batch_size, "not the batch that was captured"
        for kind, decode in self._decodes.items():
            decode.plan(page_lists(metadata, sequences, first_tokens(metadata, kind.window_left)))

    def store_kv(self, layer: int, k: Tensor, v: Tensor) -> None:
        self._backend.pool.write(layer, self._slots, k, v)

    def attend(self, layer: int, q: Tensor, params: AttentionParams) -> Tensor:
        kind, pages = self._backend.layer(layer)
        q = q.contiguous()
        out = torch.empty_like(q)
        self._decodes[kind].run(q, pages, out)
        return out


def _break_even(pool: KVPool) -> BreakEven:
    layer_bytes_per_token = pool.bytes_per_token / len(pool.layers)
    return BreakEven(MIN_SHARING_SEQUENCES, MIN_SHARED_TOKENS, round(LEVEL_BYTES / layer_bytes_per_token))


def _kind(layer: LayerAttention, needs: AttentionNeeds) -> AttentionKind:
    return AttentionKind(
        num_q_heads=layer.num_q_heads,
        num_kv_heads=layer.kv.num_kv_heads,
        head_dim=layer.kv.k_head_dim,
        page_size=needs.page_size,
        dtype=needs.dtype,
        kv_dtype=CODES.get(needs.kv_dtype, needs.dtype),
        scale=layer.params.scale,
        window_left=_window_left(layer.params),
        softcap=layer.params.softcap or 0.0,
        global_scale=GLOBAL_SCALE if needs.kv_dtype == "fp4" else None,
    )


def _pages(pool: KVPool, layer: int, needs: AttentionNeeds) -> KVPages:
    """A layer's pages as FlashInfer's types; views of the pool's."""
    kv_dtype = CODES.get(needs.kv_dtype, needs.dtype)
    k, v = pool.k[layer].view(kv_dtype), pool.v[layer].view(kv_dtype)
    if needs.kv_dtype != "fp4":
        return KVPages(k, v)
    assert pool.layout == "pairs", f"FlashInfer would read codes in {pool.layout} as if neighbours shared a byte"
    k_scales, v_scales = (scales[layer].view(torch.float8_e4m3fn) for scales in (pool.k_scales, pool.v_scales))
    return KVPages(k, v, (k_scales, v_scales))


def _window_left(params: AttentionParams) -> int:
    return NO_WINDOW if params.sliding_window is None else params.sliding_window - 1
