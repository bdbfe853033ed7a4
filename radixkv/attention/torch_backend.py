"""Attention by torch's own kernels over gathered KV: runs everywhere, for every head size, dtype and option."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from radixkv.attention.backend import AttentionParams
from radixkv.attention.metadata import AttentionMetadata
from radixkv.kernels.torch_reference import dense_attention, visible_mask
from radixkv.memory.kv_pool import KVPool

CHUNK_TOKENS = 1 << 16  # KV tokens gathered at a time
BLOCK_SCORES = 1 << 22  # entries of one mask: 16 MiB in float32, however long the context


class _Extends(NamedTuple):
    """Sequences that compute equally many tokens over equally long contexts, so that they run as one dense batch."""

    rows: Tensor  # int64 [batch * qo_len], their places in the flattened batch
    pages: Tensor  # int64 [batch, pages]
    qo_len: int
    kv_len: int


class TorchBackend:
    """Gathers each sequence's KV and runs `scaled_dot_product_attention`; decodes go in padded batches.

    Cost of a layer: one copy of all KV that the batch reads, and dense attention.
    """

    name = "torch"

    def __init__(self, pool: KVPool) -> None:
        self.pool = pool
        self._extends: list[_Extends] = []
        self._decodes: NDArray[np.intp] = np.empty(0, np.intp)
        self._decode_rows = torch.empty(0, dtype=torch.int64)
        self._masks: dict[tuple[object, ...], Tensor] = {}  # of this batch; the same in most layers
        self._metadata: AttentionMetadata | None = None

    @staticmethod
    def why_not(pool: KVPool) -> str | None:
        """Nothing stops it."""
        return None

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
        self._masks.clear()
        qo_lens = metadata.qo_lens
        self._decodes = np.flatnonzero(qo_lens == 1)
        self._decode_rows = self._tensor(metadata.qo_indptr[self._decodes])
        by_shape: dict[tuple[int, int, int], list[int]] = {}
        for i in np.flatnonzero(qo_lens > 1):
            for shape in _blocks(int(qo_lens[i]), int(metadata.kv_lens[i])):
                by_shape.setdefault(shape, []).append(int(i))
        self._extends = [
            self._plan_extends(sequences[first : first + size], *shape)
            for shape, sequences in by_shape.items()
            for size in [max(1, CHUNK_TOKENS // shape[2])]
            for first in range(0, len(sequences), size)
        ]

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        self.pool.write(layer, slots, k, v)

    def run(self, layer: int, q: Tensor, params: AttentionParams) -> Tensor:
        out = q.new_empty(q.shape[0], q.shape[1], self.pool.layers[layer].v_head_dim)
        for extends in self._extends:
            out[extends.rows] = self._extend(layer, q[extends.rows], extends, params)
        if len(self._decodes):
            out[self._decode_rows] = self._decode(layer, q[self._decode_rows], params)
        return out

    # -- several tokens of each sequence -----------------------------------------------------------------------------

    def _plan_extends(self, sequences: list[int], first_row: int, qo_len: int, kv_len: int) -> _Extends:
        metadata = self.metadata
        rows = metadata.qo_indptr[sequences][:, None] + first_row + np.arange(qo_len)
        pages = metadata.kv_indptr[sequences][:, None] + np.arange(-(-kv_len // metadata.page_size))
        return _Extends(self._tensor(rows.ravel()), self._tensor(metadata.kv_indices[pages]), qo_len, kv_len)

    def _extend(self, layer: int, q: Tensor, extends: _Extends, params: AttentionParams) -> Tensor:
        qo_len, kv_len = extends.qo_len, extends.kv_len
        page_size = self.pool.page_size
        start = _first_visible(kv_len - qo_len, params) // page_size * page_size
        pages = extends.pages[:, start // page_size :]  # those that any query sees
        q = q.unflatten(0, (-1, qo_len))  # [batch, qo_len, num_q_heads, k_head_dim]
        k = self._gather(self.pool.k[layer], pages, kv_len - start)  # [batch, kv_len - start, num_kv_heads, k_head_dim]
        v = self._gather(self.pool.v[layer], pages, kv_len - start)
        if params.softcap is None and params.sinks is None:
            return _sdpa(q, k, v, self._extend_bias(q, extends, start, params), params.scale).flatten(0, 1)
        visible = self._extend_visible(extends, start, params)
        return torch.cat(
            [
                dense_attention(*one, visible, scale=params.scale, softcap=params.softcap, sinks=params.sinks)
                for one in zip(q, k, v, strict=True)
            ]
        )

    def _gather(self, pages: Tensor, page_ids: Tensor, num_tokens: int) -> Tensor:
        """Contiguous KV [batch, num_tokens, heads, dim]; what a last page holds beyond is cut off unread."""
        gathered = pages.index_select(0, page_ids.flatten())
        return gathered.view(page_ids.shape[0], -1, *pages.shape[2:])[:, :num_tokens]

    def _extend_bias(self, q: Tensor, extends: _Extends, start: int, params: AttentionParams) -> Tensor | None:
        """What is added to the scores, [qo_len, kv_len - start]; None where the plain causal mask is meant."""
        window = params.sliding_window or extends.kv_len
        if extends.qo_len == extends.kv_len and params.chunk_size is None and window >= extends.kv_len:
            return None
        key = ("bias", extends.qo_len, extends.kv_len, start, params.sliding_window, params.chunk_size)
        if key not in self._masks:
            visible = self._extend_visible(extends, start, params)
            self._masks[key] = torch.zeros_like(visible, dtype=q.dtype).masked_fill_(~visible, float("-inf"))
        return self._masks[key]

    def _extend_visible(self, extends: _Extends, start: int, params: AttentionParams) -> Tensor:
        key = ("visible", extends.qo_len, extends.kv_len, start, params.sliding_window, params.chunk_size)
        if key not in self._masks:
            positions = torch.arange(extends.kv_len - extends.qo_len, extends.kv_len, device=self.pool.device)
            self._masks[key] = visible_mask(positions, extends.kv_len, **_limits(params))[:, start:]
        return self._masks[key]

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


def _blocks(qo_len: int, kv_len: int) -> Iterator[tuple[int, int, int]]:
    """Cut one extend into (first row, rows, keys) whose scores have at most `BLOCK_SCORES` entries a head.

    A token sees no later key, so a block of queries is itself an extend, over the keys up to its end.
    """
    first_key = kv_len - qo_len
    row = 0
    while row < qo_len:
        size = min(qo_len - row, max(1, BLOCK_SCORES // kv_len))
        yield row, size, first_key + row + size
        row += size


def _limits(params: AttentionParams) -> dict[str, int | None]:
    return {"sliding_window": params.sliding_window, "chunk_size": params.chunk_size}


def _first_visible(first_query: int, params: AttentionParams) -> int:
    """The first position that any query from `first_query` on sees."""
    start = 0
    if params.sliding_window is not None:
        start = max(start, first_query - params.sliding_window + 1)
    if params.chunk_size is not None:
        start = max(start, first_query // params.chunk_size * params.chunk_size)
    return start


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Dense attention of [batch, tokens, heads, dim] tensors; causal from the first key on where `bias` is None."""
    out = scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=bias,
        is_causal=bias is None,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)
