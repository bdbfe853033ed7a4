"""How a batch reads the KV bytes: the metadata of a step and the backends that run it."""

from __future__ import annotations

from radixkv.attention.backend import BackendSpec, ReferenceBackend, register_backend
from radixkv.attention.flashinfer_backend import FlashInferBackend
from radixkv.attention.flashinfer_mla_backend import FlashInferLatentBackend
from radixkv.attention.latent_backend import LatentBackend
from radixkv.attention.numba_backend import NumbaBackend
from radixkv.attention.torch_backend import TorchBackend
from radixkv.attention.triton_backend import TritonBackend
from radixkv.memory.kv_pool import register_pool
from radixkv.memory.latent_pool import LatentKVPool

register_pool(LatentKVPool)

# the order in which "auto" tries them
register_backend(BackendSpec("flashinfer", FlashInferBackend, FlashInferBackend.why_not, FlashInferBackend.layout))
register_backend(
    BackendSpec(
        "flashinfer_mla",
        FlashInferLatentBackend,
        FlashInferLatentBackend.why_not,
        FlashInferLatentBackend.layout,
    )
)
register_backend(BackendSpec("latent", LatentBackend, LatentBackend.why_not, LatentBackend.layout))
register_backend(BackendSpec("numba", NumbaBackend, NumbaBackend.why_not, NumbaBackend.layout))
register_backend(BackendSpec("triton", TritonBackend, TritonBackend.why_not, TritonBackend.layout))
register_backend(BackendSpec("torch", TorchBackend, TorchBackend.why_not, TorchBackend.layout))
register_backend(BackendSpec("reference", ReferenceBackend, TorchBackend.why_not, TorchBackend.layout))
