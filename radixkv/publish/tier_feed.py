"""Takes the changes of a store below the pool in the threads of that store, for another thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

LIST_S = 0.02  # a store that is busy for so long is asked again later


class TierPage(Protocol):
    """A page that a store holds: what never changes of it, so that any thread may read it."""

    @property
    def parent_key(self) -> bytes:
        """The key of the page before it; `root` where a sequence starts."""
        ...

    @property
    def tokens(self) -> bytes:
        """Little-endian int32, 1 to `page_size` of them."""
        ...

    @property
    def key(self) -> bytes | None:
        """Of a whole page, its own key."""
        ...

    @property
    def root(self) -> bytes:
        """The root key of its namespace."""
        ...


class TierObserver(Protocol):
    """Who is told of each change; see `TierFeed`."""

    def stored(self, page: TierPage) -> None:
        """A page can be found from now on."""
        ...

    def removed(self, page: TierPage) -> None:
        """A page cannot be found any more; those that follow it stay."""
        ...

    def cleared(self) -> None:
        """Nothing can be found any more."""
        ...


class TierWatch(Protocol):
    """How to follow a store."""

    def start(self, observer: TierObserver) -> None:
        """Tell `observer` of every change from now on, one at a time, in any thread."""
        ...

    def stop(self) -> None:
        """Tell nobody any more. Waits for nothing."""
        ...

    def pages(self, begin: Callable[[], object], timeout_s: float) -> Sequence[TierPage] | None:
        """All pages, and call `begin` at that very moment; None if the store was busy for `timeout_s`."""
        ...


class TierChange(NamedTuple):
    """A page came or went; without one, all went."""

    page: TierPage | None
    is_stored: bool


class TierFeed:
    """The changes of one store, in order; it never waits. If too many come, all pages are listed in their place.

    `stored`, `removed` and `cleared` are called by the store under its own lock, so one at a time: an append each. All
    else belongs to the reader's thread.

    Attributes:
        is_stale: whether changes are missing, so that `list_anew` is to be called; from the start.
        is_sleeping: set by the reader before it sleeps; whoever puts something in then calls `wake`.
    """

    def __init__(self, watch: TierWatch, max_changes: int, wake: Callable[[], object]) -> None:
        """`wake` must not fail and not wait."""
        self.max_changes = max_changes
        self.is_stale = True
        self.is_sleeping = False
        self._watch, self._wake = watch, wake
        self._changes: deque[TierChange] = deque()
        watch.start(self)

    def stored(self, page: TierPage) -> None:
        """A page can be found from now on."""
        self._put(TierChange(page, True))

    def removed(self, page: TierPage) -> None:
        """A page cannot be found any more."""
        self._put(TierChange(page, False))

    def cleared(self) -> None:
        """Nothing can be found any more."""
        self._put(TierChange(None, False))

    def _put(self, change: TierChange) -> None:
        if self.is_stale:
            return
        if len(self._changes) < self.max_changes:
            self._changes.append(change)
        else:
            self.is_stale = True
        if self.is_sleeping:
            self.is_sleeping = False
            self._wake()

    def __len__(self) -> int:
        return len(self._changes)

    def take(self, max_changes: int) -> list[TierChange]:
        """Up to so many changes, the oldest first. O(changes)."""
        changes = self._changes
        return [changes.popleft() for _ in range(min(max_changes, len(changes)))]

    def list_anew(self) -> Sequence[TierPage] | None:
        """All pages, in place of the changes so far; None if the store is busy. O(pages)."""
        return self._watch.pages(self._begin_anew, LIST_S)

    def _begin_anew(self) -> None:
        self._changes.clear()
        self.is_stale = False

    def close(self) -> None:
        """Follow the store no more; what has come can still be taken. Waits for nothing. Idempotent."""
        self._watch.stop()
