"""Attention by torch's own kernels over gathered KV: runs everywhere, for every head size, dtype and option."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from radixkv.attention.backend import AttentionParams
from radixkv.attention.metadata import AttentionMetadata
from radixkv.kernels.torch_reference import dense_attention, visible_mask
from radixkv.memory.kv_pool import KVPool

DECODE_CHUNK_TOKENS = 1 << 16  # padded KV tokens gathered at a time


class _Extend(NamedTuple):
    """One sequence that computes several tokens: its place in the flattened batch and all its slots."""

    first_row: int
    last_row: int
    slots: Tensor  # int64 [kv_len]


class TorchBackend:
    """Gathers each sequence's KV and runs `scaled_dot_product_attention`; decodes go in padded batches.

    Cost of a layer: one copy of all KV that the batch reads, and dense attention.
    """

    name = "torch"

    def __init__(self, pool: KVPool) -> None:
        self.pool = pool
        self._extends: list[_Extend] = []
        self._decodes: NDArray[np.intp] = np.empty(0, np.intp)
        self._metadata: AttentionMetadata | None = None

    @staticmethod
    def why_not(pool: KVPool) -> str | None:
        """Nothing stops it."""
        return None

    @property
    def metadata(self) -> AttentionMetadata:
        """The planned batch."""
        assert self._metadata is not None, "run before plan"
        return self._metadata

    def plan(self, metadata: AttentionMetadata) -> None:
        self._metadata = metadata
        qo_lens = metadata.qo_lens
        self._decodes = np.flatnonzero(qo_lens == 1)
        self._extends = [
            _Extend(
                int(metadata.qo_indptr[i]),
                int(metadata.qo_indptr[i + 1]),
                self._slots(np.array([i]), int(metadata.kv_lens[i]))[0],
            )
            for i in np.flatnonzero(qo_lens > 1)
        ]

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        self.pool.write(layer, slots, k, v)

    def run(self, layer: int, q: Tensor, params: AttentionParams) -> Tensor:
        out = q.new_empty(q.shape[0], q.shape[1], self.pool.layers[layer].v_head_dim)
        for extend in self._extends:
            rows = slice(extend.first_row, extend.last_row)
            out[rows] = self._extend(layer, q[rows], extend, params)
        if len(self._decodes):
            rows_of_decodes = torch.from_numpy(self.metadata.qo_indptr[self._decodes]).to(q.device, torch.int64)
            out[rows_of_decodes] = self._decode(layer, q[rows_of_decodes], params)
        return out

    # -- several tokens of one sequence ------------------------------------------------------------------------------

    def _extend(self, layer: int, q: Tensor, extend: _Extend, params: AttentionParams) -> Tensor:
        kv_len = len(extend.slots)
        first = kv_len - q.shape[0]  # position of the first query
        start = _first_visible(first, params)
        slots = extend.slots[start:]
        k = self.pool.k[layer].flatten(0, 1)[slots]  # [kv_len - start, num_kv_heads, k_head_dim]
        v = self.pool.v[layer].flatten(0, 1)[slots]
        if _is_plain(params) and first == 0 and (params.sliding_window or kv_len) >= kv_len:
            return _sdpa(q, k, v, None, params.scale)
        positions = torch.arange(first - start, kv_len - start, device=q.device)
        visible = visible_mask(positions + start, kv_len, **_limits(params))[:, start:]
        if params.softcap is None and params.sinks is None:
            return _sdpa(q, k, v, visible, params.scale)
        return dense_attention(q, k, v, visible, scale=params.scale, softcap=params.softcap, sinks=params.sinks)

    # -- one token of each of many sequences -------------------------------------------------------------------------

    def _decode(self, layer: int, q: Tensor, params: AttentionParams) -> Tensor:
        kv_lens = self.metadata.kv_lens[self._decodes]
        by_length = np.argsort(kv_lens, kind="stable")
        out = q.new_empty(q.shape[0], q.shape[1], self.pool.layers[layer].v_head_dim)
        end = len(by_length)
        while end > 0:
            longest = int(kv_lens[by_length[end - 1]])
            chunk = by_length[max(0, end - max(1, DECODE_CHUNK_TOKENS // longest)) : end]
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
        visible = visible_mask(kv_lens - 1, longest, **_limits(params))  # [batch, longest]
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


def _limits(params: AttentionParams) -> dict[str, int | None]:
    return {"sliding_window": params.sliding_window, "chunk_size": params.chunk_size}


def _is_plain(params: AttentionParams) -> bool:
    return params.chunk_size is None and params.softcap is None and params.sinks is None


def _first_visible(first_query: int, params: AttentionParams) -> int:
    """The first position that any query from `first_query` on sees."""
    start = 0
    if params.sliding_window is not None:
        start = max(start, first_query - params.sliding_window + 1)
    if params.chunk_size is not None:
        start = max(start, first_query // params.chunk_size * params.chunk_size)
    return start


def _sdpa(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """Dense attention of one sequence; causal from the first key on where `visible` is None."""
    out = scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=visible,
        is_causal=visible is None,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)
