"""Extends by torch's own kernels, over KV that is gathered into one piece."""

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
BIASED_HEADS = 4  # masks of that size at once, where each head has its own


class _Extends(NamedTuple):
    """Sequences that compute equally many tokens over equally long contexts, so that they run as one dense batch."""

    rows: Tensor  # int64 [batch * qo_len], their places in the flattened batch
    pages: Tensor  # int64 [batch, pages]
    qo_len: int
    kv_len: int


class DenseExtends:
    """Attention of those sequences of a batch that compute several tokens, by `scaled_dot_product_attention`.

    Cost of a layer: one copy of all KV that they read, and dense attention.

    Args:
        sequences: their places in the batch.
    """

    def __init__(self, pool: KVPool, metadata: AttentionMetadata, sequences: NDArray[np.intp]) -> None:
        self._pool, self._metadata = pool, metadata
        self._masks: dict[tuple[object, ...], Tensor] = {}  # the same in most layers
        by_shape: dict[tuple[int, int, int], list[int]] = {}
        for i in sequences:
            for shape in _blocks(int(metadata.qo_lens[i]), int(metadata.kv_lens[i])):
                by_shape.setdefault(shape, []).append(int(i))
        self._extends = [
            self._plan_extends(alike[first : first + size], *shape)
            for shape, alike in by_shape.items()
            for size in [max(1, CHUNK_TOKENS // shape[2])]
            for first in range(0, len(alike), size)
        ]

    def attend(self, layer: int, q: Tensor, params: AttentionParams, out: Tensor) -> None:
        """Write the rows of those sequences into `out`; q and out are of the whole batch."""
        for extends in self._extends:
            out[extends.rows] = self._extend(layer, q[extends.rows], extends, params)

    def _plan_extends(self, sequences: list[int], first_row: int, qo_len: int, kv_len: int) -> _Extends:
        metadata = self._metadata
        rows = metadata.qo_indptr[sequences][:, None] + first_row + np.arange(qo_len)
        pages = metadata.kv_indptr[sequences][:, None] + np.arange(-(-kv_len // metadata.page_size))
        return _Extends(self._tensor(rows.ravel()), self._tensor(metadata.kv_indices[pages]), qo_len, kv_len)

    def _extend(self, layer: int, q: Tensor, extends: _Extends, params: AttentionParams) -> Tensor:
        qo_len, kv_len = extends.qo_len, extends.kv_len
        page_size = self._pool.page_size
        start = 0
        if not params.sink_tokens:
            start = int(first_visible(np.array(kv_len - qo_len), params)) // page_size * page_size
        pages = extends.pages[:, start // page_size :]  # those that any query sees
        q = q.unflatten(0, (-1, qo_len))  # [batch, qo_len, num_q_heads, k_head_dim]
        k, v = self._gather(layer, pages, kv_len - start)  # [batch, kv_len - start, num_kv_heads, head_dim]
        if is_plain(params):
            if params.key_bias is not None:
                return self._biased(q, k, v, extends, start, params).flatten(0, 1)
            return _sdpa(q, k, v, self._extend_bias(q, extends, start, params), params.scale).flatten(0, 1)
        visible = self._extend_visible(extends, start, params)
        sink_queries: list[Tensor | None] = [None] * len(q)
        if params.sink_queries is not None:
            sink_queries = list(params.sink_queries[extends.rows].unflatten(0, (-1, qo_len)))
        bias = None
        if params.key_bias is not None:
            bias = params.key_bias.between(self._positions(extends), kv_len)[..., start:]
        return torch.cat(
            [
                dense_attention(
                    own_q,
                    own_k,
                    own_v,
                    visible,
                    scale=params.scale,
                    softcap=params.softcap,
                    sinks=params.sinks,
                    sink_tokens=params.sink_tokens,
                    sink_queries=own_sink_queries,
                    bias=bias,
                )
                for own_q, own_k, own_v, own_sink_queries in zip(q, k, v, sink_queries, strict=True)
            ]
        )

    def _gather(self, layer: int, page_ids: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        """KV as [batch, num_tokens, heads, dim]; what a last page holds beyond is cut off unread."""
        k, v = self._pool.gather(layer, page_ids.flatten())
        shape = (page_ids.shape[0], -1)
        return k.unflatten(0, shape)[:, :num_tokens], v.unflatten(0, shape)[:, :num_tokens]

    def _biased(
        self, q: Tensor, k: Tensor, v: Tensor, extends: _Extends, start: int, params: AttentionParams
    ) -> Tensor:
        """As `_sdpa` where keys have biases, so many heads at a time that these stay small."""
        assert params.key_bias is not None
        group, num_kv_heads = q.shape[2] // k.shape[2], k.shape[2]
        hidden = ~self._extend_visible(extends, start, params)
        positions = self._positions(extends)
        size = max(1, BIASED_HEADS * BLOCK_SCORES // (group * hidden.numel()))
        outputs = []
        for first in range(0, num_kv_heads, size):
            heads = slice(first, min(first + size, num_kv_heads))
            q_heads = slice(heads.start * group, heads.stop * group)
            bias = params.key_bias.between(positions, extends.kv_len, q_heads)[..., start:]
            bias = bias.to(q.dtype).masked_fill(hidden, float("-inf"))  # [heads, qo_len, kv_len - start]
            outputs.append(_sdpa(q[:, :, q_heads], k[:, :, heads], v[:, :, heads], bias, params.scale))
        return torch.cat(outputs, dim=2)

    def _extend_bias(self, q: Tensor, extends: _Extends, start: int, params: AttentionParams) -> Tensor | None:
        """What is added to the scores, [qo_len, kv_len - start]; None where the plain causal mask is meant."""
        window = params.sliding_window or extends.kv_len
        if extends.qo_len == extends.kv_len and params.chunk_size is None and window >= extends.kv_len:
            return None
        key = ("bias", extends.qo_len, extends.kv_len, start, *limits(params).values())
        if key not in self._masks:
            visible = self._extend_visible(extends, start, params)
            self._masks[key] = torch.zeros_like(visible, dtype=q.dtype).masked_fill_(~visible, float("-inf"))
        return self._masks[key]

    def _extend_visible(self, extends: _Extends, start: int, params: AttentionParams) -> Tensor:
        key = ("visible", extends.qo_len, extends.kv_len, start, *limits(params).values())
        if key not in self._masks:
            self._masks[key] = visible_mask(self._positions(extends), extends.kv_len, **limits(params))[:, start:]
        return self._masks[key]

    def _positions(self, extends: _Extends) -> Tensor:
        first = extends.kv_len - extends.qo_len
        return torch.arange(first, extends.kv_len, dtype=torch.int64, device=self._pool.device)

    def _tensor(self, indices: NDArray[Any]) -> Tensor:
        return torch.from_numpy(indices).to(self._pool.device, torch.int64)


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


def is_plain(params: AttentionParams) -> bool:
    """Whether scores are products and biases alone, so that `scaled_dot_product_attention` can compute the layer."""
    others = (params.softcap, params.sinks, params.sink_queries)
    return all(option is None for option in others)


def limits(params: AttentionParams) -> dict[str, Any]:
    """What limits a query's sight, as keywords of `visible_mask`."""
    return {
        "sliding_window": params.sliding_window,
        "chunk_size": params.chunk_size,
        "sink_tokens": params.sink_tokens,
    }


def first_visible(positions: NDArray[Any], params: AttentionParams) -> NDArray[Any]:
    """The first position that each query sees, sinks apart."""
    starts = np.zeros_like(positions)
    if params.sliding_window is not None:
        starts = np.maximum(starts, positions - params.sliding_window + 1)
    if params.chunk_size is not None:
        starts = np.maximum(starts, positions // params.chunk_size * params.chunk_size)
    return starts


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
