"""Writes pages to a store in the background, and drops them rather than hold anybody up."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from radixkv.tiers.backoff import Backoff
from radixkv.tiers.page_store import NewPage, PageFacts, PageStore
from radixkv.tiers.worker import Worker, give_way_to_others

MAX_QUEUED_BYTES = 256 << 20
WRITE_BYTES = 8 << 20  # in one call of the store, or one page if that is more
MAX_TOUCHES = 1 << 16  # pages whose facts wait to be brought up to date

Touch = tuple[bytes, bytes, PageFacts]
"""Parent key, tokens and facts of a page that is stored."""


class PageRecord(NamedTuple):
    """A page to be stored, but for its bytes."""

    key: bytes
    parent_key: bytes
    tokens: bytes
    facts: PageFacts


class _Queued(NamedTuple):
    record: PageRecord
    payload: NDArray[np.uint8]


class Pace:
    """Spreads bytes over time: at most so many a second, after a burst of as many."""

    def __init__(self, max_bytes_s: float | None, now: float) -> None:
        self._max_bytes_s = max_bytes_s
        self._free_at = now  # when all that was let through has had its time

    def delay_s(self, now: float) -> float:
        """How long to wait before anything more is let through."""
        return 0.0 if self._max_bytes_s is None else max(0.0, self._free_at - now)

    def took(self, num_bytes: int, now: float) -> None:
        """So many bytes were let through."""
        if self._max_bytes_s is not None:
            self._free_at = max(now, self._free_at) + num_bytes / self._max_bytes_s


class PageWriter(Worker):
    """A queue of pages before a store, and the thread that writes them, in the order in which they were handed down.

    The queue is bounded in bytes. While it is full, or the store rests after a failure, pages are refused; who hands
    them down goes on, and they are counted.

    Attributes:
        pages_written, pages_dropped: counts since it was made.
    """

    def __init__(
        self,
        store: PageStore,
        *,
        max_queued_bytes: int = MAX_QUEUED_BYTES,
        max_bytes_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_written: Callable[[Sequence[bytes]], object] | None = None,
    ) -> None:
        """`on_written` is called with the keys of pages that were written, in the writer's thread."""
        super().__init__(f"{store.name}-writer")  # `_changed` guards the queue and what comes after it
        self._store = store
        self._on_written = on_written
        self._max_queued_bytes = max(max_queued_bytes, store.payload_bytes)
        self._clock = clock
        self._pace = Pace(max_bytes_s, clock())
        self._queue: deque[_Queued] = deque()
        self._touches: dict[tuple[bytes, bytes], PageFacts] = {}
        self._keys: set[bytes] = set()  # of the pages that wait or are being written
        self._backoff = Backoff(f"writing to the {store.name} tier", clock)
        self._is_busy = self._is_closing = False
        self._at_end: Callable[[], object] = lambda: None
        self.pages_written = self.pages_dropped = 0
        self._thread.start()

    @property
    def backoff(self) -> Backoff:
        """How it fails."""
        return self._backoff

    @property
    def queued_bytes(self) -> int:
        """Bytes that wait or are being written."""
        return len(self._keys) * self._store.payload_bytes

    def num_accepted(self) -> int:
        """How many pages it would take now. O(1)."""
        with self._changed:
            if self._is_closing or self._backoff.rests:
                return 0
            return max(0, self._max_queued_bytes - self.queued_bytes) // self._store.payload_bytes

    def num_accepted_together(self, num_pages: int) -> int:
        """How many of pages that are of use together alone it would take now: all or none. O(1).

        More of them than the queue holds are taken while there is room for one: they would never go otherwise.
        """
        needed = num_pages if num_pages <= self._max_queued_bytes // self._store.payload_bytes else 1
        return num_pages if self.num_accepted() >= needed else 0

    def is_queued(self, key: bytes) -> bool:
        """Whether the page of that key waits or is being written. O(1)."""
        return key in self._keys

    def hand_down(self, records: Sequence[PageRecord], payloads: NDArray[np.uint8]) -> None:
        """Take pages with their bytes [n, payload_bytes], which are not changed later.

        No more than `num_accepted` or `num_accepted_together`.
        """
        with self._changed:
            if self._is_closing or self._backoff.rests:  # since it said what it would take
                self.pages_dropped += len(records)
                return
            self._queue.extend(map(_Queued, records, payloads))
            self._keys.update(record.key for record in records)
            self._changed.notify_all()

    def dropped(self, num_pages: int) -> None:
        """Count pages that were not handed down, since it would not take them."""
        with self._changed:
            self.pages_dropped += num_pages

    def touch(self, touches: Sequence[Touch]) -> None:
        """Bring the facts of stored pages up to date when there is time; what is too much is left out."""
        with self._changed:
            if self._is_closing or self._backoff.rests:
                return
            room = MAX_TOUCHES - len(self._touches)
            self._touches.update({(parent, tokens): facts for parent, tokens, facts in touches[:room]})
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until nothing is left to write. Returns False if that took too long."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._has_work and not self._is_busy, timeout_s)

    def stop(self, at_end: Callable[[], object] = lambda: None) -> None:
        """Take nothing more; the thread writes what is left, calls `at_end`, and ends. Waits for nothing."""
        with self._changed:
            self._is_closing, self._at_end = True, at_end
            self._pace = Pace(None, 0.0)
            self._changed.notify_all()

    # -- in the thread -----------------------------------------------------------------------------------------------

    @property
    def _has_work(self) -> bool:
        return bool(self._queue or self._touches)

    def _run(self) -> None:
        give_way_to_others()  # steps of decoding want all cores
        while (work := self._next_work()) is not None:
            queued, touches = work
            error = self._write(queued, touches)
            if error is None and queued and self._on_written is not None:
                self._on_written([page.record.key for page in queued])
            with self._changed:
                self._keys.difference_update(page.record.key for page in queued)
                if error is None:
                    self._backoff.worked()
                    self.pages_written += len(queued)
                else:
                    self._backoff.failed(error)
                    self.pages_dropped += len(queued) + len(self._queue)
                    self._keys.difference_update(page.record.key for page in self._queue)
                    self._queue.clear()
                    self._touches.clear()
                self._is_busy = False
                self._changed.notify_all()
        self._at_end()

    def _next_work(self) -> tuple[list[_Queued], list[Touch]] | None:
        """What to write next, when it is time; None once it was closed and nothing is left."""
        with self._changed:
            while True:
                if not self._has_work:
                    if self._is_closing:
                        return None
                    self._changed.wait()
                elif self._queue and (delay := self._pace.delay_s(self._clock())):
                    self._changed.wait(delay)
                else:
                    break
            self._is_busy = True
            num_pages = min(len(self._queue), max(1, WRITE_BYTES // self._store.payload_bytes))
            queued = [self._queue.popleft() for _ in range(num_pages)]
            self._pace.took(num_pages * self._store.payload_bytes, self._clock())
            touches: list[Touch] = []
            if not queued:
                touches = [(parent, tokens, facts) for (parent, tokens), facts in self._touches.items()]
                self._touches.clear()
            return queued, touches

    def _write(self, queued: Sequence[_Queued], touches: Sequence[Touch]) -> Exception | None:
        try:
            if queued:
                self._store.write([_new_page(page) for page in queued])
            if touches:
                self._store.touch(touches)
        except Exception as error:  # whatever the store's medium raises: requests go on without it
            return error
        return None


def _new_page(queued: _Queued) -> NewPage:
    _, parent_key, tokens, facts = queued.record
    return NewPage(parent_key, tokens, queued.payload.tobytes(), facts)
