"""Keys and values of one layer in one buffer that grows by chunks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class ByteMeter:
    """Counts the bytes that the buffers of one cache hold, and how often they had to move.

    Attributes:
        held_bytes: allocated now.
        peak_bytes: the most that was allocated at one time, with the old buffer while its content moves to a new one.
        copies: how often the content of a layer moved to another buffer.
    """

    def __init__(self) -> None:
        self.held_bytes = self.peak_bytes = self.copies = 0

    def take(self, num_bytes: int) -> None:
        """Count an allocation."""
        self.held_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)

    def give_back(self, num_bytes: int) -> None:
        """Count a buffer that was dropped."""
        self.held_bytes -= num_bytes


class ChunkBuffer:
    """K and V of `[start, end)` of `capacity` columns, each [batch, num_kv_heads, capacity, head_dim].

    Columns before `start` are dead: they cost room until the buffer moves. A view that was handed out stays as it is
    until a column that it shows is cropped and written again.
    """

    def __init__(self, meter: ByteMeter) -> None:
        self._meter = meter
        self._k: Tensor | None = None
        self._v: Tensor | None = None
        self.start = self.end = 0

    @property
    def num_live(self) -> int:
        """Columns that hold KV."""
        return self.end - self.start

    @property
    def capacity(self) -> int:
        """Columns there is room for."""
        return 0 if self._k is None else self._k.shape[-2]

    @property
    def held_bytes(self) -> int:
        """Size of the buffer."""
        return sum(part.numel() * part.element_size() for part in (self._k, self._v) if part is not None)

    @property
    def wasted_bytes(self) -> int:
        """Bytes that were allocated for columns that hold nothing now."""
        return self.held_bytes * (self.capacity - self.num_live) // max(1, self.capacity)

    def view(self, first: int | None = None) -> tuple[Tensor, Tensor]:
        """K and V of the columns from `first` (of the live ones, if not given) on: no copies."""
        k, v = self._parts()
        first = self.start if first is None else first
        return k[:, :, first : self.end], v[:, :, first : self.end]

    def move(self, like_k: Tensor, like_v: Tensor, capacity: int) -> None:
        """Let the live columns begin a new buffer of `capacity` columns. O(live columns).

        Batch, heads, dims, dtype and device are those of `like_k` and `like_v`.
        """
        old, old_bytes, live = (self._k, self._v), self.held_bytes, slice(self.start, self.end)
        self._k, self._v = (like.new_empty(*like.shape[:2], capacity, like.shape[-1]) for like in (like_k, like_v))
        self._meter.take(self.held_bytes)
        if self.num_live:
            for part, before in zip((self._k, self._v), old, strict=True):
                assert before is not None, "live columns lie in a buffer"
                part[:, :, : self.num_live] = before[:, :, live]
            self._meter.copies += 1
        self._meter.give_back(old_bytes)
        self.start, self.end = 0, self.num_live

    def append(self, k: Tensor, v: Tensor) -> None:
        """Write [batch, num_kv_heads, columns, head_dim] after the last column; there must be room. O(columns)."""
        own_k, own_v = self.extend(k.shape[-2])
        own_k.copy_(k)
        own_v.copy_(v)

    def extend(self, num_columns: int) -> tuple[Tensor, Tensor]:
        """Add columns that the caller writes; there must be room. Returns: views of their K and V."""
        assert self.end + num_columns <= self.capacity, "move first"
        first, self.end = self.end, self.end + num_columns
        return self.view(first)

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Put `change(K)` and `change(V)`, which may differ in their rows, in place of K and V. O(size)."""
        k, v = self._parts()
        before = self.held_bytes
        self._k, self._v = change(k), change(v)
        self._meter.take(self.held_bytes)
        self._meter.give_back(before)
        self._meter.copies += 1

    def clear(self) -> None:
        """Drop everything."""
        self._meter.give_back(self.held_bytes)
        self._k = self._v = None
        self.start = self.end = 0

    def _parts(self) -> tuple[Tensor, Tensor]:
        assert self._k is not None, "nothing was written yet"
        assert self._v is not None, "K and V come together"
        return self._k, self._v


def round_up(num: int, step: int) -> int:
    """The smallest multiple of `step` that is not less than `num`.

    >>> round_up(257, 256), round_up(256, 256)
    (512, 256)
    """
    return -(-num // step) * step


def rows(indices: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that takes these rows of a batch."""
    return lambda part: part.index_select(0, indices.to(device=part.device, dtype=torch.int64))
