"""Takes the events of a cache in the thread that owns it, for another thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeAlias

from radixkv.cache.events import Event, PageRun


class Everything(NamedTuple):
    """All that is cached now, parents first; `dropped` events were lost since the one before it in the queue."""

    runs: list[PageRun]
    dropped: int


Item: TypeAlias = Event | Everything


class EventQueue:
    """An observer of a cache that never waits: what does not fit is dropped and counted.

    After a drop nothing more is taken until the reader has emptied the queue; the next event then brings everything
    that is cached, instead of what was lost. `__call__` runs in the thread of the cache: one append, and O(nodes) once
    after each drop. All else runs in the reader's thread.

    Attributes:
        num_dropped: events that were lost since the last `Everything`.
        is_sleeping: set by the reader before it sleeps; whoever puts something in then calls `wake`.
        is_closed: set by a reader that ends: nothing more is taken.
    """

    def __init__(
        self, cached_runs: Callable[[], Iterable[PageRun]], max_events: int, wake: Callable[[], object]
    ) -> None:
        """`wake` must not fail and not wait."""
        self.max_events = max_events
        self.num_dropped = 0
        self.is_sleeping = self.is_closed = False
        self._cached_runs, self._wake = cached_runs, wake
        self._items: deque[Item] = deque()

    def __call__(self, event: Event) -> None:
        """Take an event of the pool."""
        if event.medium != "pool" or self.is_closed:
            return
        if self.num_dropped or len(self._items) >= self.max_events:
            self.num_dropped += 1
            if not self._items:
                self.put_everything()
        else:
            self._items.append(event)
        if self.is_sleeping:
            self.is_sleeping = False
            self._wake()

    def put_everything(self) -> None:
        """Put in all that is cached now; in the thread of the cache. O(nodes)."""
        self._items.append(Everything(list(self._cached_runs()), self.num_dropped))
        self.num_dropped = 0

    def take(self, max_items: int) -> list[Item]:
        """Up to so many items, the oldest first. O(items)."""
        items = self._items
        return [items.popleft() for _ in range(min(max_items, len(items)))]

    def __len__(self) -> int:
        return len(self._items)
