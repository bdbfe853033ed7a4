"""Attention by `kernels.torch_reference`, request by request: the specification, to check other backends against."""

from __future__ import annotations

import torch
from torch import Tensor

from radixkv.attention.backend import AttentionNeeds, AttentionParams, why_not_keys_and_values
from radixkv.attention.metadata import AttentionMetadata
from radixkv.kernels.torch_reference import paged_attention
from radixkv.memory.kv_pool import KVLayout, KVPool


class ReferenceBackend:
    """Runs anywhere, in any dtype, and is slow."""

    name = "reference"

    def __init__(self, pool: KVPool, needs: AttentionNeeds) -> None:
        self.pool = pool
        self.num_layers = len(pool.layers)

    @staticmethod
    def why_not(needs: AttentionNeeds) -> str | None:
        """Only latents stop it."""
        return why_not_keys_and_values(needs)

    @staticmethod
    def layout(needs: AttentionNeeds) -> KVLayout:
        """Any would do."""
        return "nhd"

    def plan(self, metadata: AttentionMetadata) -> ReferencePlan:
        return ReferencePlan(self.pool, metadata)


class ReferencePlan:
    """The attention of one batch. See `AttentionPlan`."""

    def __init__(self, pool: KVPool, metadata: AttentionMetadata) -> None:
        self._pool, self._metadata = pool, metadata

    def store_kv(self, layer: int, k: Tensor, v: Tensor) -> None:
        self._pool.write(layer, self._metadata.slots, k, v)

    def attend(self, layer: int, q: Tensor, params: AttentionParams) -> Tensor:
        pages = torch.from_numpy(self._metadata.kv_indices).to(q.device, torch.int64)
        k, v = (x.unflatten(0, (-1, self._pool.page_size)) for x in self._pool.gather(layer, pages))
        return paged_attention(
            q,
            k,
            v,
            qo_indptr=self._metadata.qo_indptr.tolist(),
            kv_indptr=self._metadata.kv_indptr.tolist(),
            kv_indices=torch.arange(len(pages), dtype=torch.int64, device=q.device),
            kv_lens=self._metadata.kv_lens.tolist(),
            scale=params.scale,
            sliding_window=params.sliding_window,
            chunk_size=params.chunk_size,
            softcap=params.softcap,
            sinks=params.sinks,
            sink_tokens=params.sink_tokens,
            sink_queries=params.sink_queries,
            key_bias=None if params.key_bias is None else params.key_bias.table(int(self._metadata.kv_lens.max())),
        )
