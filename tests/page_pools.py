"""Small pools of every kind, and how a test fills and reads a page of them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from radixkv.memory.kv_pool import KVPool
from radixkv.memory.kv_shape import LayerKV
from radixkv.memory.latent_pool import LatentKV, LatentKVPool
from radixkv.memory.quantized_pool import make_kv_pool

PAGE_SIZE, NUM_PAGES = 8, 3
LAYERS = [LayerKV(2, 8, 16), LayerKV(1, 16, 8)]


def of_values(layout: str, kv_dtype: str = "auto", dtype: torch.dtype = torch.float32) -> Callable[[], KVPool]:
    return lambda: make_kv_pool(
        layout,  # type: ignore[arg-type]
        LAYERS,
        kv_dtype=kv_dtype,
        num_pages=NUM_PAGES,
        page_size=PAGE_SIZE,
        dtype=dtype,
    )


def of_latents() -> KVPool:
    layers = [LatentKV.of(latent_dim=6, rope_dim=2), LatentKV.of(latent_dim=4, rope_dim=0)]
    return LatentKVPool(layers, num_pages=NUM_PAGES, page_size=PAGE_SIZE, dtype=torch.float32)


POOLS = {
    "values": of_values("nhd"),
    "lanes": of_values("lanes"),
    "lanes of 16 bit": of_values("lanes", dtype=torch.bfloat16),
    "codes": of_values("nhd", "int4"),
    "pairs of codes": of_values("pairs", "int4"),
    "lanes of codes": of_values("lanes", "int8"),
    "latents": of_latents,
}


def fill(pool: KVPool, page: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    slots = torch.arange(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)
    for layer, kv in enumerate(pool.layers):
        k = torch.randn(PAGE_SIZE, kv.num_kv_heads, kv.k_head_dim, generator=generator)
        v = torch.randn(PAGE_SIZE, kv.num_kv_heads, kv.v_head_dim, generator=generator)
        pool.write(layer, slots, k, k[..., : pool.v[layer].shape[-1]] if kv.is_latent else v)


def read(pool: KVPool, page: int) -> list[torch.Tensor]:
    return [kv for layer in range(len(pool.layers)) for kv in pool.gather(layer, torch.tensor([page]))]
