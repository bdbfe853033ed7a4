"""How long tokens lay unused before they were evicted."""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

LIMITS_S = (0.1, 1.0, 10.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0, 86_400.0)


class EvictionAges(NamedTuple):
    """Evicted tokens by their age: the seconds from their last use to their eviction.

    `tokens[i]` were at most `LIMITS_S[i]` old, and older than the limit before; the last of `tokens` were older than
    every limit. `total_s` is the sum over all tokens.
    """

    tokens: tuple[int, ...] = (0,) * (len(LIMITS_S) + 1)
    total_s: float = 0.0


class AgeCounter:
    """Counts evicted tokens by age.

    >>> counter = AgeCounter()
    >>> counter.add(16, unused_s=0.5), counter.add(32, unused_s=100_000.0)
    (None, None)
    >>> counter.ages()
    EvictionAges(tokens=(0, 16, 0, 0, 0, 0, 0, 0, 0, 32), total_s=3200008.0)
    """

    def __init__(self) -> None:
        self._tokens = [0] * (len(LIMITS_S) + 1)
        self._total_s = 0.0

    def add(self, num_tokens: int, *, unused_s: float) -> None:
        """So many tokens were evicted. O(1)."""
        self._tokens[bisect_left(LIMITS_S, unused_s)] += num_tokens
        self._total_s += num_tokens * unused_s

    def ages(self) -> EvictionAges:
        """What was counted so far."""
        return EvictionAges(tuple(self._tokens), self._total_s)
