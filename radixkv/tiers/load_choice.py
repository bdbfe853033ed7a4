"""Whether loading a prefix is faster than computing it, by what both took before."""

from __future__ import annotations

from collections import deque
from statistics import median

KEPT = 5  # measurements a bucket; the median of few forgets an outlier soon


class Learned:
    """A quantity that depends on a size, measured again and again: kept by powers of two of the size.

    >>> seconds_per_byte = Learned()
    >>> seconds_per_byte.at(1000) is None
    True
    >>> seconds_per_byte.record(1000, 2e-9)
    >>> seconds_per_byte.at(1_000_000)                      # nothing is nearer
    2e-09
    """

    def __init__(self) -> None:
        self._measured: dict[int, deque[float]] = {}

    def record(self, size: int, value: float) -> None:
        """Note that it was `value` at `size`. O(1)."""
        self._measured.setdefault(size.bit_length(), deque(maxlen=KEPT)).append(value)

    def replace(self, size: int, value: float) -> None:
        """Forget everything but that it was `value` at `size`."""
        self._measured.clear()
        self.record(size, value)

    def at(self, size: int) -> float | None:
        """The median of the last measurements at the nearest size; None if there are none. O(buckets)."""
        if not self._measured:
            return None
        wanted = size.bit_length()
        return median(self._measured[min(self._measured, key=lambda bucket: abs(bucket - wanted))])


class PrefillRate:
    """Seconds per token of prompts, by the depth at which the tokens lie: attention takes longer there."""

    LEAST_TOKENS = 32  # fewer in a step are bound by reading the weights, and tell nothing of long prompts

    def __init__(self) -> None:
        self._seconds_per_token = Learned()

    def record(self, first: int, last: int, seconds: float) -> None:
        """The tokens `[first, last)` of a prompt took so long."""
        if last - first >= self.LEAST_TOKENS and seconds > 0:
            self._seconds_per_token.record((first + last) // 2, seconds / (last - first))

    def seconds(self, first: int, last: int) -> float | None:
        """How long the tokens `[first, last)` would take; None if nothing was measured yet."""
        per_token = self._seconds_per_token.at((first + last) // 2)
        return None if per_token is None else per_token * (last - first)


class LoadRate:
    """Seconds per byte of a tier, by the size of the load; and when one that was too slow is tried again.

    A load that was given up counts as one that would have taken longer than it was waited for.
    """

    FIRST_PROBE_S, MOST_PROBE_S = 10.0, 640.0

    def __init__(self) -> None:
        self._seconds_per_byte = Learned()
        self._probe_s = self.FIRST_PROBE_S
        self._next_probe_at: float | None = None  # None while it is not slow

    @property
    def is_slow(self) -> bool:
        """Whether the last choice was against it."""
        return self._next_probe_at is not None

    def may_be_tried(self, now: float) -> bool:
        """Whether it is not slow, or was left alone long enough to be measured again."""
        return self._next_probe_at is None or now >= self._next_probe_at

    def record(self, num_bytes: int, seconds: float) -> None:
        """A load took so long."""
        self._seconds_per_byte.record(num_bytes, seconds / max(1, num_bytes))

    def seconds(self, num_bytes: int) -> float | None:
        """How long a load would take; None if nothing was measured yet."""
        per_byte = self._seconds_per_byte.at(num_bytes)
        return None if per_byte is None else per_byte * num_bytes

    def is_faster(self, num_bytes: int, compute_s: float | None, now: float) -> bool:
        """Whether loading is measured to be faster than `compute_s`, or one of the two is not known yet."""
        load_s = self.seconds(num_bytes)
        if load_s is None or compute_s is None or load_s < compute_s:
            self._next_probe_at, self._probe_s = None, self.FIRST_PROBE_S
            return True
        if self._next_probe_at is None:
            self._next_probe_at = now + self._probe_s
        return False

    def probe_is_due(self, now: float) -> bool:
        """Whether it was left alone long enough to be measured again, by a load that nobody waits for.

        If so the next one is due later, each time after twice as long.
        """
        if self._next_probe_at is None or now < self._next_probe_at:
            return False
        self._probe_s = min(self.MOST_PROBE_S, 2 * self._probe_s)
        self._next_probe_at = now + self._probe_s
        return True

    def probed(self, num_bytes: int, seconds: float) -> None:
        """A probe took so long: what was measured before counts no more."""
        self._seconds_per_byte.replace(num_bytes, seconds / max(1, num_bytes))
