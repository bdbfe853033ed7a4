"""Reads pages of a store in the background, chunk by chunk, for requests that wait for them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

from radixkv.tiers.arrivals import Arrivals
from radixkv.tiers.backoff import Backoff
from radixkv.tiers.page_store import FoundPage, PageStore
from radixkv.tiers.worker import Worker

READ_BYTES = 4 << 20  # in one call of the store, or one page if that is more
ANSWER_S = 0.05  # that a lookup may take until others are not made
MAX_BUFFERED_BYTES = 32 << 20  # read and not taken yet, over all loads of a store


class Load:
    """Pages on their way from a store, in order. It ends with the first page that the store does not have any more.

    Attributes:
        pages: what was asked for.
        started_at, last_arrival_at: by the reader's clock.
        read_s: seconds that the store took.
    """

    def __init__(self, pages: Sequence[FoundPage], now: float) -> None:
        self.pages = pages
        self.started_at = self.last_arrival_at = now
        self.read_s = 0.0
        self.num_arrived = 0
        self.missed: str | None = None  # why not all pages came
        self.is_given_up = False
        self._arrived: deque[bytes] = deque()

    @property
    def is_over(self) -> bool:
        """Whether nothing more comes."""
        return self.is_given_up or self.missed is not None or self.num_arrived == len(self.pages)

    @property
    def is_whole(self) -> bool:
        """Whether all pages came."""
        return self.num_arrived == len(self.pages)

    @property
    def num_waiting(self) -> int:
        """Pages that arrived and were not taken."""
        return len(self._arrived)


class Lookup:
    """A question to a store that does not answer at once: which pages it has of a prompt.

    Attributes:
        pages: the answer, once it `is_over`.
        started_at: by the reader's clock.
    """

    def __init__(self, find: Callable[[], list[FoundPage]], now: float) -> None:
        self.find = find
        self.started_at = now
        self.pages: list[FoundPage] = []
        self.is_over = self.is_given_up = False


class PageReader(Worker):
    """A thread that reads the pages of loads, a chunk of each in turn.

    What was read and not taken is bounded in bytes, so the thread never runs far ahead of the engine. A store that
    hangs holds up this thread alone: who waits gives the load up, and while the thread is stuck in it nothing more
    should be asked for.
    """

    def __init__(
        self,
        store: PageStore,
        arrivals: Arrivals,
        *,
        max_buffered_bytes: int = MAX_BUFFERED_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(f"{store.name}-reader")  # `_changed` guards what follows, and the loads
        self._store, self._arrivals, self._clock = store, arrivals, clock
        self._chunk = max(1, min(READ_BYTES, max_buffered_bytes // 2) // store.payload_bytes)
        self._max_buffered = max(self._chunk, max_buffered_bytes // store.payload_bytes)  # in pages
        self._loads: deque[Load | Lookup] = deque()
        self._reading: Load | Lookup | None = None
        self._num_buffered = 0
        self._is_closing = False
        self._backoff = Backoff(f"reading from the {store.name} tier", clock)
        self._thread.start()

    @property
    def backoff(self) -> Backoff:
        """How it fails."""
        return self._backoff

    @property
    def is_available(self) -> bool:
        """Whether loads may be asked for: not while the store hangs in one that was given up, or rests. O(1)."""
        with self._changed:
            stuck = self._reading is not None and self._reading.is_given_up
            return not (self._is_closing or stuck or self._backoff.rests)

    @property
    def keeps_waiting(self) -> bool:
        """Whether the store has not answered a lookup for so long that it is better not asked for more now. O(1)."""
        with self._changed:
            lookup = self._reading if isinstance(self._reading, Lookup) else None
            return lookup is not None and self._clock() - lookup.started_at > ANSWER_S

    def start(self, pages: Sequence[FoundPage]) -> Load:
        """Begin to load `pages`."""
        load = Load(pages, self._clock())
        with self._changed:
            if self._is_closing:
                load.missed = "closed"
            else:
                self._loads.append(load)
                self._changed.notify_all()
        return load

    def look_up(self, find: Callable[[], list[FoundPage]]) -> Lookup:
        """Call `find`, which raises nothing, in the reader's thread."""
        lookup = Lookup(find, self._clock())
        with self._changed:
            if self._is_closing:
                lookup.is_over = True
            else:
                self._loads.append(lookup)
                self._changed.notify_all()
        return lookup

    def take(self, load: Load) -> list[bytes]:
        """The payloads that arrived since the last call, in order."""
        with self._changed:
            payloads = list(load._arrived)
            load._arrived.clear()
            self._num_buffered -= len(payloads)
            self._changed.notify_all()
        return payloads

    def give_up(self, load: Load | Lookup) -> None:
        """Nobody waits for `load` any more. Idempotent."""
        with self._changed:
            load.is_given_up = True
            if isinstance(load, Load):
                self._num_buffered -= len(load._arrived)
                load._arrived.clear()
            if load in self._loads:
                self._loads.remove(load)
            self._changed.notify_all()

    def stop(self) -> None:
        """Give up all loads; the thread ends soon. Waits for nothing."""
        with self._changed:
            self._is_closing = True
            for load in (*self._loads, self._reading):
                if load is not None:
                    load.is_given_up = True
            self._loads.clear()
            self._changed.notify_all()

    # -- in the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (load := self._next_load()) is not None:
            if isinstance(load, Lookup):
                load.pages = load.find()
                with self._changed:
                    load.is_over, self._reading = True, None
                self._arrivals.notify()
                continue
            wanted = load.pages[load.num_arrived : load.num_arrived + self._chunk]
            started_at = self._clock()
            payloads: list[bytes | None] = []
            error: Exception | None = None
            try:
                payloads = self._store.read(wanted)
            except Exception as failure:  # whatever the store's medium raises: requests go on without it
                error = failure
            with self._changed:
                load.read_s += self._clock() - started_at
                self._accept(load, len(wanted), payloads, error)
                self._reading = None
                if not load.is_over:
                    self._loads.append(load)
                self._changed.notify_all()
            self._arrivals.notify()

    def _next_load(self) -> Load | Lookup | None:
        with self._changed:
            while not self._is_closing:
                if self._loads and self._num_buffered + self._chunk <= self._max_buffered:
                    self._reading = self._loads.popleft()
                    return self._reading
                self._changed.wait()
            return None

    def _accept(self, load: Load, num_wanted: int, payloads: list[bytes | None], error: Exception | None) -> None:
        if error is not None:
            self._backoff.failed(error)
            load.missed = "error"
            return
        if len(payloads) != num_wanted:
            self._backoff.failed(f"{num_wanted} pages were asked for, and {len(payloads)} came")
            load.missed = "error"
            return
        self._backoff.worked()
        good: list[bytes] = []
        for payload in payloads:
            if payload is None:
                load.missed = "gone or damaged"
                break
            if len(payload) != self._store.payload_bytes:
                load.missed = "of another size"
                break
            good.append(payload)
        if load.is_given_up:
            return
        load.num_arrived += len(good)
        load.last_arrival_at = self._clock()
        load._arrived.extend(good)
        self._num_buffered += len(good)
