"""Ctrl-C between two operations, never amid one."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self


class DeferredInterrupt:
    """While this is open in the main thread, the first Ctrl-C waits for its end; a second one cuts in.

    Elsewhere, and where SIGINT has no Python handler, it does nothing: the interpreter only interrupts the main thread.

    Attributes:
        pressed: whether a Ctrl-C waits. Long work may look and end early; one that is done may set it to False.
    """

    def __init__(self) -> None:
        self._handler: Any = None
        self.pressed = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread() and callable(signal.getsignal(signal.SIGINT)):
            self._handler = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            if self.pressed:
                self._handler(signal.SIGINT, None)

    def _press(self, number: int, frame: FrameType | None) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True
