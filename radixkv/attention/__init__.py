"""How a batch reads the KV bytes: the metadata of a step and the backends that run it."""

from __future__ import annotations

from radixkv.attention.backend import register_backend_path
from radixkv.memory.kv_pool import register_pool
from radixkv.memory.latent_pool import LatentKVPool

register_pool(LatentKVPool)

# the order in which "auto" tries them
register_backend_path("flashinfer", "radixkv.attention.flashinfer_backend:FlashInferBackend")
register_backend_path("flashinfer_mla", "radixkv.attention.flashinfer_mla_backend:FlashInferLatentBackend")
register_backend_path("latent", "radixkv.attention.latent_backend:LatentBackend")
register_backend_path("numba", "radixkv.attention.numba_backend:NumbaBackend")
register_backend_path("triton", "radixkv.attention.triton_backend:TritonBackend", requires="triton")
register_backend_path("torch", "radixkv.attention.torch_backend:TorchBackend")
register_backend_path("reference", "radixkv.attention.reference_backend:ReferenceBackend")
