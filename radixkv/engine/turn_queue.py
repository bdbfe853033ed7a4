"""Lets the turns of one conversation run one at a time, in the order in which they were asked for."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from radixkv.errors import SessionBusyError


class _Turn:
    """A place in the queue."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.may_go = threading.Event()


class TurnQueue:
    """A first-come, first-served lock without state of its own besides the queue: whose turn is first may run.

    Every operation on the queue is atomic, so a turn may end anywhere, in a finaliser amid another operation too.
    """

    def __init__(self) -> None:
        self._queue: deque[_Turn] = deque()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for the turns before this one, then run.

        Raises: SessionBusyError if this thread would wait for itself.
        """
        mine = _Turn()
        try:
            self._queue.append(mine)
            first = self._queue[0]
            if first is not mine:
                if first.thread == mine.thread:
                    raise SessionBusyError(
                        "a turn of this session is not finished: read its stream to the end or close it first"
                    )
                mine.may_go.wait()
            yield
        finally:
            if mine in self._queue:
                self._queue.remove(mine)
            for first in list(self._queue)[:1]:
                first.may_go.set()
