"""Attention by torch's own kernels over gathered KV: runs everywhere, for every head size, dtype and option."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from radixkv.attention.backend import AttentionNeeds, AttentionParams
from radixkv.attention.dense_extends import CHUNK_TOKENS, DenseExtends, limits
from radixkv.attention.metadata import AttentionMetadata
from radixkv.kernels.torch_reference import dense_attention, visible_mask
from radixkv.memory.kv_pool import KVLayout, KVPool


class TorchBackend:
    """Gathers each sequence's KV and runs `scaled_dot_product_attention`; decodes go in padded batches.

    Cost of a layer: one copy of all KV that the batch reads, and dense attention.
    """

    name = "torch"

    def __init__(self, pool: KVPool, needs: AttentionNeeds) -> None:
        self.pool = pool
        self._dense = DenseExtends(pool)
        self._decodes: NDArray[np.intp] = np.empty(0, np.intp)
        self._decode_rows = torch.empty(0, dtype=torch.int64)
        self._metadata: AttentionMetadata | None = None

    @staticmethod
    def why_not(needs: AttentionNeeds) -> str | None:
        """Nothing stops it."""
        return None

    @staticmethod
    def layout(needs: AttentionNeeds) -> KVLayout:
        """Any would do."""
        return "nhd"

    @property
    def num_layers(self) -> int:
        """Layers of the pool."""
        return len(self.pool.layers)

    @property
    def metadata(self) -> AttentionMetadata:
        """The planned batch."""
        assert self._metadata is not None, "run before plan"
        return self._metadata

    def plan(self, metadata: AttentionMetadata) -> None:
        self._metadata = metadata
        qo_lens = metadata.qo_lens
        self._decodes = np.flatnonzero(qo_lens == 1)
        self._decode_rows = self._tensor(metadata.qo_indptr[self._decodes])
        self._dense.plan(metadata, np.flatnonzero(qo_lens > 1))

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        self.pool.write(layer, slots, k, v)

    def run(self, layer: int, q: Tensor, params: AttentionParams) -> Tensor:
        out = q.new_empty(q.shape[0], q.shape[1], self.pool.layers[layer].v_head_dim)
        self._dense.run(layer, q, params, out)
        if len(self._decodes):
            out[self._decode_rows] = self._decode(layer, q[self._decode_rows], params)
        return out

    # -- one token of each of many sequences -------------------------------------------------------------------------

    def _decode(self, layer: int, q: Tensor, params: AttentionParams) -> Tensor:
        kv_lens = self.metadata.kv_lens[self._decodes]
        by_length = np.argsort(kv_lens, kind="stable")
        out = q.new_empty(q.shape[0], q.shape[1], self.pool.layers[layer].v_head_dim)
        end = len(by_length)
        while end > 0:
            longest = int(kv_lens[by_length[end - 1]])
            chunk = by_length[max(0, end - max(1, CHUNK_TOKENS // longest)) : end]
            rows = torch.from_numpy(chunk).to(q.device)
            out[rows] = self._decode_padded(layer, q[rows], chunk, longest, params)
            end -= len(chunk)
        return out

    def _decode_padded(
        self, layer: int, q: Tensor, chunk: NDArray[np.intp], longest: int, params: AttentionParams
    ) -> Tensor:
        slots = self._slots(self._decodes[chunk], longest)  # [batch, longest]
        k = self.pool.k[layer].flatten(0, 1)[slots].transpose(1, 2)  # [batch, num_kv_heads, longest, k_head_dim]
        v = self.pool.v[layer].flatten(0, 1)[slots].transpose(1, 2)
        kv_lens = torch.from_numpy(self.metadata.kv_lens[self._decodes[chunk]]).to(q.device, torch.int64)
        visible = visible_mask(kv_lens - 1, longest, **limits(params))  # [batch, longest]
        grouped = q.unflatten(1, (k.shape[1], -1))  # [batch, num_kv_heads, group, k_head_dim]
        if params.softcap is None and params.sinks is None:
            mask = visible[:, None, None, :]
            return scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=params.scale).flatten(1, 2)
        rows = [
            dense_attention(
                q[i : i + 1],
                k[i].transpose(0, 1),
                v[i].transpose(0, 1),
                visible[i : i + 1],
                scale=params.scale,
                softcap=params.softcap,
                sinks=params.sinks,
            )
            for i in range(len(chunk))
        ]
        return torch.cat(rows)

    def _tensor(self, indices: NDArray[Any]) -> Tensor:
        return torch.from_numpy(indices).to(self.pool.device, torch.int64)

    def _slots(self, sequences: NDArray[np.intp], length: int) -> Tensor:
        """Slots of the first `length` tokens of each sequence, int64 [sequences, length].

        Past a sequence's end stands its first slot: its KV was written, so what a mask hides is never garbage.
        """
        metadata = self.metadata
        tokens = np.arange(length)
        page_index = metadata.kv_indptr[sequences][:, None] + tokens // metadata.page_size
        inside = tokens < metadata.kv_lens[sequences][:, None]
        page_index = np.where(inside, page_index, metadata.kv_indptr[sequences][:, None])
        offsets = np.where(inside, tokens % metadata.page_size, 0)
        slots = metadata.kv_indices[page_index].astype(np.int64) * metadata.page_size + offsets
        return torch.from_numpy(slots).to(self.pool.device)
