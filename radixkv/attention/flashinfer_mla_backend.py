"""Latent attention (MLA) on NVIDIA GPUs by FlashInfer's kernel, which reads the pages in place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from radixkv.attention.backend import AttentionNeeds, AttentionParams, LayerAttention
from radixkv.attention.flashinfer_choice import DTYPES, why_not_here
from radixkv.attention.latent_backend import why_not_latents
from radixkv.attention.metadata import AttentionMetadata
from radixkv.kernels.flashinfer_mla import LatentBatch, LatentGraphBuffers, LatentKind, PagedLatents
from radixkv.memory.kv_pool import KVLayout, KVPool
from radixkv.memory.latent_pool import LatentKV

DEVICE_TYPE = "cuda"
LATENT_DIM, ROPE_DIM = 512, 64  # for which the kernels are made: DeepSeek-V2 and -V3, Kimi-K2, GLM-4.7-Flash
KNOWN_LATENTS = LatentKV.of(latent_dim=LATENT_DIM, rope_dim=ROPE_DIM)
WORKSPACE_BYTES = 128 << 20  # partial results of latents that are split over many processors


class FlashInferLatentBackend:
    """Float16 and bfloat16 latents on CUDA, all sequences of a batch in one call a layer.

    Layers that differ in heads or scale have plans of their own. Prefixes that decodes share are read by each of them:
    128 heads do some 240 operations with each byte of a latent, about as many as an H100 does while it reads one.
    """

    name = "flashinfer_mla"

    def __init__(self, pool: KVPool, needs: AttentionNeeds) -> None:
        self.pool = pool
        self.num_layers = len(pool.layers)
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=pool.device)
        self._kinds = [_kind(layer, needs) for layer in needs.layers]
        self._wrappers = {kind: PagedLatents(kind, self._workspace) for kind in dict.fromkeys(self._kinds)}
        self._graph_buffers: dict[LatentKind, LatentGraphBuffers] = {}

    @staticmethod
    def why_not(needs: AttentionNeeds) -> str | None:
        if needs.device.type != DEVICE_TYPE:
            return f"runs on CUDA, and the model is on {needs.device}"
        if needs.dtype not in DTYPES:
            return f"reads float16 and bfloat16 latents, and the model's are {needs.dtype}"
        if (reason := why_not_latents(needs)) is not None:
            return reason
        for kv in (layer.kv for layer in needs.layers):
            if kv != KNOWN_LATENTS:
                return f"knows latents of {LATENT_DIM} with rotary keys of {ROPE_DIM}, not {kv}"
        return why_not_here(needs.device)

    @staticmethod
    def layout(needs: AttentionNeeds) -> KVLayout:
        return "latent"

    def plan(self, metadata: AttentionMetadata) -> FlashInferLatentPlan:
        for wrapper in self._wrappers.values():
            wrapper.plan(_batch(metadata))
        return FlashInferLatentPlan(self.pool, metadata.slots, self._kinds, self._wrappers)

    def pays_to_share(self, metadata: AttentionMetadata) -> bool:
        """Nothing is read once for several sequences, with or without a graph."""
        return False

    def graph_plan(self, slots: Tensor, max_pages: int) -> FlashInferLatentGraphPlan:
        """See `GraphableBackend`. All graph plans use the same workspace and the same buffers."""
        batch_size = len(slots)
        for kind in self._wrappers:
            buffers = self._graph_buffers.get(kind)
            if buffers is None or not buffers.holds(batch_size, max_pages):
                self._graph_buffers[kind] = LatentGraphBuffers.empty(batch_size, max_pages, self.pool.device)
        wrappers = {
            kind: PagedLatents(kind, self._workspace, buffers.first(batch_size))
            for kind, buffers in self._graph_buffers.items()
        }
        return FlashInferLatentGraphPlan(self.pool, slots, self._kinds, wrappers)


class FlashInferLatentPlan:
    """The attention of one batch, by wrappers that are planned for it. See `AttentionPlan`."""

    def __init__(
        self, pool: KVPool, slots: Tensor, kinds: Sequence[LatentKind], wrappers: dict[LatentKind, PagedLatents]
    ) -> None:
        self._pool, self._slots, self._kinds, self._wrappers = pool, slots, kinds, wrappers

    def store_kv(self, layer: int, k: Tensor, v: Tensor) -> None:
        self._pool.write(layer, self._slots, k, v)

    def attend(self, layer: int, q: Tensor, params: AttentionParams) -> Tensor:
        kind = self._kinds[layer]
        assert params.scale == kind.scale, f"layer {layer} changed its scale"
        return self._wrappers[kind].run(q, self._pool.k[layer].squeeze(2))


class FlashInferLatentGraphPlan(FlashInferLatentPlan):
    """Decodes of one batch size, by wrappers over buffers that stay. See `GraphPlan`."""

    def update(self, metadata: AttentionMetadata) -> None:
        batch_size = len(self._slots)
        assert metadata.num_sequences == metadata.num_tokens == batch_size, "not the batch that was captured"
        for wrapper in self._wrappers.values():
            wrapper.plan(_batch(metadata))


def _kind(layer: LayerAttention, needs: AttentionNeeds) -> LatentKind:
    return LatentKind(
        num_heads=layer.num_q_heads,
        latent_dim=LATENT_DIM,
        rope_dim=ROPE_DIM,
        page_size=needs.page_size,
        dtype=needs.dtype,
        scale=layer.params.scale,
    )


def _batch(metadata: AttentionMetadata) -> LatentBatch:
    return LatentBatch(
        metadata.qo_indptr, metadata.kv_indptr, metadata.kv_indices, metadata.kv_lens.astype(np.int32, copy=False)
    )
