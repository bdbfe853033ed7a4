"""Lets drivers of an engine wait for what the threads of its tiers bring."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Arrivals:
    """Counts what arrived, and wakes who waits for more."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = 0
        self._listeners: list[Callable[[], object]] = []

    @property
    def count(self) -> int:
        """Arrivals so far."""
        return self._count

    def listen(self, listener: Callable[[], object]) -> None:
        """Call `listener` at each arrival from now on, in the thread that brought it."""
        self._listeners.append(listener)

    def notify(self) -> None:
        """Something arrived."""
        with self._changed:
            self._count += 1
            self._changed.notify_all()
        for listener in self._listeners:
            listener()

    def wait(self, seen: int, timeout_s: float | None) -> None:
        """Wait until `count` is more than `seen`, at most so long."""
        with self._changed:
            self._changed.wait_for(lambda: self._count > seen, timeout_s)
