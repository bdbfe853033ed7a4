"""Which pages hold KV in the layers that see only a window of the tokens before them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from radixkv.errors import ConfigError, InvariantError, OutOfPagesError

Pages = NDArray[np.int32]


class WindowPages:
    """Lends *window pages*, the pages of the layers that see a window, to the pages that some query still sees there.

    A page of the cache stands for its tokens in all layers. In layers of full attention its KV has a place of its own
    for as long as the page is in use. Layers that see only the last `window_tokens` tokens, and perhaps the first
    `sink_tokens`, soon look at it no more; so there KV lies in window pages, of which there are fewer, and `of_page`
    tells which one a page has now. `scratch` stands for none: a window page that nobody writes, so that index arrays
    may hold it.

    Requests *pin* the pages that they see. A page that nobody pins keeps its window page as long as there are enough,
    since a prompt that ends near it could be continued. Window pages are taken back in this order: first of pages that
    a request only passed on its way, which nobody has come back to; then of those where prompts ended or branched, the
    least recently used first. The page itself stays cached, and so does its KV in the other layers.

    Invariants, proved by `check_invariants`:

    - a window page is free, or one page has it;
    - a pinned page has a window page;
    - `num_evictable` counts the pages that have one and that nobody pins, and each of them is queued.
    """

    def __init__(
        self, num_pages: int, *, num_window_pages: int, page_size: int, window_tokens: int, sink_tokens: int = 0
    ) -> None:
        least = self.least(page_size, window_tokens, sink_tokens)
        if window_tokens < 1 or sink_tokens < 0:
            raise ConfigError(f"a window of {window_tokens} tokens after {sink_tokens} sinks is none")
        if num_window_pages < least:
            raise ConfigError(
                f"{num_window_pages} window pages of {page_size} tokens are too few: one request needs {least} for "
                f"its window of {window_tokens} tokens{f' and {sink_tokens} sinks' if sink_tokens else ''}"
            )
        self.page_size, self.window_tokens = page_size, window_tokens
        self.num_window_pages = self.scratch = num_window_pages
        self.sink_pages = -(-sink_tokens // page_size)
        self.of_page: Pages = np.full(num_pages + 1, self.scratch, np.int32)  # and one for a page nobody has
        self.num_evictable = 0
        self.num_taken_back = 0  # window pages of cached pages, since the cache was made
        self.on_change: Callable[[Pages], object] | None = None  # is told of pages that got or lost a window page
        self._free = list(range(num_window_pages - 1, -1, -1))
        self._pins = np.zeros(num_pages, np.int32)
        self._stamps = np.zeros(num_pages, np.int64)  # an entry of a queue counts if it has its page's last one
        self._passed: deque[tuple[int, int]] = deque()
        self._ended: deque[tuple[int, int]] = deque()

    @staticmethod
    def least(page_size: int, window_tokens: int, sink_tokens: int = 0) -> int:
        """Window pages with which a single request always gets on: what it sees, and the page that it writes."""
        return -(-sink_tokens // page_size) + -(-window_tokens // page_size) + 2

    @property
    def num_free(self) -> int:
        """Window pages that no page has."""
        return len(self._free)

    @property
    def num_available(self) -> int:
        """Window pages that are free or can be taken back."""
        return len(self._free) + self.num_evictable

    def first_seen(self, position: int) -> int:
        """Index of the first page of a sequence that the token at `position` sees, sinks apart.

        >>> windows = WindowPages(64, num_window_pages=8, page_size=4, window_tokens=8)
        >>> windows.first_seen(7), windows.first_seen(10), windows.first_seen(11)
        (0, 0, 1)
        """
        return max(0, position - self.window_tokens + 1) // self.page_size

    def has(self, pages: Pages) -> NDArray[np.bool_]:
        """Which of `pages` have a window page."""
        held: NDArray[np.bool_] = self.of_page[pages] != self.scratch
        return held

    def longest_valid(self, pages: Pages) -> int:
        """How many of the leading `pages` of a sequence may be hit: the most after which the next token has all the
        pages that it sees. O(pages).
        """
        has = self.has(pages)
        if has.all():
            return len(pages)
        if not has[: self.sink_pages].all():
            has = has[: int(has.argmin())]
            if has.all():
                return len(has)
        counts = np.arange(1, len(has) + 1)
        last_missing = np.maximum.accumulate(np.where(has, -1, counts - 1))  # among the first `counts` pages
        first_seen = np.maximum(0, counts * self.page_size - self.window_tokens + 1) // self.page_size
        valid = np.flatnonzero(last_missing < first_seen)
        return int(counts[valid[-1]]) if len(valid) else 0

    def pin(self, pages: Pages) -> None:
        """Keep the window pages of `pages`, which are distinct and have one each. O(pages)."""
        assert self.has(pages).all(), "a page without a window page was pinned"
        pins = self._pins[pages]
        self.num_evictable -= int((pins == 0).sum())
        self._pins[pages] = pins + 1

    def unpin(self, pages: Pages, *, passed: bool) -> None:
        """Undo one `pin` of each of `pages`; `passed` if nothing ended or branched there. O(pages)."""
        pins = self._pins[pages] - 1
        assert pins.size == 0 or pins.min() >= 0, "a page was unpinned that is not pinned"
        self._pins[pages] = pins
        idle = pages[pins == 0]
        self.num_evictable += len(idle)
        self._stamps[idle] += 1
        queue = self._passed if passed else self._ended
        queue.extend(zip(idle.tolist(), self._stamps[idle].tolist(), strict=True))
        if len(queue) > 64 + 4 * self.num_window_pages:  # of entries that count there is one a window page at most
            live = [entry for entry in queue if self._counts(*entry)]
            queue.clear()
            queue.extend(live)

    def take(self, pages: Pages) -> None:
        """Lend a window page to each of `pages`, which have none, and pin them. O(pages + window pages taken back).

        Raises: OutOfPagesError if they do not suffice; nothing is taken then.
        """
        if len(pages) > self.num_available:
            raise OutOfPagesError(
                needed=len(pages),
                free=self.num_free,
                evictable=self.num_evictable,
                total=self.num_window_pages,
                what="pages of the layers that see a window",
            )
        assert not self.has(pages).any(), "a page was to have two window pages"
        self._take_back(len(pages) - self.num_free)
        first = len(self._free) - len(pages)
        self.of_page[pages] = self._free[first:][::-1]
        del self._free[first:]
        self._pins[pages] = 1
        if self.on_change is not None:
            self.on_change(pages)

    def drop(self, pages: Pages) -> None:
        """Take back the window pages of `pages`, which are free now, or seen no more by those who have them alone."""
        holders = pages[self.has(pages)]
        assert not self._pins[holders].any(), "a pinned page was dropped"
        self.num_evictable -= len(holders)
        self._free += self.of_page[holders].tolist()
        self.of_page[holders] = self.scratch
        if self.on_change is not None:
            self.on_change(holders)

    def hand_over(self, own: Pages, theirs: Pages) -> None:
        """A request reads `theirs` from now on, which hold the same tokens as its `own` pages, and its pins go along.

        Those of `theirs` that have no window page any more get that of the request's own page. O(pages).
        """
        pinned = self._pins[own] > 0
        own, theirs = own[pinned], theirs[pinned]
        have = self.has(theirs)
        self.pin(theirs[have])
        self.unpin(own[have], passed=True)
        own, theirs = own[~have], theirs[~have]
        self.of_page[theirs], self._pins[theirs] = self.of_page[own], self._pins[own]
        self.of_page[own], self._pins[own] = self.scratch, 0
        if self.on_change is not None:
            self.on_change(theirs)

    def _take_back(self, num: int) -> None:
        for queue in (self._passed, self._ended):
            while num > 0 and queue:
                page, stamp = queue.popleft()
                if self._counts(page, stamp):
                    self.drop(np.array([page], np.int32))
                    self.num_taken_back += 1
                    num -= 1
        assert num <= 0, "an evictable page was not queued"

    def _counts(self, page: int, stamp: int) -> bool:
        return bool(self._stamps[page] == stamp and self._pins[page] == 0 and self.of_page[page] != self.scratch)

    def check_invariants(self, pins: NDArray[np.integer], in_tree: NDArray[np.bool_]) -> None:
        """Prove the invariants of the class docstring, and that pages which only leases hold are pinned if they have a
        window page. O(num_pages).

        Args:
            pins: [num_pages], how many leases see each page.
            in_tree: [num_pages]

        Raises: InvariantError.
        """
        held = self.of_page[:-1] != self.scratch
        if self.of_page[-1] != self.scratch:
            raise InvariantError("the page that nobody has has a window page")
        used = sorted([*self._free, *self.of_page[:-1][held].tolist()])
        if used != list(range(self.num_window_pages)):
            raise InvariantError(f"window pages are lost or lent twice: {used}")
        if not np.array_equal(self._pins, pins):
            wrong = np.flatnonzero(self._pins != pins)
            raise InvariantError(f"pages {wrong.tolist()} are pinned {self._pins[wrong]} times, not {pins[wrong]}")
        if (pins[~held] > 0).any():
            raise InvariantError(f"pages {np.flatnonzero(~held & (pins > 0)).tolist()} are pinned without window pages")
        idle = held & (pins == 0)
        if (idle & ~in_tree).any():
            raise InvariantError(f"pages {np.flatnonzero(idle & ~in_tree).tolist()} keep window pages for nobody")
        queued = {page for page, stamp in (*self._passed, *self._ended) if self._counts(page, stamp)}
        if queued != set(np.flatnonzero(idle).tolist()) or self.num_evictable != len(queued):
            raise InvariantError(
                f"{self.num_evictable} evictable window pages are counted and {sorted(queued)} are queued, of "
                f"{np.flatnonzero(idle).tolist()}"
            )
