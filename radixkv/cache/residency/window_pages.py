"""Which pages hold KV in the layers that see only a window of the tokens before them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.events import EventChannel, PageRun
from radixkv.cache.residency.residency import (
    NO_SIDE_PAGES,
    HeldTokens,
    KeptState,
    Pages,
    RefCounts,
    Shortfall,
    SidePages,
)
from radixkv.cache.residency.window_claim import WindowClaim
from radixkv.cache.residency.window_events import WindowEvents
from radixkv.errors import ConfigError, InvariantError, OutOfPagesError


def first_seen_page(position: int, window_tokens: int, page_size: int) -> int:
    """Index of the first page of a sequence that the token at `position` sees in layers of that window."""
    return max(0, position - window_tokens + 1) // page_size


class WindowPages:
    """Lends *window pages*, the pages of the layers that see a window, to the pages that some query still sees there.

    A page of the cache stands for its tokens in all layers. In layers of full attention its KV has a place of its own
    for as long as the page is in use. Layers that see only the last `window_tokens` tokens, and perhaps the first
    `sink_tokens`, soon look at it no more; so there KV lies in window pages, of which there are fewer, and
    `window_page_of` tells which one a page has now. `scratch` stands for none: a window page that nobody writes, so
    that index arrays may hold it.

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
            raise ConfigError(
                f"window_tokens must be at least 1 and sink_tokens at least 0; got {window_tokens} and {sink_tokens}"
            )
        if num_window_pages < least:
            raise ConfigError(
                f"{num_window_pages} window pages of {page_size} tokens are too few: one request needs {least} for "
                f"its window of {window_tokens} tokens{f' and {sink_tokens} sinks' if sink_tokens else ''}"
            )
        self.num_pages, self.page_size, self.window_tokens = num_pages, page_size, window_tokens
        self.num_window_pages = self.scratch = num_window_pages
        self.sink_pages = -(-sink_tokens // page_size)
        self.window_page_of: Pages = np.full(num_pages + 1, self.scratch, np.int32)  # and one for a page nobody has
        self._ref_counts: RefCounts = lambda pages: np.ones(len(pages), np.int32)  # until a cache is attached
        self.num_evictable = 0
        self.num_changes = 0  # times that a page got or lost a window page
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
        return first_seen_page(position, self.window_tokens, self.page_size)

    def has(self, pages: Pages) -> NDArray[np.bool_]:
        """Which of `pages` have a window page."""
        held: NDArray[np.bool_] = self.window_page_of[pages] != self.scratch
        return held

    def attach(self, num_pages: int, page_size: int, ref_counts: RefCounts) -> None:
        """Serve a cache of that many pages. Raises: ConfigError if this was made for another size."""
        if (self.num_pages, self.page_size) != (num_pages, page_size):
            raise ConfigError(
                f"windows are for {self.num_pages} pages of {self.page_size} tokens, and the cache has {num_pages} of "
                f"{page_size}"
            )
        self._ref_counts = ref_counts

    def holds(self, page: int) -> bool:
        """Whether `page` has a window page, so that it can be copied in all layers."""
        return bool(self.window_page_of[page] != self.scratch)

    @property
    def shortfall(self) -> Shortfall:
        """Layers that see a window have lost KV."""
        return "window"

    @property
    def sight_tokens(self) -> int:
        """Those of the window."""
        return self.window_tokens

    @property
    def can_go_back(self) -> bool:
        """Always, as far as the window reaches: KV is overwritten where it lies."""
        return True

    def usable_tokens(self, held: HeldTokens) -> int:
        """How many of the tokens that the tree holds may be hit. O(pages)."""
        whole, rest = divmod(len(held.tokens), self.page_size)
        pages = held.pages
        valid = self.usable_pages(pages[:whole])
        return len(held.tokens) if valid == whole and (not rest or self.holds(pages[whole])) else valid * self.page_size

    def usable_pages(self, pages: Pages) -> int:
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

    def unpin_passed(self, pages: Pages) -> None:
        """Undo one `pin` of each of `pages`, where nothing ended or branched. O(pages)."""
        self._unpin(pages, self._passed)

    def unpin_ended(self, pages: Pages) -> None:
        """Undo one `pin` of each of `pages`, where a prompt ended or branched. O(pages)."""
        self._unpin(pages, self._ended)

    def _unpin(self, pages: Pages, queue: deque[tuple[int, int]]) -> None:
        pins = self._pins[pages] - 1
        assert pins.size == 0 or pins.min() >= 0, "a page was unpinned that is not pinned"
        self._pins[pages] = pins
        idle = pages[pins == 0]
        self.num_evictable += len(idle)
        self._stamps[idle] += 1
        queue.extend(zip(idle.tolist(), self._stamps[idle].tolist(), strict=True))
        if len(queue) > 64 + 4 * self.num_window_pages:  # of entries that count there is one a window page at most
            live = [entry for entry in queue if self._is_current(*entry)]
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
        self.window_page_of[pages] = self._free[first:][::-1]
        del self._free[first:]
        self._pins[pages] = 1
        self._changed(pages)

    def drop(self, pages: Pages) -> None:
        """Take back the window pages of `pages`, which are free now, or seen no more by those who have them alone."""
        holders = pages[self.has(pages)]
        assert not self._pins[holders].any(), "a pinned page was dropped"
        self.num_evictable -= len(holders)
        self._free += self.window_page_of[holders].tolist()
        self.window_page_of[holders] = self.scratch
        self._changed(holders)

    def drop_unshared(self, pages: Pages) -> None:
        """Take back the window pages of those of `pages` that one lease alone has, which sees them no more. O(pages)"""
        self.drop(pages[self._ref_counts(pages) == 1])  # in the tree they would count twice

    def claim(self, pages: Pages, found: HeldTokens, held_tokens: int, source: int | None) -> WindowClaim:
        """Pin what the token after the hit sees; the last of its pages is about to be copied from `source`, if any.

        O(pages pinned). Raises: OutOfPagesError if there is no window page to copy to; nothing is pinned then.
        """
        whole = len(found.tokens) // self.page_size
        claim = WindowClaim(
            self,
            covered=whole + (source is not None),
            seen_from=self.first_seen(whole * self.page_size),
            branch_from=self.first_seen(held_tokens),
            branch_to=held_tokens // self.page_size,
        )
        seen = claim.seen_pages(pages[:whole])
        self.pin(seen)
        if source is not None:
            self._take_beside(pages[whole : whole + 1], np.array([source], np.int32), seen)
        return claim

    def _take_beside(self, target: Pages, source: Pages, seen: Pages) -> None:
        """Lend a window page to `target`, though not that of `source`; undo the pins of `seen` if there is none."""
        self.pin(source)
        try:
            self.take(target)
        except OutOfPagesError:
            self.unpin_ended(seen)
            raise
        finally:
            self.unpin_ended(source)

    def hand_over(self, own: Pages, theirs: Pages) -> None:
        """A request reads `theirs` from now on, which hold the same tokens as its `own` pages, and its pins go along.

        Those of `theirs` that have no window page any more get that of the request's own page. O(pages).
        """
        pinned = self._pins[own] > 0
        own, theirs = own[pinned], theirs[pinned]
        have = self.has(theirs)
        self.pin(theirs[have])
        self.unpin_passed(own[have])
        own, theirs = own[~have], theirs[~have]
        self.window_page_of[theirs], self._pins[theirs] = self.window_page_of[own], self._pins[own]
        self.window_page_of[own], self._pins[own] = self.scratch, 0
        self._changed(theirs)

    def has_room(self, cached_tokens: int, next_tokens: int, spare_pages: int) -> bool:
        """Whether a window page could be had for each page of the next tokens, or of a window of them, and to spare."""
        next_tokens = min(next_tokens, self.window_tokens)
        end = -(-(cached_tokens + next_tokens) // self.page_size)
        return self.sink_pages + end - self.first_seen(cached_tokens) + spare_pages <= self.num_available

    def report_to(self, channel: EventChannel, cached: Callable[[], Iterable[PageRun]]) -> None:
        """Send events of the medium "window" to `channel` from now on. Idempotent."""
        if self.on_change is None:
            WindowEvents(channel, self, cached())

    def side_pages(self) -> SidePages:
        """Window pages in all, free, evictable, and taken back so far. O(1)."""
        return SidePages(self.num_window_pages, self.num_free, self.num_evictable, self.num_taken_back)

    def states(self) -> SidePages:
        """None."""
        return NO_SIDE_PAGES

    def kept_states(self, held: HeldTokens, first_token: int) -> list[KeptState]:
        """None."""
        return []

    def kept_beside(self, held: HeldTokens, first_token: int) -> list[KeptState]:
        """The window pages of the pages that hold tokens after the first `first_token`. O(pages)."""
        num_tokens, pages = len(held.tokens), held.pages
        first = first_token // self.page_size
        numbers = first + np.flatnonzero(self.has(pages[first : -(-num_tokens // self.page_size)]))
        ends = np.minimum((numbers + 1) * self.page_size, num_tokens)
        return list(map(KeptState, ends.tolist(), self.window_page_of[pages[numbers]].tolist()))

    def _take_back(self, num: int) -> None:
        for queue in (self._passed, self._ended):
            while num > 0 and queue:
                page, stamp = queue.popleft()
                if self._is_current(page, stamp):
                    self.drop(np.array([page], np.int32))
                    self.num_taken_back += 1
                    num -= 1
        assert num <= 0, "an evictable page was not queued"

    def _changed(self, pages: Pages) -> None:
        self.num_changes += len(pages)
        if self.on_change is not None:
            self.on_change(pages)

    def _is_current(self, page: int, stamp: int) -> bool:
        return bool(self._stamps[page] == stamp and self._pins[page] == 0 and self.window_page_of[page] != self.scratch)

    def check_invariants(self, pins: NDArray[np.integer], in_tree: NDArray[np.bool_], claims: Sequence[object]) -> None:
        """Prove the invariants of the class docstring, and that pages which only leases hold are pinned if they have a
        window page. O(num_pages).

        Args:
            pins: [num_pages], how many leases see each page.
            in_tree: [num_pages]
            claims: those that were not released.

        Raises: InvariantError.
        """
        held = self.window_page_of[:-1] != self.scratch
        if self.window_page_of[-1] != self.scratch:
            raise InvariantError("the page that nobody has has a window page")
        used = sorted([*self._free, *self.window_page_of[:-1][held].tolist()])
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
        queued = {page for page, stamp in (*self._passed, *self._ended) if self._is_current(page, stamp)}
        if queued != set(np.flatnonzero(idle).tolist()) or self.num_evictable != len(queued):
            raise InvariantError(
                f"{self.num_evictable} evictable window pages are counted and {sorted(queued)} are queued, of "
                f"{np.flatnonzero(idle).tolist()}"
            )
