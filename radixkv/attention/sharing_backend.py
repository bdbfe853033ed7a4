"""Attention where layers read the KV of earlier layers: the pool has one copy, which is written once and read often.

Gemma 3n and Gemma 4 have such layers (`num_kv_shared_layers`). A backend and its pool see the layers alone that keep
KV of their own; what stands here gives each layer of the model its layer of the pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from radixkv.attention.backend import (
    AttentionBackend,
    AttentionNeeds,
    AttentionParams,
    AttentionPlan,
    ChoosesExtends,
    GraphableBackend,
    GraphPlan,
    LayerAttention,
)
from radixkv.attention.metadata import AttentionMetadata


def owning(needs: AttentionNeeds) -> AttentionNeeds:
    """What the layers need that keep KV of their own; these are the layers of the pool, in order."""
    return replace(needs, layers=tuple(layer for layer in needs.layers if layer.reads is None))


def pool_layers(layers: Sequence[LayerAttention]) -> list[int]:
    """The number in the pool of what each layer attends over."""
    numbers: list[int] = []
    num_own = 0
    for layer in layers:
        numbers.append(num_own if layer.reads is None else numbers[layer.reads])
        num_own += layer.reads is None
    return numbers


class SharingBackend:
    """Plans for all layers of a model, over a pool of those that keep KV of their own.

    Args:
        layers: of the model, in order.
        owners: the backend of that pool.
    """

    def __init__(self, layers: Sequence[LayerAttention], owners: AttentionBackend) -> None:
        self.name = owners.name
        self.num_layers = len(layers)
        self._owners = owners
        if isinstance(owners, ChoosesExtends):
            self.long_extends = owners.long_extends
        self._places = pool_layers(layers)
        self._keeps = [layer.reads is None for layer in layers]

    def plan(self, metadata: AttentionMetadata) -> SharingPlan:
        return SharingPlan(self._places, self._keeps, self._owners.plan(metadata))


class SharingPlan:
    """A plan of the owners' backend, by the numbers of the model's layers. See `AttentionPlan`."""

    def __init__(self, places: Sequence[int], keeps: Sequence[bool], owners: AttentionPlan) -> None:
        self._places, self._keeps, self._owners = places, keeps, owners

    def store_kv(self, layer: int, k: Tensor, v: Tensor) -> None:
        if self._keeps[layer]:  # the others bring what is there already
            self._owners.store_kv(self._places[layer], k, v)

    def attend(self, layer: int, q: Tensor, params: AttentionParams) -> Tensor:
        return self._owners.attend(self._places[layer], q, params)


class GraphableSharingBackend(SharingBackend):
    """The same over a backend whose decodes a CUDA graph can capture. See `GraphableBackend`."""

    _owners: GraphableBackend

    def __init__(self, layers: Sequence[LayerAttention], owners: GraphableBackend) -> None:
        super().__init__(layers, owners)

    def pays_to_share(self, metadata: AttentionMetadata) -> bool:
        """Whether the owners' backend reads a prefix of the batch once."""
        return self._owners.pays_to_share(metadata)

    def graph_plan(self, slots: Tensor, max_pages: int) -> SharingGraphPlan:
        return SharingGraphPlan(self._places, self._keeps, self._owners.graph_plan(slots, max_pages))


class SharingGraphPlan(SharingPlan):
    """The same of a graph plan. See `GraphPlan`."""

    _owners: GraphPlan

    def __init__(self, places: Sequence[int], keeps: Sequence[bool], owners: GraphPlan) -> None:
        super().__init__(places, keeps, owners)

    def update(self, metadata: AttentionMetadata) -> None:
        self._owners.update(metadata)


def make_sharing_backend(layers: Sequence[LayerAttention], owners: AttentionBackend) -> AttentionBackend:
    """`owners` for all `layers` of the model; itself where none reads another's KV."""
    if all(layer.reads is None for layer in layers):
        return owners
    if isinstance(owners, GraphableBackend):
        return GraphableSharingBackend(layers, owners)
    return SharingBackend(layers, owners)
