"""The bytes of latent attention (MLA): per token and layer one vector, for all heads and for K and V together.

A latent layer keeps the compressed vector from which each head's K and V follow, and one rotary key that the heads
share (DeepSeek-V2, 2024, section 2.1). Scores read both and sums read the latent alone, so that V is the first part
of K and takes no memory of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from radixkv.memory.kv_pool import KVLayout, KVPool
from radixkv.memory.kv_shape import LayerKV


@dataclass(frozen=True, slots=True)
class LatentKV(LayerKV):
    """What a latent layer keeps per token, and which part of it is the latent.

    >>> LatentKV.of(latent_dim=512, rope_dim=64).bytes_per_token("bfloat16")
    1152

    Attributes:
        latent_dim: so many first values of K are the latent, and serve as V.
    """

    latent_dim: int

    @classmethod
    def of(cls, *, latent_dim: int, rope_dim: int) -> LatentKV:
        """A layer with a latent of `latent_dim` values and a rotary key of `rope_dim`."""
        return cls(num_kv_heads=1, k_head_dim=latent_dim + rope_dim, v_head_dim=0, latent_dim=latent_dim)


class LatentKVPool(KVPool):
    """Latents and rotary keys of layers that are all `LatentKV`, in pages.

    Attributes:
        k: per layer a tensor [num_pages, page_size, 1, latent_dim + rope_dim]
        v: views of them, [num_pages, page_size, 1, latent_dim]
    """

    layout: KVLayout = "latent"

    def __init__(
        self,
        layers: Sequence[LayerKV],
        *,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(layers, num_pages=num_pages, page_size=page_size, dtype=dtype, device=device)
        with torch.inference_mode(False):
            self.v = [k[..., : _latent_dim(layer)] for k, layer in zip(self.k, layers, strict=True)]

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k, [tokens, 1, latent_dim + rope_dim], in `slots`, int64 [tokens]; v is its first part."""
        assert v.shape[-1] == self.v[layer].shape[-1], f"layer {layer} has another latent"
        self.k[layer].flatten(0, 1).index_copy_(0, slots, k.to(self.dtype))

    def gather(self, layer: int, pages: Tensor) -> tuple[Tensor, Tensor]:
        """A copy of what lies in `pages` (int64 [n]), [n * page_size, 1, latent_dim + rope_dim]; V is a view of it."""
        k = self.k[layer].index_select(0, pages).flatten(0, 1)
        return k, k[..., : self.v[layer].shape[-1]]

    def page_tensors(self, page: int) -> list[Tensor]:
        return [pages[page].unsqueeze(1) for pages in self.k]

    def page_blocks(self) -> list[Tensor]:
        return [pages.flatten(1) for pages in self.k]


def _latent_dim(layer: LayerKV) -> int:
    assert isinstance(layer, LatentKV), f"{layer} keeps no latent"
    return layer.latent_dim
