"""The KV of one case in pages, and the reference that contenders are checked against."""

from __future__ import annotations

from functools import cached_property
from math import ceil
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixkv.attention.backend import AttentionNeeds, AttentionParams, LayerAttention
from radixkv.attention.metadata import AttentionMetadata, PathNode, SequenceSpan, build_metadata
from radixkv.kernels.torch_reference import dense_attention
from radixkv.memory.kv_pool import KVLayout, KVPool
from radixkv.memory.kv_shape import LayerKV
from radixkv.memory.quantized_pool import kv_bytes_per_token, make_kv_pool
from radixkv_bench.attention.shapes import Case
from radixkv_bench.common.errors import BenchError

COLD_BYTES = 1 << 28  # more than caches hold
MAX_LAYERS = 128
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # relative to the largest output


class Setup:
    """A batch of the case, and its KV in several layers.

    As in a model each call is for another layer, so that nothing of its KV is in a cache; all layers hold the same.

    Attributes:
        kv_dtype: what KV is kept as: "auto" (`dtype`), or a form of `radixkv.memory.kv_codes`.
        kv_bytes: what a layer has to read.
        q: [num_tokens, q_heads, head_dim]
        page_table: int32 [batch, pages of a request]
    """

    def __init__(
        self,
        case: Case,
        dtype: torch.dtype,
        device: torch.device,
        *,
        kv_dtype: str = "auto",
        cold_bytes: int = COLD_BYTES,
    ) -> None:
        self.case, self.dtype, self.device, self.kv_dtype = case, dtype, device, kv_dtype
        self.layer = LayerKV(case.kv_heads, case.head_dim, case.head_dim)
        self.kv_bytes = case.distinct_tokens * kv_bytes_per_token([self.layer], kv_dtype, dtype)
        self.num_layers = min(MAX_LAYERS, ceil(cold_bytes / self.kv_bytes))
        self.page_table = _page_table(case)
        self.num_pages = int(self.page_table.max()) + 1
        self.params = AttentionParams(scale=case.head_dim**-0.5)
        self.q = 4 * self._random(case.batch * case.new, case.q_heads)  # so that some tokens weigh more than others
        self._pools: dict[KVLayout, KVPool] = {}

    @property
    def needs(self) -> AttentionNeeds:
        """What the layers ask of a backend."""
        layers = (LayerAttention(self.layer, self.case.q_heads, self.params),) * self.num_layers
        return AttentionNeeds(layers, self.case.page_size, self.dtype, self.device, self.kv_dtype)

    def metadata(self, *, with_path: bool) -> AttentionMetadata:
        """The batch; only with the path of its requests through the tree is it known what they share."""
        case = self.case
        path = [PathNode("shared", case.shared)] if with_path and case.shared else []
        spans = [SequenceSpan(case.context - case.new, case.context, pages, path) for pages in self.page_table]
        return build_metadata(spans, page_size=case.page_size, device=self.device)

    def pool(self, layout: KVLayout) -> KVPool:
        """The KV in that layout, filled when it is first asked for."""
        if layout not in self._pools:
            self._pools[layout] = self._fill(layout)
        return self._pools[layout]

    def _fill(self, layout: KVLayout) -> KVPool:
        pool = make_kv_pool(
            layout,
            (self.layer,) * self.num_layers,
            kv_dtype=self.kv_dtype,
            num_pages=self.num_pages,
            page_size=self.case.page_size,
            dtype=self.dtype,
            device=self.device,
        )
        k, v = self._kv
        pool.write(0, torch.arange(len(k), device=self.device), k, v)
        for pages in (pool.k, pool.v, pool.k_scales, pool.v_scales):
            for layer in pages[1:]:
                layer.copy_(pages[0])
        return pool

    @cached_property
    def _kv(self) -> tuple[Tensor, Tensor]:
        """Of every slot, [num_slots, kv_heads, head_dim]."""
        num_slots = self.num_pages * self.case.page_size
        return self._random(num_slots, self.case.kv_heads, seed=1), self._random(num_slots, self.case.kv_heads, seed=2)

    @property
    def _kept(self) -> tuple[Tensor, Tensor]:
        """What is left of them once they are kept."""
        if self.kv_dtype == "auto":
            return self._kv
        return self.pool("nhd").gather(0, torch.arange(self.num_pages, device=self.device))

    def _random(self, tokens: int, heads: int, seed: int = 0) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        shape = (tokens, heads, self.case.head_dim)
        return torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)

    @cached_property
    def _expected(self) -> Tensor:
        """The last request's output over what is kept, by the reference in float32."""
        case = self.case
        tokens = np.arange(case.context)
        slots = self.page_table[-1].astype(np.int64)[tokens // case.page_size] * case.page_size
        at = torch.from_numpy(slots + tokens % case.page_size).to(self.device)
        k, v = (x[at].float() for x in self._kept)
        q = self.q[-case.new :].float()
        positions = torch.arange(case.context - case.new, case.context, device=self.device)
        visible = torch.arange(case.context, device=self.device) <= positions[:, None]
        return dense_attention(q, k, v, visible, scale=self.params.scale)

    def check(self, name: str, out: Any, tolerance: float | None = None) -> None:
        """Raises: BenchError unless `out` is what the reference computes. What is wrong is not worth timing."""
        found = out[-self.case.new :].float()
        difference = float((found - self._expected).abs().max() / self._expected.abs().max())
        if not difference <= (tolerance or TOLERANCE[self.dtype]):
            raise BenchError(
                f"{name} computes something else than the reference in {self.case.name} ({self.dtype}): it is off by "
                f"{difference:.2g} of the largest output"
            )


def _page_table(case: Case) -> NDArray[np.int32]:
    """Pages of each request in random order; the shared ones come first, and are the same."""
    shared, own = case.shared // case.page_size, ceil((case.context - case.shared) / case.page_size)
    pages = np.random.default_rng(0).permutation(shared + case.batch * own).astype(np.int32)
    prefix = np.broadcast_to(pages[:shared], (case.batch, shared))
    return np.concatenate([prefix, pages[shared:].reshape(case.batch, own)], axis=1)
