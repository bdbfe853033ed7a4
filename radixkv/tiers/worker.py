"""A thread that works on a store in the background, and ends when it is told to."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod


class Worker(ABC):
    """Owns the thread and the condition that guards what it shares with others. A daemon: a store may hang it."""

    def __init__(self, name: str) -> None:
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"radixkv-{name}", daemon=True)

    @abstractmethod
    def _run(self) -> None:
        """What the thread does."""

    @abstractmethod
    def stop(self) -> None:
        """Ask the thread to end. Waits for nothing."""

    def close(self, timeout_s: float) -> bool:
        """Stop, and wait for the end of the thread. Returns False if the store hangs: it ends with its call."""
        self.stop()
        return self.wait(timeout_s)

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end of the thread. Returns whether it has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()
