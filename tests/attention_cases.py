"""One batch over a pool whose pages lie at random and whose unused slots are NaN, and what the reference says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from radixkv.attention.backend import AttentionNeeds, AttentionParams, AttentionPlan, LayerAttention, choose_backend
from radixkv.attention.key_bias import KeyBias
from radixkv.attention.metadata import AttentionMetadata, PathNode, SequenceSpan, build_metadata
from radixkv.kernels.torch_reference import paged_attention
from radixkv.memory.kv_pool import KVPool
from radixkv.memory.kv_shape import LayerKV
from radixkv.memory.quantized_pool import QuantizedKVPool, make_kv_pool

Spans = Sequence[tuple[int, int]]  # [first, last) of each sequence

NAN_E4M3 = 0x7F
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Case:
    """Sequences of random KV; `shared` says which of them begin with the same pages: {(sequence, ...): tokens}.

    Groups of `shared` may nest, outer ones first; their tokens are whole pages.
    """

    def __init__(
        self,
        spans: Spans,
        *,
        page_size: int = 16,
        num_q_heads: int = 4,
        num_kv_heads: int = 2,
        head_dim: int = 16,
        v_head_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        kv_dtype: str = "auto",
        device: str = "cpu",
        shared: dict[tuple[int, ...], int] | None = None,
    ) -> None:
        self.page_size, self.dtype, self.device = page_size, dtype, torch.device(device)
        self.kv_dtype = kv_dtype
        self.layer = LayerKV(num_kv_heads, head_dim, v_head_dim or head_dim)
        self.num_q_heads = num_q_heads
        generator = torch.Generator().manual_seed(page_size * 1000 + num_q_heads * 100 + head_dim)
        counts = [-(-last // page_size) for _, last in spans]
        self.num_pages = sum(counts) + 5
        pages = np.random.default_rng(page_size).permutation(self.num_pages).astype(np.int32)
        tables = np.split(pages[: sum(counts)], np.cumsum(counts)[:-1])
        paths: list[list[PathNode]] = [[] for _ in spans]
        for key, (sequences, num_tokens) in enumerate((shared or {}).items()):
            for i in sequences:
                tables[i][: num_tokens // page_size] = tables[sequences[0]][: num_tokens // page_size]
                paths[i].append(PathNode(key, num_tokens))
        self.metadata = self._metadata(
            [(*span, table, path) for span, table, path in zip(spans, tables, paths, strict=True)]
        )
        self._everything = self._metadata(
            [(0, last, table, ()) for (_, last), table in zip(spans, tables, strict=True)]
        )
        num_slots = self.num_pages * page_size
        self.k = torch.randn(num_slots, num_kv_heads, head_dim, generator=generator).to(dtype)
        self.v = torch.randn(num_slots, num_kv_heads, self.layer.v_head_dim, generator=generator).to(dtype)
        self.q = torch.randn(self.metadata.num_tokens, num_q_heads, head_dim, generator=generator).to(dtype).to(device)
        self.sinks = torch.randn(num_q_heads, generator=generator).to(device)
        self.sink_queries = torch.randn(self.q.shape, generator=generator).to(dtype).to(device)

    def _metadata(self, spans: list[tuple[int, int, Any, Any]]) -> AttentionMetadata:
        return build_metadata([SequenceSpan(*span) for span in spans], page_size=self.page_size, device=self.device)

    def params(self, **options: Any) -> AttentionParams:
        """Parameters of a layer; `sinks=True` and `key_bias=True` take random ones, as `sink_tokens` do for queries."""
        sinks = self.sinks if options.pop("sinks", False) else None
        sink_queries = self.sink_queries if options.get("sink_tokens") else None
        return AttentionParams(
            scale=self.q.shape[-1] ** -0.5,
            sinks=sinks,
            sink_queries=sink_queries,
            key_bias=KeyBias(self._biases) if options.pop("key_bias", False) else None,
            **options,
        )

    def _biases(self, num_tokens: int) -> Tensor:
        """Biases with slopes and with jumps, [num_q_heads, num_tokens]."""
        generator = torch.Generator().manual_seed(7)
        slopes = torch.linspace(0.02, 0.5, self.num_q_heads)[:, None]
        jumps = torch.randn(self.num_q_heads, 1 << 12, generator=generator)[:, :num_tokens]
        return (slopes * torch.arange(num_tokens) + jumps).to(self.device)

    def needs(self, params: AttentionParams, long_extends: str | None = None) -> AttentionNeeds:
        layer = LayerAttention(self.layer, self.num_q_heads, params)
        return AttentionNeeds((layer,), self.page_size, self.dtype, self.device, self.kv_dtype, long_extends)

    def pool(self, layout: Any) -> KVPool:
        """A pool of that layout that holds the sequences, and NaN wherever nothing was written."""
        pool = make_kv_pool(
            layout,
            [self.layer],
            kv_dtype=self.kv_dtype,
            num_pages=self.num_pages,
            page_size=self.page_size,
            dtype=self.dtype,
            device=self.device,
        )
        poison(pool)
        slots = self._everything.slots
        pool.write(0, slots, self.k[slots.cpu()].to(self.device), self.v[slots.cpu()].to(self.device))
        return pool

    def plan(self, name: str, params: AttentionParams, long_extends: str | None = None) -> AttentionPlan:
        """The backend's plan for the batch. Raises: UnsupportedBackendError."""
        needs = self.needs(params, long_extends)
        backend_class = choose_backend(name, needs)
        return backend_class(self.pool(backend_class.layout(needs)), needs).plan(self.metadata)

    def kept(self) -> tuple[Tensor, Tensor]:
        """K and V as the pool keeps them, [pages, page_size, heads, dim] in float64."""
        if self.kv_dtype == "auto":
            k, v = self.k, self.v
        else:
            k, v = self.pool("nhd").gather(0, torch.arange(self.num_pages, device=self.device))
        return k.double().cpu().unflatten(0, (-1, self.page_size)), v.double().cpu().unflatten(0, (-1, self.page_size))

    def expected(self, params: AttentionParams) -> Tensor:
        """The reference, in float64."""
        longest = int(self.metadata.kv_lens.max())
        return paged_attention(
            self.q.double().cpu(),
            *self.kept(),
            qo_indptr=self.metadata.qo_indptr.tolist(),
            kv_indptr=self.metadata.kv_indptr.tolist(),
            kv_indices=torch.from_numpy(self.metadata.kv_indices),
            kv_lens=self.metadata.kv_lens.tolist(),
            scale=params.scale,
            sliding_window=params.sliding_window,
            chunk_size=params.chunk_size,
            softcap=params.softcap,
            sinks=None if params.sinks is None else params.sinks.cpu(),
            sink_tokens=params.sink_tokens,
            sink_queries=None if params.sink_queries is None else params.sink_queries.double().cpu(),
            key_bias=None if params.key_bias is None else params.key_bias.table(longest).double().cpu(),
        )

    def check(
        self, name: str, params: AttentionParams, tolerance: float | None = None, long_extends: str | None = None
    ) -> None:
        """The backend's output is the reference's."""
        found = self.plan(name, params, long_extends).attend(0, self.q, params)
        tolerance = tolerance or TOLERANCE[self.dtype]
        torch.testing.assert_close(found.double().cpu(), self.expected(params), rtol=0, atol=tolerance)


def poison(pool: KVPool) -> None:
    """Make every slot NaN."""
    if isinstance(pool, QuantizedKVPool):
        for pages in (*pool.k, *pool.v):
            pages.fill_(0xFF)  # NaN in fp8
        for pages in (*pool.k_scales, *pool.v_scales):
            pages.fill_(NAN_E4M3 if pages.dtype == torch.uint8 else math.nan)
    else:
        for pages in (*pool.k, *pool.v):
            pages.fill_(math.nan)
