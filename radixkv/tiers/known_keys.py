"""Which pages a store on another machine has, as far as this process knows."""

from __future__ import annotations

from collections.abc import Iterable
from threading import Lock

MAX_KEYS = 1 << 17


class KnownKeys:
    """Keys of pages that were found in a store or written to it; the longest unused are forgotten. Thread-safe."""

    def __init__(self, max_keys: int = MAX_KEYS) -> None:
        self._max_keys = max_keys
        self._lock = Lock()
        self._keys: dict[bytes, None] = {}  # the longest unused first

    def __contains__(self, key: bytes) -> bool:
        return key in self._keys

    def add(self, keys: Iterable[bytes]) -> None:
        """The store has these pages. O(keys)."""
        with self._lock:
            for key in keys:
                self._keys.pop(key, None)
                self._keys[key] = None
            while len(self._keys) > self._max_keys:
                del self._keys[next(iter(self._keys))]

    def discard(self, keys: Iterable[bytes]) -> None:
        """The store does not have these pages. O(keys)."""
        with self._lock:
            for key in keys:
                self._keys.pop(key, None)
