"""Attention backends: the protocol, the registry and what "auto" means.

backend = choose_backend("auto", needs)(pool, needs)      once
plan = backend.plan(metadata)                             once a step
plan.store_kv(layer, k, v); plan.attend(layer, q, params) in each layer
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from radixkv.attention.key_bias import KeyBias
from radixkv.attention.metadata import AttentionMetadata
from radixkv.errors import UnsupportedBackendError
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
        key_bias: what is added to the scaled scores, before a soft cap; not beside `sink_tokens`.
    """

    scale: float
    sliding_window: int | None = None
    chunk_size: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    sink_tokens: int = 0
    sink_queries: Tensor | None = None
    key_bias: KeyBias | None = None


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """One layer's attention: what it keeps per token, how many query heads read it, and how.

    Attributes:
        reads: the earlier layer whose KV it attends over, in the same way; None if it keeps its own.
    """

    kv: LayerKV
    num_q_heads: int
    params: AttentionParams
    reads: int | None = None


@dataclass(frozen=True, slots=True)
class AttentionNeeds:
    """What a model asks of a backend, and of the pool that it reads.

    Attributes:
        layers: first layer first.
        page_size: tokens a page.
        dtype: of queries, keys and values.
        device: where the model runs.
        kv_dtype: what the pool keeps KV as: "auto" (`dtype`), or one of `memory.kv_codes.CODE_FORMS`.
        long_extends: how a backend that can choose computes them: "kernel", "dense"; None lets it choose.
    """

    layers: tuple[LayerAttention, ...]
    page_size: int
    dtype: torch.dtype
    device: torch.device
    kv_dtype: str = "auto"
    long_extends: str | None = None


class AttentionPlan(Protocol):
    """The attention of one batch, ready to run: in each layer `store_kv` once, then `attend`.

    A plan is valid until its backend plans the next batch.
    """

    def store_kv(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store the KV of the batch's tokens in their slots.

        k is [tokens, num_kv_heads, k_head_dim] and v [tokens, num_kv_heads, v_head_dim], in the model's dtype. A
        latent layer's k is [tokens, 1, latent_dim + rope_dim], and its v the first latent_dim values of it.
        """
        ...

    def attend(self, layer: int, q: Tensor, params: AttentionParams) -> Tensor:
        """Let each token see the KV before it, and its own, which is stored by now.

        q is [tokens, num_q_heads, k_head_dim] in the model's dtype and in any memory order.
        Returns: [tokens, num_q_heads, v_head_dim] (latent layers: latent_dim), in q's dtype.
        """
        ...


class AttentionBackend(Protocol):
    """Plans one batch after another over one `KVPool`."""

    @property
    def name(self) -> str:
        """As it is registered."""
        ...

    @property
    def num_layers(self) -> int:
        """Layers of the pool."""
        ...

    def plan(self, metadata: AttentionMetadata) -> AttentionPlan:
        """Get ready for a batch, without waiting for the device. The plans made before are not valid any more."""
        ...


class GraphPlan(AttentionPlan, Protocol):
    """Decodes of one batch size, whose `store_kv` and `attend` a CUDA graph can capture; valid beside other plans."""

    def update(self, metadata: AttentionMetadata) -> None:
        """Say which batch the next `attend`, or replay of it, reads. Waits for nothing on the device.

        Each sequence computes one token. The slots of `metadata` are not read: those are the plan's own.
        """
        ...


@runtime_checkable
class ChoosesExtends(Protocol):
    """A backend that computes long extends in one of two ways."""

    @property
    def long_extends(self) -> str:
        """The one that it took: "kernel" or "dense"."""
        ...


@runtime_checkable
class GraphableBackend(AttentionBackend, Protocol):
    """A backend whose decodes can be captured."""

    def graph_plan(self, slots: Tensor, max_pages: int) -> GraphPlan:
        """A plan that stays at its place in memory, for as many decodes as there are `slots`.

        All graph plans of a backend may share memory: update one, run or replay it, then the next. Make the largest
        first.

        Args:
            slots: int64 [batch_size] on the device, where `store_kv` puts KV; the caller writes to it between replays.
            max_pages: pages of all sequences of a batch at most, each counted as often as it is read.
        """
        ...

    def pays_to_share(self, metadata: AttentionMetadata) -> bool:
        """Whether `plan` reads a prefix of the batch once, so that it is faster than a graph of plain decodes."""
        ...


@runtime_checkable
class LeavesToOthers(Protocol):
    """A backend that "auto" takes for some models only where no other can serve them."""

    def leaves_to_others(self, needs: AttentionNeeds) -> bool:
        """Whether that model, which it can serve, is one of them."""
        ...


class BackendClass(Protocol):
    """What is registered: the class of a backend, or anything that has these."""

    @property
    def name(self) -> str:
        """By which it is asked for."""
        ...

    def __call__(self, pool: KVPool, needs: AttentionNeeds) -> AttentionBackend:
        """A backend over a pool, which has the layout that it wants."""
        ...

    def why_not(self, needs: AttentionNeeds) -> str | None:
        """Why it cannot serve a model here; None if it can."""
        ...

    def layout(self, needs: AttentionNeeds) -> KVLayout:
        """How it wants the KV of that model to lie."""
        ...


class _Entry(NamedTuple):
    """A registered backend, which is loaded when somebody asks for it."""

    load: Callable[[], BackendClass]
    requires: str | None

    def why_not(self, needs: AttentionNeeds) -> str | None:
        if self.requires is not None and find_spec(self.requires) is None:
            return f"needs {self.requires}, which is not installed"
        return self.load().why_not(needs)

    def leaves_to_others(self, needs: AttentionNeeds) -> bool:
        backend = self.load()
        return isinstance(backend, LeavesToOthers) and backend.leaves_to_others(needs)


_REGISTRY: dict[str, _Entry] = {}


def register_backend(backend: BackendClass) -> None:
    """Make a backend known by its name; "auto" takes the first registered one that can serve the model.

    One that `LeavesToOthers` a model is taken for it only if no other can serve it.
    """
    _REGISTRY[backend.name] = _Entry(lambda: backend, None)


def register_backend_path(name: str, path: str, *, requires: str | None = None) -> None:
    """The same for a class that is imported only when the backend is asked for.

    Args:
        name: that of the class.
        path: its module and its own name, as "package.module:Class".
        requires: a package that the module imports; where it is not installed, the backend can serve no model.
    """
    _REGISTRY[name] = _Entry(lambda: _import(name, path), requires)


def unregister_backend(name: str) -> None:
    """Forget the backend of that name."""
    del _REGISTRY[name]


def backend_names() -> Sequence[str]:
    """The registered backends, in the order in which "auto" tries them."""
    return list(_REGISTRY)


def why_not_keys_and_values(needs: AttentionNeeds) -> str | None:
    """Why a backend that reads keys and values of their own cannot serve a model; None if it can."""
    if any(layer.kv.is_latent for layer in needs.layers):
        return "reads keys and values, and the model keeps latents (MLA)"
    return None


def why_not(name: str, needs: AttentionNeeds) -> str | None:
    """Why the registered backend of that name cannot serve the model; None if it can."""
    return _REGISTRY[name].why_not(needs)


def choose_backend(name: str, needs: AttentionNeeds) -> BackendClass:
    """The backend of that name; "auto" takes the first that can serve the model and does not leave it to others, and
    asks none after it.

    Raises: UnsupportedBackendError that says why, and what can.
    """
    if name == "auto":
        chosen = _first_choice(needs)
    elif name not in _REGISTRY:
        raise UnsupportedBackendError(f"unknown attention backend {name!r}; there are auto, {', '.join(_REGISTRY)}")
    else:
        chosen = name if why_not(name, needs) is None else None
    if chosen is not None:
        return _REGISTRY[chosen].load()
    if not (able := list(_able(needs))):
        reasons = "; ".join(f"{other} {why_not(other, needs)}" for other in _REGISTRY)
        raise UnsupportedBackendError(f"no attention backend can serve this model with these settings: {reasons}")
    reason = why_not(name, needs)
    raise UnsupportedBackendError(f"attention backend {name!r} {reason}; {', '.join(able)} can serve this model")


def _first_choice(needs: AttentionNeeds) -> str | None:
    """What "auto" takes; None if no backend can serve the model."""
    last_resorts: list[str] = []
    for name in _able(needs):
        if not _REGISTRY[name].leaves_to_others(needs):
            return name
        last_resorts.append(name)
    return last_resorts[0] if last_resorts else None


def _able(needs: AttentionNeeds) -> Iterator[str]:
    """The backends that can serve the model."""
    return (name for name in _REGISTRY if why_not(name, needs) is None)


def _import(name: str, path: str) -> BackendClass:
    module, _, attribute = path.partition(":")
    try:
        backend: BackendClass = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UnsupportedBackendError(
            f"attention backend {name!r} cannot be imported from {path!r} (package.module:Class): {error}"
        ) from error
    return backend
