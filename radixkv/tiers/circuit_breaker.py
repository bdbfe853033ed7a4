"""A circuit breaker: after some failures in a row a server is left alone for a while, then tried once."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Lock


class CircuitBreaker:
    """Says whether to ask a server, from how it went before. Thread-safe; every method is O(1).

    After `max_failures` failures in a row it refuses for `min_pause_s`, then lets one caller try. If that fails, the
    pause doubles, up to `max_pause_s`; a success ends it.
    """

    def __init__(
        self,
        max_failures: int = 3,
        min_pause_s: float = 1.0,
        max_pause_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_failures, self._min_pause_s, self._max_pause_s = max_failures, min_pause_s, max_pause_s
        self._clock = clock
        self._lock = Lock()
        self._failures = 0
        self._pause_s = 0.0
        self._closed_at_s = 0.0  # when the pause is over

    def allows(self) -> bool:
        """Whether to ask. True also makes the caller the one that tries, if there was a pause: tell how it went."""
        with self._lock:
            if self._failures < self._max_failures:
                return True
            now_s = self._clock()
            if now_s < self._closed_at_s:
                return False
            self._closed_at_s = now_s + self._pause_s  # nobody else tries meanwhile
            return True

    @property
    def pause_left_s(self) -> float:
        """Seconds for which it refuses; 0 if it does not."""
        with self._lock:
            paused = self._failures >= self._max_failures
            return max(self._closed_at_s - self._clock(), 0.0) if paused else 0.0

    def succeeded(self) -> None:
        """Tell that the server answered."""
        with self._lock:
            self._failures, self._pause_s = 0, 0.0

    def failed(self) -> None:
        """Tell that the server did not answer in time, or with an error of its own."""
        with self._lock:
            self._failures += 1
            if self._failures >= self._max_failures:
                self._pause_s = min(max(2 * self._pause_s, self._min_pause_s), self._max_pause_s)
                self._closed_at_s = self._clock() + self._pause_s
