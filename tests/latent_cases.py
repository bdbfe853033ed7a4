"""`attention_cases.Case` for latent layers: one head whose values are the first part of its keys."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attention_cases import TOLERANCE, Case, Spans
from radixkv.attention.backend import AttentionBackend, AttentionParams
from radixkv.memory.kv_pool import KVPool
from radixkv.memory.latent_pool import LatentKV, LatentKVPool


class LatentCase(Case):
    """Sequences of random latents, each with a rotary key behind it. The keywords are those of `Case`."""

    def __init__(self, spans: Spans, *, latent_dim: int = 16, rope_dim: int = 8, **options: Any) -> None:
        super().__init__(spans, num_kv_heads=1, head_dim=latent_dim + rope_dim, v_head_dim=latent_dim, **options)
        self.layer = LatentKV.of(latent_dim=latent_dim, rope_dim=rope_dim)
        self.v = self.k[..., :latent_dim]

    def latent_pool(self) -> KVPool:
        """A pool that holds the sequences, and NaN wherever nothing was written."""
        sizes: dict[str, Any] = {"num_pages": self.num_pages, "page_size": self.page_size}
        pool = LatentKVPool([self.layer], **sizes, dtype=self.dtype, device=self.device)
        pool.k[0].fill_(math.nan)
        slots = self._everything.slots
        k = self.k[slots.cpu()].to(self.device)
        pool.write(0, slots, k, k[..., : self.layer.latent_dim])
        return pool

    def compare(self, backend: AttentionBackend, params: AttentionParams) -> Tensor:
        """Plan, run, and see that the output is the reference's."""
        found = backend.plan(self.metadata).attend(0, self.q, params)
        assert found.dtype == self.dtype
        torch.testing.assert_close(
            found.double().cpu(), self.expected(params), rtol=0, atol=TOLERANCE.get(self.dtype, 1e-12)
        )
        return found
