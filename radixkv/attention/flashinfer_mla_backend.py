"""Latent attention (MLA) on NVIDIA GPUs by FlashInfer's kernel, which reads the pages in place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from radixkv.attention.backend import AttentionNeeds, AttentionParams, LayerAttention
from radixkv.attention.flashinfer_backend import DTYPES, _why_not_here
from radixkv.attention.latent_backend import why_not_latents
from radixkv.attention.metadata import AttentionMetadata
from radixkv.kernels.flashinfer_mla import LatentBatch, LatentGraphBuffers, LatentKind, PagedLatents
from radixkv.memory.kv_pool import KVLayout, KVPool
from radixkv.memory.latent_pool import LatentKV

DEVICE_TYPE = "cuda"
LATENT_DIM, ROPE_DIM = 512, 64  # for which the kernels are made: DeepSeek-V2 and -V3, Kimi-K2, GLM-4.7-Flash
WORKSPACE_BYTES = 128 << 20  # partial results of latents that are split over many processors


class FlashInferLatentBackend:
    """Float16 and bfloat16 latents on CUDA, all sequences of a batch in one call a layer.

    Layers that differ in heads or scale have plans of their own. Prefixes that decodes share are read by each of them:
    128 heads do some 240 operations with each byte of a latent, about as many as an H100 does while it reads one.
    """

    name = "flashinfer_mla"

    def __init__(self, pool: KVPool, needs: AttentionNeeds) -> None:
        self.pool = pool
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=pool.device)
        self._kinds = [_kind(layer, needs) for layer in needs.layers]
        self._plans = {kind: PagedLatents(kind, self._workspace) for kind in dict.fromkeys(self._kinds)}
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
            if not isinstance(kv, LatentKV) or (kv.latent_dim, kv.rope_dim) != (LATENT_DIM, ROPE_DIM):
                return f"knows latents of {LATENT_DIM} with rotary keys of {ROPE_DIM}, not {kv}"
        return _why_not_here(needs.device)

    @staticmethod
    def layout(needs: AttentionNeeds) -> KVLayout:
        return "latent"

    @property
    def num_layers(self) -> int:
        return len(self.pool.layers)

    def plan(self, metadata: AttentionMetadata) -> None:
        for plan in self._plans.values():
            plan.plan(_batch(metadata))

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        self.pool.write(layer, slots, k, v)

    def run(self, layer: int, q: Tensor, params: AttentionParams) -> Tensor:
        kind = self._kinds[layer]
        assert params.scale == kind.scale, f"layer {layer} changed its scale"
        return self._plans[kind].run(q, self.pool.k[layer].squeeze(2))

    def pays_to_share(self, metadata: AttentionMetadata) -> bool:
        """Nothing is read once for several sequences, with or without a graph."""
        return False

    def fixed(self, batch_size: int, max_pages: int) -> FixedFlashInferLatentBackend:
        """A backend over the same pool for exactly `batch_size` decodes with `max_pages` pages at most.

        Its `run` may be captured in a CUDA graph; `plan` before each replay. All of them use the same workspace and the
        same buffers, so one runs at a time; make the largest first.
        """
        for kind in self._plans:
            buffers = self._graph_buffers.get(kind)
            if buffers is None or not buffers.holds(batch_size, max_pages):
                self._graph_buffers[kind] = LatentGraphBuffers.empty(batch_size, max_pages, self.pool.device)
        plans = {
            kind: PagedLatents(kind, self._workspace, buffers.first(batch_size))
            for kind, buffers in self._graph_buffers.items()
        }
        return FixedFlashInferLatentBackend(self.pool, self._kinds, plans, batch_size)


class FixedFlashInferLatentBackend:
    """Decodes of one batch size, for a CUDA graph; made by `FlashInferLatentBackend.fixed`."""

    name = "flashinfer_mla"

    def __init__(
        self, pool: KVPool, kinds: Sequence[LatentKind], plans: dict[LatentKind, PagedLatents], batch_size: int
    ) -> None:
        self.pool = pool
        self._kinds = kinds
        self._plans = plans
        self._batch_size = batch_size

    @property
    def num_layers(self) -> int:
        return len(self.pool.layers)

    def plan(self, metadata: AttentionMetadata) -> None:
        assert metadata.num_sequences == metadata.num_tokens == self._batch_size, "not the batch that was captured"
        for plan in self._plans.values():
            plan.plan(_batch(metadata))

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        self.pool.write(layer, slots, k, v)

    def run(self, layer: int, q: Tensor, params: AttentionParams) -> Tensor:
        return self._plans[self._kinds[layer]].run(q, self.pool.k[layer].squeeze(2))


def _kind(layer: LayerAttention, needs: AttentionNeeds) -> LatentKind:
    assert isinstance(layer.kv, LatentKV), "why_not was not asked"
    return LatentKind(
        num_heads=layer.num_q_heads,
        latent_dim=layer.kv.latent_dim,
        rope_dim=layer.kv.rope_dim,
        page_size=needs.page_size,
        dtype=needs.dtype,
        scale=layer.params.scale,
    )


def _batch(metadata: AttentionMetadata) -> LatentBatch:
    return LatentBatch(
        metadata.qo_indptr, metadata.kv_indptr, metadata.kv_indices, metadata.kv_lens.astype(np.int32, copy=False)
    )
