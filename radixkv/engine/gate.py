"""Lets one thread at a time into the engine, and no interrupt or finaliser into the middle of an operation."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from radixkv.engine.interrupts import DeferredInterrupt


class Gate:
    """A re-entrant lock for operations on requests and pages.

    While it is held in the main thread, the first Ctrl-C waits for the end of the operation. What a finaliser wants to
    do is queued and done by the next operation, since a finaliser may run in the middle of any operation.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._is_inside = False  # whether the thread that has the lock is inside `exclusive`
        self._later: deque[Callable[[], object]] = deque()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep other threads, finalisers and the first Ctrl-C out of what is done inside."""
        with DeferredInterrupt(), self._lock:
            if self._is_inside:  # an operation within an operation
                yield
                return
            self._is_inside = True
            try:
                self._do_queued()
                yield
                self._do_queued()
            finally:
                self._is_inside = False
        self._do_queued_if_free()

    def do_soon(self, operation: Callable[[], object]) -> None:
        """Do `operation` now if nobody is inside, else when the operation under way has ended. Never waits."""
        self._later.append(operation)
        self._do_queued_if_free()

    def _do_queued(self) -> None:
        while self._later:
            self._later.popleft()()

    def _do_queued_if_free(self) -> None:
        """Do what was queued while no operation could take note of it."""
        if self._later and not self._is_inside and self._lock.acquire(blocking=False):
            try:
                with self.exclusive():
                    pass
            finally:
                self._lock.release()
