"""Where a `RadixCache` keeps the states of recurrent layers between calls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from radixkv.cache.residency.residency import Everywhere, HeldTokens, Residency
from radixkv.cache.residency.state_slots import StateSlots
from radixkv.errors import ConfigError
from radixkv.memory.state_pool import StatePool, StateShape, bytes_per_state
from radixkv.memory.state_share import FEW_STATES


class StateStore:
    """A pool of states, and who has which slot of it. One of no shapes is for a model without recurrent layers.

    A state is that of one sequence after some tokens: one tensor for each of `shapes`.
    """

    def __init__(self, shapes: Sequence[StateShape], num_slots: int, max_tokens: int) -> None:
        """The memory comes with `allocate`. Raises: ConfigError if there are too few slots for one sequence."""
        self.shapes = tuple(shapes)
        self.slots = StateSlots(num_slots, interval_tokens=max_tokens) if shapes else None
        self._pool: StatePool | None = None
        self._devices: list[torch.device] = []  # where the model keeps each tensor

    @property
    def residency(self) -> Residency:
        """What tells where hits may end."""
        return Everywhere() if self.slots is None else self.slots

    @property
    def num_slots(self) -> int:
        """States that there is room for."""
        return 0 if self.slots is None else self.slots.num_slots

    @property
    def num_bytes(self) -> int:
        """Size of the pool; 0 before `allocate`."""
        return 0 if self._pool is None else self._pool.num_bytes

    def allocate(self, state: Sequence[Tensor]) -> None:
        """Make the pool, for states that lie where the tensors of `state` do. Raises: ConfigError without memory."""
        if not self.shapes or self._pool is not None:
            return
        self._devices = [tensor.device for tensor in state]
        device = self._devices[0]
        try:
            with torch.inference_mode(False):  # tensors made in inference mode cannot be written to outside of it
                self._pool = StatePool(self.shapes, self.num_slots, device)
        except (RuntimeError, MemoryError) as error:  # torch has no narrower error for the CPU's memory
            raise ConfigError(
                f"no room on {device} to keep {self.num_slots} states of {bytes_per_state(self.shapes)} bytes; give "
                "RadixCache smaller state_slots"
            ) from error

    def read(self, held: HeldTokens) -> list[Tensor]:
        """A copy of the state after all of `held`, which is kept, where the model keeps it. O(state)."""
        if self.slots is None:
            return []
        assert self._pool is not None, "what is kept was written"
        tensors = self._pool.slot_tensors(self.slots.touch(held))
        return [tensor.to(device, copy=True) for tensor, device in zip(tensors, self._devices, strict=True)]

    def write(self, slot: int, state: Sequence[Tensor]) -> None:
        """Put a state into a slot. O(state)."""
        assert self._pool is not None, "allocate made it"
        for target, tensor in zip(self._pool.slot_tensors(slot), state, strict=True):
            target.copy_(tensor)

    def reset(self) -> None:
        """Free the memory."""
        self._pool = None
        self._devices = []


def default_slots(shapes: Sequence[StateShape], kv_bytes: int, num_pages: int) -> int:
    """As many states as the memory of all pages has room for, at most one a page, and at least a few.

    >>> default_slots([StateShape(0, "conv", 0, (8, 4), torch.float32)], kv_bytes=128 * 40, num_pages=30)
    30
    """
    return max(FEW_STATES, min(num_pages, kv_bytes // max(1, bytes_per_state(shapes))))
