"""Attention over two pools, of layers that see everything and of layers that see a window of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixkv.attention.backend import AttentionBackend, AttentionNeeds, AttentionParams, GraphableBackend
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


class _Place(NamedTuple):
    """Which backend has a layer, and which of its layers it is there."""

    in_window: bool
    number: int


class SplitBackend:
    """Each layer goes to the backend of its pool; the one of the window pool reads `of_page` in place of pages.

    Args:
        layers: of the model, in order.
        full: None if all layers see a window.
        of_page: int32 [num_pages + 1], the window page of each page, as it is when a batch is planned.
    """

    def __init__(
        self,
        needs: AttentionNeeds,
        full: AttentionBackend | None,
        window: AttentionBackend,
        of_page: NDArray[np.int32],
    ) -> None:
        self.name = window.name
        self._full, self._window, self._of_page = full, window, of_page
        self._places = _places([sees_window(layer.params) for layer in needs.layers])
        self._slots: Tensor | None = None

    @property
    def num_layers(self) -> int:
        """Layers of both pools."""
        return len(self._places)

    def plan(self, metadata: AttentionMetadata) -> None:
        if self._full is not None:
            self._full.plan(metadata)
        pages = self._of_page[metadata.kv_indices]
        self._put_slots(flattened_slots(metadata, pages), metadata.slots.device)
        assert self._slots is not None, "just put"
        # what is shared is not read once: of a prefix so long a window sees little, and what it does not see is gone
        self._window.plan(replace(metadata, kv_indices=pages, slots=self._slots, shared_nodes=()))

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        in_window, number = self._places[layer]
        if not in_window:
            self._backend_of_full.write(number, slots, k, v)
            return
        assert self._slots is not None, "written before plan"
        self._window.write(number, self._slots, k, v)

    def run(self, layer: int, q: Tensor, params: AttentionParams) -> Tensor:
        in_window, number = self._places[layer]
        return (self._window if in_window else self._backend_of_full).run(number, q, params)

    @property
    def _backend_of_full(self) -> AttentionBackend:
        assert self._full is not None, "no layer sees everything"
        return self._full

    def _put_slots(self, slots: NDArray[np.int64], device: torch.device) -> None:
        self._slots = to_device(slots, device)


class GraphableSplitBackend(SplitBackend):
    """The same of backends whose decodes a CUDA graph can capture."""

    def pays_to_share(self, metadata: AttentionMetadata) -> bool:
        """Whether the layers of full attention read a prefix of the batch once, which a `fixed` backend does not do."""
        return isinstance(self._full, GraphableBackend) and self._full.pays_to_share(metadata)

    def fixed(self, batch_size: int, max_pages: int) -> FixedSplitBackend:
        """Of fixed backends of both pools. See `GraphableBackend`."""
        full, window = self._full, self._window
        assert isinstance(window, GraphableBackend), "make_split_backend asked"
        assert full is None or isinstance(full, GraphableBackend), "make_split_backend asked"
        return FixedSplitBackend(
            self._places,
            None if full is None else full.fixed(batch_size, max_pages),
            window.fixed(batch_size, max_pages),
            self._of_page,
            batch_size,
        )


class FixedSplitBackend(SplitBackend):
    """Decodes of one batch size, for a CUDA graph: the slots lie in a tensor that stays."""

    def __init__(
        self,
        places: Sequence[_Place],
        full: AttentionBackend | None,
        window: AttentionBackend,
        of_page: NDArray[np.int32],
        batch_size: int,
    ) -> None:
        self.name = window.name
        self._full, self._window, self._of_page = full, window, of_page
        self._places = list(places)
        self._batch_size = batch_size
        self._slots = None

    def _put_slots(self, slots: NDArray[np.int64], device: torch.device) -> None:
        if self._slots is None:
            self._slots = torch.zeros(self._batch_size, dtype=torch.int64, device=device)
        self._slots[: len(slots)].copy_(to_device(slots, device), non_blocking=True)


def make_split_backend(
    needs: AttentionNeeds, full: AttentionBackend | None, window: AttentionBackend, of_page: NDArray[np.int32]
) -> SplitBackend:
    """One that a CUDA graph can capture if its parts can be."""
    graphable = isinstance(window, GraphableBackend) and (full is None or isinstance(full, GraphableBackend))
    return (GraphableSplitBackend if graphable else SplitBackend)(needs, full, window, of_page)


def _places(in_window: Sequence[bool]) -> list[_Place]:
    counts = {False: 0, True: 0}
    places = []
    for of_window in in_window:
        places.append(_Place(of_window, counts[of_window]))
        counts[of_window] += 1
    return places
