"""What a store has done since it was opened, counted for its `stats`."""

from __future__ import annotations

from collections import Counter
from threading import Lock

from radixkv.tiers.page_store import StoreStats


class StoreCounts:
    """Counters of a store. Thread-safe; every method is O(1)."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._misses: Counter[str] = Counter()
        self._read = self._written = self._evicted = self._errors = 0
        self._last_error: str | None = None

    def missed(self, reason: str, num_pages: int = 1) -> None:
        """Pages were found, and could not be given."""
        with self._lock:
            self._misses[reason] += num_pages

    def read(self, num_pages: int) -> None:
        """Pages were given."""
        with self._lock:
            self._read += num_pages

    def written(self, num_pages: int, num_evicted: int) -> None:
        """Pages came in, and others gave way."""
        with self._lock:
            self._written += num_pages
            self._evicted += num_evicted

    def failed(self, message: str) -> bool:
        """The medium failed. Returns whether the message is another one than the last time."""
        with self._lock:
            is_new = message != self._last_error
            self._errors += 1
            self._last_error = message
            return is_new

    def stats(self, pages: int, num_bytes: int, capacity_bytes: int) -> StoreStats:
        """All of it, and what the store holds."""
        with self._lock:
            misses = {reason: count for reason, count in self._misses.items() if count}
            return StoreStats(
                pages=pages,
                bytes=num_bytes,
                capacity_bytes=capacity_bytes,
                pages_read=self._read,
                pages_written=self._written,
                pages_evicted=self._evicted,
                misses=misses,
                errors=self._errors,
                last_error=self._last_error,
            )


def error_line(error: OSError) -> str:
    """What a failure of the medium is called in the counts."""
    return error.strerror or str(error)
