"""Which replicas of a deployment run, as Ray Serve tells its request router."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection


class Roster:
    """The names of the replicas that run. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._names: frozenset[str] = frozenset()
        self._on_change: Callable[[], object] = lambda: None

    @property
    def names(self) -> frozenset[str]:
        """The replicas that run now."""
        with self._lock:
            return self._names

    def set(self, names: Collection[str]) -> None:
        """These run now, and no others."""
        with self._lock:
            self._names = frozenset(names)
            on_change = self._on_change
        on_change()

    def follow(self, on_change: Callable[[], object]) -> None:
        """Call `on_change` after each change, in whichever thread makes it. There is one follower."""
        with self._lock:
            self._on_change = on_change


ROSTER = Roster()
"""That of this process. Ray Serve makes the request router itself, in the process of the deployment that has the
handle, and hands it nothing but plain data: so this is how the two meet. One process has one deployment."""
