"""States of recurrent layers as plain bytes, in parts of one size: what goes to a store of pages and comes back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixkv.memory.state_pool import StatePool


class StateBytes:
    """Moves slots of a pool of states to bytes and back.

    The bytes of a state are those of its tensors, one after another, cut every `part_bytes`; zeros fill the last part.
    Pools with the same `layout` can read each other's.

    Attributes:
        part_bytes: bytes of each part.
        num_parts: of each state.
    """

    def __init__(self, pool: StatePool, part_bytes: int) -> None:
        self._pool = pool
        self._rows = [tensor.view(pool.num_slots, -1).view(torch.uint8) for tensor in pool.tensors]  # [slots, bytes]
        self._ends = np.cumsum([row.shape[1] for row in self._rows]).tolist()
        self.part_bytes = part_bytes
        self.num_parts = -(-pool.bytes_per_slot // part_bytes)

    @property
    def layout(self) -> str:
        """What a state is: the tensors of which layers, and of which shapes and dtypes."""
        return ", ".join(
            f"{shape.layer}.{shape.kind}.{shape.number}: {'x'.join(map(str, shape.shape))} "
            f"{str(shape.dtype).removeprefix('torch.')}"
            for shape in self._pool.shapes
        )

    def read(self, slots: Sequence[int], num_tokens: Sequence[int]) -> NDArray[np.uint8]:
        """A copy of states, [n, num_parts, part_bytes], whatever tokens they stand after. O(bytes)."""
        content = np.zeros((len(slots), self.num_parts, self.part_bytes), np.uint8)
        for slot, state in zip(slots, torch.from_numpy(content.reshape(len(slots), -1)), strict=True):
            for row, end in zip(self._rows, self._ends, strict=True):
                state[end - row.shape[1] : end].copy_(row[slot])
        return content

    def write(self, slot: int, first_part: int, payloads: Sequence[bytes]) -> None:
        """Put parts of a state, from number `first_part` on, into its slot. O(bytes)."""
        for number, payload in enumerate(payloads, first_part):
            assert len(payload) == self.part_bytes, "a part of another size"
            start = number * self.part_bytes
            content = torch.from_numpy(np.frombuffer(payload, np.uint8).copy())  # torch wants memory to be writable
            for place, first, last in self._places(slot, start, start + self.part_bytes):
                place.copy_(content[first - start : last - start])

    def _places(self, slot: int, start: int, end: int) -> Iterator[tuple[Tensor, int, int]]:
        """Where the bytes `[start, end)` of a state lie: views, and which bytes each of them holds."""
        for row, row_end in zip(self._rows, self._ends, strict=True):
            row_start = row_end - row.shape[1]
            first, last = max(start, row_start), min(end, row_end)
            if first < last:
                yield row[slot, first - row_start : last - row_start], first, last
