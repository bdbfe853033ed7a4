"""Lets others follow which pages a store holds."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

from radixkv.errors import ConfigError
from radixkv.tiers.page_index import PageIndex, PageObserver, StoredPage
from radixkv.tiers.page_store import is_state_part


class PageWatch:
    """How to follow the pages of one store: each change as it happens, and all that is there at some moment.

    Nothing here makes the store wait for an observer, and nobody who follows a store has to wait for it.
    """

    def __init__(self, index: PageIndex, lock: Lock) -> None:
        """`lock` is held by the store whenever it changes `index`."""
        self._index, self._lock = index, lock

    def start(self, observer: PageObserver) -> None:
        """Tell `observer` of every change from now on. Raises: ConfigError if the store has an observer already."""
        if self._index.observer is not None:
            raise ConfigError("a store can be followed by one publisher at a time, and one follows it already")
        self._index.observer = observer

    def stop(self) -> None:
        """Tell nobody any more. Takes no lock, so that it can be called anywhere."""
        self._index.observer = None

    def pages(self, begin: Callable[[], object], timeout_s: float) -> list[StoredPage] | None:
        """All pages, and call `begin` at that very moment: changes that are told after it come after these pages.

        O(pages), for which the store waits. Returns: None if the store was busy for `timeout_s`.
        """
        if not self._lock.acquire(timeout=timeout_s):
            return None
        try:
            begin()
            return [page for page in self._index if not is_state_part(page.tokens)]
        finally:
            self._lock.release()
