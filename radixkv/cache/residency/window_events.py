"""Tells the observers of a tree which of its pages have window pages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.events import Cleared, Event, EventChannel, PageRun, RemovalCause, Removed, Stored

if TYPE_CHECKING:
    from radixkv.cache.residency.window_pages import WindowPages


class WindowEvents:
    """Sends `Stored` and `Removed` of the medium "window" into the channel of a tree.

    Without them an observer would believe in a hit that is gone: when a window page is taken back, its page stays
    cached in the pool. Follows the tree's own events to know which tokens are in which page. Memory: some 300 bytes
    a page.
    """

    def __init__(self, channel: EventChannel, windows: WindowPages, cached: Iterable[PageRun]) -> None:
        """`cached`: what the tree holds already, of which nothing is sent."""
        self._windows = windows
        self._channel = channel
        self._runs: dict[int, dict[bytes, PageRun]] = {}  # by page and key: a page moves from a tail into a whole page
        self._told: dict[bytes, PageRun] = {}  # what is in window pages, as far as observers know
        for run in cached:
            self._told.update({page.page_keys[0]: page for page in self._follow(run) if self._has(page)})
        channel.add(self)
        windows.on_change = self.changed

    def __call__(self, event: Event) -> None:
        """Follow what the tree stores and removes."""
        if event.medium != "pool":
            return
        if isinstance(event, Cleared):
            self._runs.clear()
            self._told.clear()
            self._channel.send(Cleared("window"))
            return
        if isinstance(event, Stored):
            for page in self._follow(event.run):
                self._compare(page)
            return
        for number, page_key in zip(event.run.pages.tolist(), event.run.page_keys, strict=True):
            runs = self._runs[number]
            del runs[page_key]
            if not runs:
                del self._runs[number]
            self._remove(page_key, event.cause, event.last_use_tick)

    def changed(self, pages: NDArray[np.int32]) -> None:
        """Window pages were lent to `pages`, or taken from them."""
        for number in pages.tolist():
            for page in list(self._runs.get(number, {}).values()):
                self._compare(page)

    def _follow(self, run: PageRun) -> list[PageRun]:
        pages = run.each_page()
        for page in pages:
            self._runs.setdefault(int(page.pages[0]), {})[page.page_keys[0]] = page
        return pages

    def _has(self, page: PageRun) -> bool:
        return bool(self._windows.has(page.pages)[0])

    def _compare(self, page: PageRun) -> None:
        """Tell what has become of `page` since it was last told of."""
        (page_key,) = page.page_keys
        if self._has(page) and page_key not in self._told:
            self._told[page_key] = page
            self._channel.send(Stored(page, "window"))
        elif not self._has(page):
            self._remove(page_key, "taken back", 0)

    def _remove(self, page_key: bytes, cause: RemovalCause, last_use_tick: int) -> None:
        page = self._told.pop(page_key, None)
        if page is not None:
            self._channel.send(Removed(page, "window", cause, last_use_tick))
