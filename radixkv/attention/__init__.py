"""How a batch reads the KV bytes: the metadata of a step and the backends that run it."""

from __future__ import annotations

from radixkv.attention.backend import BackendSpec, ReferenceBackend, register_backend
from radixkv.attention.flashinfer_backend import FlashInferBackend
from radixkv.attention.numba_backend import NumbaBackend
from radixkv.attention.torch_backend import TorchBackend
from radixkv.attention.triton_backend import TritonBackend

# the order in which "auto" tries them
register_backend(BackendSpec("flashinfer", FlashInferBackend, FlashInferBackend.why_not, FlashInferBackend.layout))
register_backend(BackendSpec("numba", NumbaBackend, NumbaBackend.why_not, NumbaBackend.layout))
register_backend(BackendSpec("triton", TritonBackend, TritonBackend.why_not, TritonBackend.layout))
register_backend(BackendSpec("torch", TorchBackend, TorchBackend.why_not, TorchBackend.layout))
register_backend(BackendSpec("reference", ReferenceBackend, TorchBackend.why_not, TorchBackend.layout))
