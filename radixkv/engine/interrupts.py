"""Ctrl-C between two operations, never amid one."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class DeferredInterrupt:
    """While this is open in the main thread, the first Ctrl-C waits for its end; a second one cuts in.

    Elsewhere, and where SIGINT has no Python handler, it does nothing: the interpreter only interrupts the main thread.
    """

    def __init__(self) -> None:
        self._handler: Any = None
        self._pressed = False

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread() and callable(signal.getsignal(signal.SIGINT)):
            self._handler = signal.signal(signal.SIGINT, self._press)

    def __exit__(self, *exception: object) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            if self._pressed:
                self._handler(signal.SIGINT, None)

    def _press(self, number: int, frame: FrameType | None) -> None:
        if self._pressed:
            raise KeyboardInterrupt
        self._pressed = True
