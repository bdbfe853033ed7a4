"""Attention by torch's own kernels over gathered KV: runs everywhere, for every head size, dtype and option."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from radixkv.attention.backend import AttentionNeeds, AttentionParams, why_not_keys_and_values
from radixkv.attention.dense_extends import CHUNK_TOKENS, DenseExtends, is_plain, limits
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
        self.num_layers = len(pool.layers)

    @staticmethod
    def why_not(needs: AttentionNeeds) -> str | None:
        """Only latents stop it."""
        return why_not_keys_and_values(needs)

    @staticmethod
    def layout(needs: AttentionNeeds) -> KVLayout:
        """Any would do."""
        return "nhd"

    def plan(self, metadata: AttentionMetadata) -> TorchPlan:
        return TorchPlan(self.pool, metadata)


class TorchPlan:
    """The attention of one batch. See `AttentionPlan`."""

    def __init__(self, pool: KVPool, metadata: AttentionMetadata) -> None:
        self._pool, self._metadata = pool, metadata
        qo_lens = metadata.qo_lens
        self._decodes = np.flatnonzero(qo_lens == 1)
        self._decode_rows = self._tensor(metadata.qo_indptr[self._decodes])
        self._extends = DenseExtends(pool, metadata, np.flatnonzero(qo_lens > 1))

    def store_kv(self, layer: int, k: Tensor, v: Tensor) -> None:
        self._pool.write(layer, self._metadata.slots, k, v)

    def attend(self, layer: int, q: Tensor, params: AttentionParams) -> Tensor:
        out = q.new_empty(q.shape[0], q.shape[1], self._pool.layers[layer].v_head_dim)
        self._extends.attend(layer, q, params, out)
        if len(self._decodes):
            out[self._decode_rows] = self._decode(layer, q[self._decode_rows], params)
        return out

    # -- one token of each of many sequences -------------------------------------------------------------------------

    def _decode(self, layer: int, q: Tensor, params: AttentionParams) -> Tensor:
        kv_lens = self._metadata.kv_lens[self._decodes]
        by_length = np.argsort(kv_lens, kind="stable")
        out = q.new_empty(q.shape[0], q.shape[1], self._pool.layers[layer].v_head_dim)
        end = len(by_length)
        while end > 0:
            longest = int(kv_lens[by_length[end - 1]])
            chunk = by_length[max(0, end - max(1, CHUNK_TOKENS // longest)) : end]
            rows = torch.from_numpy(chunk).to(q.device)
            own = params
            if params.sink_queries is not None:
                own = replace(params, sink_queries=params.sink_queries[self._decode_rows[rows]])
            out[rows] = self._decode_padded(layer, q[rows], chunk, longest, own)
            end -= len(chunk)
        return out

    def _decode_padded(
        self, layer: int, q: Tensor, chunk: NDArray[np.intp], longest: int, params: AttentionParams
    ) -> Tensor:
        kv_lens = torch.from_numpy(self._metadata.kv_lens[self._decodes[chunk]]).to(q.device, torch.int64)
        k, v = self._gather(layer, self._decodes[chunk], kv_lens)  # [batch, num_kv_heads, longest, head_dim]
        visible = visible_mask(kv_lens - 1, longest, **limits(params))  # [batch, longest]
        grouped = q.unflatten(1, (k.shape[1], -1))  # [batch, num_kv_heads, group, k_head_dim]
        bias = None if params.key_bias is None else params.key_bias.between(kv_lens - 1, longest)
        if is_plain(params):
            mask = visible[:, None, None, :]
            if bias is not None:  # [num_q_heads, batch, longest]
                of_groups = bias.transpose(0, 1).unflatten(1, grouped.shape[1:3]).to(q.dtype)
                mask = of_groups.masked_fill(~mask, float("-inf"))
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
                sink_tokens=params.sink_tokens,
                sink_queries=None if params.sink_queries is None else params.sink_queries[i : i + 1],
                bias=None if bias is None else bias[:, i : i + 1],
            )
            for i in range(len(chunk))
        ]
        return torch.cat(rows)

    def _tensor(self, indices: NDArray[Any]) -> Tensor:
        return torch.from_numpy(indices).to(self._pool.device, torch.int64)

    def _gather(self, layer: int, sequences: NDArray[np.intp], kv_lens: Tensor) -> tuple[Tensor, Tensor]:
        """KV of whole sequences, [sequences, num_kv_heads, longest, head_dim]; 0 past a sequence's end, where pages may
        hold anything.
        """
        metadata = self._metadata
        longest = int(metadata.kv_lens[sequences].max())
        place = np.arange(-(-longest // metadata.page_size))
        counts = np.diff(metadata.kv_indptr)[sequences][:, None]
        page_index = metadata.kv_indptr[sequences][:, None] + np.minimum(place, counts - 1)  # the last one stands in
        pages = self._tensor(metadata.kv_indices[page_index].ravel())
        past_end = torch.arange(longest, dtype=torch.int64, device=self._pool.device) >= kv_lens[:, None]
        k, v = (
            x.unflatten(0, (len(sequences), -1))[:, :longest].masked_fill_(past_end[..., None, None], 0).transpose(1, 2)
            for x in self._pool.gather(layer, pages)
        )
        return k, v
