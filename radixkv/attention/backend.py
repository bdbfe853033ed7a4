"""Attention backends: the protocol, the registry and what "auto" means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from radixkv.attention.metadata import AttentionMetadata
from radixkv.errors import UnsupportedBackendError
from radixkv.kernels.torch_reference import paged_attention
from radixkv.memory.kv_pool import KVPool


@dataclass(frozen=True, slots=True)
class AttentionParams:
    """What a layer of the model asks of attention, besides its queries.

    Attributes:
        scale: factor on the scores.
        sliding_window: a token sees that many tokens, itself included.
        chunk_size: a token sees only its own chunk of that many tokens.
        softcap: scores become softcap * tanh(score / softcap).
        sinks: logits [num_q_heads] that join the softmax's denominator alone.
    """

    scale: float
    sliding_window: int | None = None
    chunk_size: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


class AttentionBackend(Protocol):
    """Runs the attention of one batch after another over one `KVPool`.

    Per step `plan` once; then per layer `write` the new tokens' KV and `run` their queries.
    """

    name: str

    @property
    def num_layers(self) -> int:
        """Layers of the pool."""
        ...

    def plan(self, metadata: AttentionMetadata) -> None:
        """Get ready for a batch."""
        ...

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store new KV; k and v are [tokens, num_kv_heads, head_dim]."""
        ...

    def run(self, layer: int, q: Tensor, params: AttentionParams) -> Tensor:
        """Attention of the planned batch: q [tokens, num_q_heads, k_head_dim] -> [tokens, num_q_heads, v_head_dim]."""
        ...


@dataclass(frozen=True, slots=True)
class BackendSpec:
    """A registered backend: how to make it, and why it cannot serve a pool (None if it can)."""

    make: Callable[[KVPool], AttentionBackend]
    why_not: Callable[[KVPool], str | None]


_REGISTRY: dict[str, BackendSpec] = {}


def register_backend(
    name: str, make: Callable[[KVPool], AttentionBackend], why_not: Callable[[KVPool], str | None]
) -> None:
    """Make a backend known by `name`; "auto" takes the first registered one that can serve the pool."""
    _REGISTRY[name] = BackendSpec(make, why_not)


def backend_names() -> Sequence[str]:
    """The registered backends, in the order in which "auto" tries them."""
    return list(_REGISTRY)


def make_backend(name: str, pool: KVPool) -> AttentionBackend:
    """The backend of that name over `pool`; "auto" takes the first that can serve it.

    Raises: UnsupportedBackendError that says why, and what can.
    """
    able = [known for known, spec in _REGISTRY.items() if spec.why_not(pool) is None]
    if name == "auto":
        return _REGISTRY[able[0]].make(pool)
    if name not in _REGISTRY:
        raise UnsupportedBackendError(f"unknown attention backend {name!r}; there are auto, {', '.join(_REGISTRY)}")
    reason = _REGISTRY[name].why_not(pool)
    if reason is not None:
        raise UnsupportedBackendError(f"attention backend {name!r} {reason}; {', '.join(able)} can serve this model")
    return _REGISTRY[name].make(pool)


class ReferenceBackend:
    """`kernels.torch_reference`, request by request: to check others against."""

    name = "reference"

    def __init__(self, pool: KVPool) -> None:
        self._pool = pool
        self._metadata: AttentionMetadata | None = None

    @property
    def num_layers(self) -> int:
        return len(self._pool.layers)

    def plan(self, metadata: AttentionMetadata) -> None:
        self._metadata = metadata

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        self._pool.write(layer, slots, k, v)

    def run(self, layer: int, q: Tensor, params: AttentionParams) -> Tensor:
        assert self._metadata is not None, "run before plan"
        return paged_attention(
            q,
            self._pool.k[layer],
            self._pool.v[layer],
            qo_indptr=self._metadata.qo_indptr.tolist(),
            kv_indptr=self._metadata.kv_indptr.tolist(),
            kv_indices=torch.from_numpy(self._metadata.kv_indices).to(q.device),
            kv_lens=self._metadata.kv_lens.tolist(),
            scale=params.scale,
            sliding_window=params.sliding_window,
            chunk_size=params.chunk_size,
            softcap=params.softcap,
            sinks=params.sinks,
        )
