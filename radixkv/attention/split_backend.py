"""Attention over two pools, of layers that see everything and of layers that see a window of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
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
from radixkv.attention.metadata import AttentionMetadata, flattened_slots, to_device


def sees_window(params: AttentionParams) -> bool:
    """Whether a layer sees less than everything before it."""
    return params.sliding_window is not None or params.chunk_size is not None


def split_needs(needs: AttentionNeeds) -> tuple[AttentionNeeds, AttentionNeeds]:
    """What the layers of full attention need, and what those of a window do. Either may be without layers."""
    full, window = (
        tuple(layer for layer in needs.layers if sees_window(layer.params) == in_window) for in_window in (False, True)
    )
    return replace(needs, layers=full), replace(needs, layers=window)


class SplitBackend:
    """Each layer goes to the backend of its pool; the one of the window pool reads `of_page` in place of pages.

    Args:
        layers: of the model, in order.
        full: None if all layers see a window.
        of_page: int32 [num_pages + 1], the window page of each page, as it is when a batch is planned.
    """

    def __init__(
        self,
        layers: Sequence[LayerAttention],
        full: AttentionBackend | None,
        window: AttentionBackend,
        of_page: NDArray[np.int32],
    ) -> None:
        self.name = window.name
        self.num_layers = len(layers)
        self._full, self._window, self._of_page = full, window, of_page
        if isinstance(window, ChoosesExtends):
            self.long_extends = window.long_extends
        self._in_window = [sees_window(layer.params) for layer in layers]

    def plan(self, metadata: AttentionMetadata) -> SplitPlan:
        pages = self._of_page[metadata.kv_indices]
        slots = to_device(flattened_slots(metadata, pages), metadata.slots.device)
        return SplitPlan(
            self._in_window,
            None if self._full is None else self._full.plan(metadata),
            self._window.plan(_of_window(metadata, pages, slots)),
        )


class SplitPlan:
    """Plans of both pools; each layer goes to one of them, by its number there. See `AttentionPlan`."""

    def __init__(self, in_window: Sequence[bool], full: AttentionPlan | None, window: AttentionPlan) -> None:
        self._plans: list[tuple[AttentionPlan, int]] = []  # of each layer
        num_full = num_window = 0
        for sees_less in in_window:
            if sees_less or full is None:
                self._plans.append((window, num_window))
                num_window += 1
            else:
                self._plans.append((full, num_full))
                num_full += 1

    def store_kv(self, layer: int, k: Tensor, v: Tensor) -> None:
        plan, number = self._plans[layer]
        plan.store_kv(number, k, v)

    def attend(self, layer: int, q: Tensor, params: AttentionParams) -> Tensor:
        plan, number = self._plans[layer]
        return plan.attend(number, q, params)


class GraphableSplitBackend(SplitBackend):
    """The same of backends whose decodes a CUDA graph can capture. See `GraphableBackend`."""

    _full: GraphableBackend | None
    _window: GraphableBackend

    def __init__(
        self,
        layers: Sequence[LayerAttention],
        full: GraphableBackend | None,
        window: GraphableBackend,
        of_page: NDArray[np.int32],
    ) -> None:
        super().__init__(layers, full, window, of_page)

    def pays_to_share(self, metadata: AttentionMetadata) -> bool:
        """Whether the layers of full attention read a prefix of the batch once; those of a window never do."""
        return self._full is not None and self._full.pays_to_share(metadata)

    def graph_plan(self, slots: Tensor, max_pages: int) -> SplitGraphPlan:
        window_slots = torch.zeros_like(slots)
        return SplitGraphPlan(
            self._in_window,
            None if self._full is None else self._full.graph_plan(slots, max_pages),
            self._window.graph_plan(window_slots, max_pages),
            self._of_page,
            window_slots,
        )


class SplitGraphPlan(SplitPlan):
    """Graph plans of both pools; the slots of window pages lie in a tensor that stays. See `GraphPlan`."""

    def __init__(
        self,
        in_window: Sequence[bool],
        full: GraphPlan | None,
        window: GraphPlan,
        of_page: NDArray[np.int32],
        window_slots: Tensor,
    ) -> None:
        super().__init__(in_window, full, window)
        self._full, self._window = full, window
        self._of_page, self._window_slots = of_page, window_slots

    def update(self, metadata: AttentionMetadata) -> None:
        pages = self._of_page[metadata.kv_indices]
        slots = to_device(flattened_slots(metadata, pages), self._window_slots.device)
        self._window_slots[: len(slots)].copy_(slots, non_blocking=True)
        if self._full is not None:
            self._full.update(metadata)
        self._window.update(_of_window(metadata, pages, self._window_slots))


def make_split_backend(
    needs: AttentionNeeds, full: AttentionBackend | None, window: AttentionBackend, of_page: NDArray[np.int32]
) -> SplitBackend:
    """One that a CUDA graph can capture if its parts can be."""
    if isinstance(window, GraphableBackend) and (full is None or isinstance(full, GraphableBackend)):
        return GraphableSplitBackend(needs.layers, full, window, of_page)
    return SplitBackend(needs.layers, full, window, of_page)


def _of_window(metadata: AttentionMetadata, pages: NDArray[np.int32], slots: Tensor) -> AttentionMetadata:
    """The batch in window pages. What is shared is not read once: a window sees little of a prefix that is long enough
    to pay, and what it does not see is gone."""
    return replace(metadata, kv_indices=pages, slots=slots, shared_nodes=())
