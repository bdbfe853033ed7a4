"""The bytes of the states of recurrent layers: one slot holds the state of one request, in all these layers."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor


class StateShape(NamedTuple):
    """One tensor that a layer keeps of a sequence.

    Attributes:
        layer: index of the layer in the model.
        kind: "conv" for the last inputs of a convolution, "recurrent" for what a recurrence carries on.
        number: of the tensor among those of its kind in its layer.
        shape: of one sequence, without the dimension of the batch.
        dtype: the layer's own.
    """

    layer: int
    kind: str
    number: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of the tensor for one sequence."""
        return prod(self.shape) * self.dtype.itemsize


def bytes_per_state(shapes: Sequence[StateShape]) -> int:
    """Size of the state of one sequence after a token, in all layers.

    >>> bytes_per_state([StateShape(0, "conv", 0, (8, 4), torch.float32)])
    128
    """
    return sum(shape.num_bytes for shape in shapes)


class StatePool:
    """Tensors `[num_slots, *shape]`, one for each `StateShape`.

    A slot is written once and read from then on: a step reads a request's state in one slot and writes the next state
    to another, so requests, forks and the cache can share a slot, and a step that fails has changed nothing. Who has
    which slot is known to `StateSlots`.
    """

    def __init__(self, shapes: Sequence[StateShape], num_slots: int, device: torch.device | str) -> None:
        self.shapes = tuple(shapes)
        self.num_slots = num_slots
        self.device = torch.device(device)
        self.tensors = tuple(
            torch.zeros((num_slots, *shape.shape), dtype=shape.dtype, device=self.device) for shape in self.shapes
        )

    @property
    def bytes_per_slot(self) -> int:
        """Size of one slot in all layers."""
        return bytes_per_state(self.shapes)

    @property
    def num_bytes(self) -> int:
        """Size of the whole pool."""
        return self.num_slots * self.bytes_per_slot

    def read(self, tensor: int, slots: Tensor) -> Tensor:
        """A copy of what `slots` (int64 [n], on the device) hold of a tensor: [n, *shape]."""
        return self.tensors[tensor].index_select(0, slots)

    def write(self, tensor: int, slots: Tensor, values: Tensor) -> None:
        """Put `values` [n, *shape] into `slots` (int64 [n], on the device) of a tensor."""
        self.tensors[tensor].index_copy_(0, slots, values.to(self.tensors[tensor].dtype))

    def slot_tensors(self, slot: int) -> list[Tensor]:
        """The tensors of one slot, views; for copies out of and into the pool."""
        return [tensor[slot] for tensor in self.tensors]
