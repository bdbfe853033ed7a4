"""A thread that works on a store in the background, and ends when it is told to."""

from __future__ import annotations

import os
import sys
import threading
from abc import ABC, abstractmethod
from contextlib import suppress

NICENESS = 10  # of 19: about a tenth of a core that others want, and all of one that nobody does


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


def give_way_to_others() -> None:
    """Let this thread work in time that others leave it, where the system has priorities of threads."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with suppress(OSError):  # a sandbox may forbid it
            os.setpriority(os.PRIO_PROCESS, thread, max(NICENESS, os.getpriority(os.PRIO_PROCESS, thread)))
