"""Ctrl-C between any two lines of chosen modules."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest

TRACED = "radixkv/engine"  # interrupts come between any two lines of these modules


@contextmanager
def interrupted_after(num_lines: int, modules: str = TRACED) -> Iterator[None]:
    """Ctrl-C after `num_lines` lines of the engine's modules, or of others that are named like `modules`."""
    left = num_lines

    def count(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        if event == "line":
            left -= 1
            if left == 0:
                sys.settrace(None)
                signal.raise_signal(signal.SIGINT)
        return count

    def enter(frame: FrameType, event: str, argument: object) -> Any:
        return count if left > 0 and modules in frame.f_code.co_filename else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)


def num_lines_of(use: Callable[[], object], modules: str = TRACED) -> int:
    """How many lines of the engine's modules, or of others that are named like `modules`, `use` runs."""
    lines = 0

    def count(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal lines
        lines += event == "line"
        return count

    before = sys.gettrace()
    sys.settrace(lambda frame, event, argument: count if modules in frame.f_code.co_filename else None)
    try:
        use()
    finally:
        sys.settrace(before)
    return lines


def interrupt_each_line(use: Callable[[], object], modules: str) -> None:
    """Interrupt `use` at each of its lines in `modules`; after each, another thread can use the same."""
    total = num_lines_of(use, modules)
    assert total > 5, "nothing was traced"
    for line in range(1, total + 1):
        with pytest.raises(KeyboardInterrupt), interrupted_after(line, modules):
            use()
        other = threading.Thread(target=use, daemon=True)
        other.start()
        other.join(timeout=30)
        assert not other.is_alive(), f"a lock was left taken by the interrupt at line {line} of {total}"
