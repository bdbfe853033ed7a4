"""Attention backends: the protocol, the registry and what "auto" means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from radixkv.attention.metadata import AttentionMetadata
from radixkv.errors import UnsupportedBackendError
from radixkv.kernels.torch_reference import paged_attention
from radixkv.memory.kv_pool import KVLayout, KVPool
from radixkv.memory.kv_shape import LayerKV


@dataclass(frozen=True, slots=True)
class AttentionParams:
    """What a layer of the model asks of attention, besides its queries.

    Attributes:
        scale: factor on the scores.
        sliding_window: a token sees that many tokens, itself included.
        chunk_size: a token sees only its own chunk of that many tokens.
        softcap: scores become softcap * tanh(score / softcap).
        sinks: logits [num_q_heads] that join the softmax's denominator alone.
        sink_tokens: a token sees so many first ones beside its sliding window; StreamingLLM's sinks.
        sink_queries: [tokens, num_q_heads, k_head_dim], what these are multiplied with in place of the queries.
    """

    scale: float
    sliding_window: int | None = None
    chunk_size: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    sink_tokens: int = 0
    sink_queries: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """One layer's attention: what it keeps per token, how many query heads read it, and how."""

    kv: LayerKV
    num_q_heads: int
    params: AttentionParams


@dataclass(frozen=True, slots=True)
class AttentionNeeds:
    """What a model asks of a backend, and of the pool that it reads.

    Attributes:
        layers: first layer first.
        page_size: tokens a page.
        dtype: of queries, keys and values.
        device: where the model runs.
        kv_dtype: what the pool keeps KV as: "auto" (`dtype`), or one of `memory.kv_codes.CODE_FORMS`.
    """

    layers: tuple[LayerAttention, ...]
    page_size: int
    dtype: torch.dtype
    device: torch.device
    kv_dtype: str = "auto"


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


@runtime_checkable
class GraphableBackend(AttentionBackend, Protocol):
    """A backend whose decodes can be captured."""

    def fixed(self, batch_size: int, max_pages: int) -> AttentionBackend:
        """A backend over the same pool for exactly `batch_size` decodes with `max_pages` pages at most, whose `run` can
        be captured; each `plan` says what the next replay reads."""
        ...

    def pays_to_share(self, metadata: AttentionMetadata) -> bool:
        """Whether this backend reads a prefix of the batch once, so that it is faster than a graph of plain decodes."""
        ...


@dataclass(frozen=True, slots=True)
class BackendSpec:
    """A registered backend.

    Attributes:
        make: the backend over a pool, which has the layout that it wants.
        why_not: why it cannot serve a model; None if it can.
        layout: how it wants the KV to lie.
    """

    name: str
    make: Callable[[KVPool, AttentionNeeds], AttentionBackend]
    why_not: Callable[[AttentionNeeds], str | None]
    layout: Callable[[AttentionNeeds], KVLayout]


_REGISTRY: dict[str, BackendSpec] = {}


def register_backend(spec: BackendSpec) -> None:
    """Make a backend known by its name; "auto" takes the first registered one that can serve the model."""
    _REGISTRY[spec.name] = spec


def backend_names() -> Sequence[str]:
    """The registered backends, in the order in which "auto" tries them."""
    return list(_REGISTRY)


def why_not_keys_and_values(needs: AttentionNeeds) -> str | None:
    """What stands against a backend that reads keys and values of their own; None if nothing does."""
    if any(layer.kv.is_latent for layer in needs.layers):
        return "reads keys and values, and the model keeps latents (MLA)"
    return None


def why_not(name: str, needs: AttentionNeeds) -> str | None:
    """Why the registered backend of that name cannot serve the model; None if it can."""
    return _REGISTRY[name].why_not(needs)


def choose_backend(name: str, needs: AttentionNeeds) -> BackendSpec:
    """The backend of that name; "auto" takes the first that can serve the model.

    Raises: UnsupportedBackendError that says why, and what can.
    """
    if name != "auto" and name not in _REGISTRY:
        raise UnsupportedBackendError(f"unknown attention backend {name!r}; there are auto, {', '.join(_REGISTRY)}")
    able = [spec for spec in _REGISTRY.values() if spec.why_not(needs) is None]
    if not able:
        reasons = "; ".join(f"{spec.name} {spec.why_not(needs)}" for spec in _REGISTRY.values())
        raise UnsupportedBackendError(f"no attention backend can serve this model with these settings: {reasons}")
    if name == "auto":
        return able[0]
    reason = _REGISTRY[name].why_not(needs)
    if reason is not None:
        names = ", ".join(spec.name for spec in able)
        raise UnsupportedBackendError(f"attention backend {name!r} {reason}; {names} can serve this model")
    return _REGISTRY[name]


class ReferenceBackend:
    """`kernels.torch_reference`, request by request: to check others against."""

    name = "reference"

    def __init__(self, pool: KVPool, needs: AttentionNeeds) -> None:
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
        pages = torch.from_numpy(self._metadata.kv_indices).to(q.device, torch.int64)
        k, v = (x.unflatten(0, (-1, self._pool.page_size)) for x in self._pool.gather(layer, pages))
        return paged_attention(
            q,
            k,
            v,
            qo_indptr=self._metadata.qo_indptr.tolist(),
            kv_indptr=self._metadata.kv_indptr.tolist(),
            kv_indices=torch.arange(len(pages), dtype=torch.int64, device=q.device),
            kv_lens=self._metadata.kv_lens.tolist(),
            scale=params.scale,
            sliding_window=params.sliding_window,
            chunk_size=params.chunk_size,
            softcap=params.softcap,
            sinks=params.sinks,
            sink_tokens=params.sink_tokens,
            sink_queries=params.sink_queries,
        )
