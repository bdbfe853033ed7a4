"""What one lease sees in the layers of a window."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from radixkv.errors import InvalidRequestError

if TYPE_CHECKING:
    from radixkv.cache.residency.residency import HeldTokens, Pages
    from radixkv.cache.residency.window_pages import WindowPages


class _Ahead(NamedTuple):
    """Pages `[first, last)` of a lease that have a window page for what is being loaded, up to `num_tokens` tokens."""

    num_tokens: int
    first: int
    last: int


class WindowClaim:
    """Which pages of a lease have a window page for its sake. Half-open ranges of the lease's pages:

        [0, sinks)     [sinks, seen_from)     [seen_from, covered)     [covered, len(pages))
        pinned         given up               pinned                   no window page yet

    What is given up in `[branch_from, branch_to)` lies where others turned off, or this lease does: there a prompt may
    be continued, so its window pages are taken back later than those of pages that were only passed.

    While tokens are loaded, pages ahead of `covered` are pinned, too: those that the token after the load sees. What is
    behind stays, since a load may fail; the next `cover` tells from where on the request goes on, and one of both goes.
    """

    def __init__(self, windows: WindowPages, *, covered: int, seen_from: int, branch_from: int, branch_to: int) -> None:
        self._windows = windows
        self._covered, self._seen_from = covered, seen_from
        self._branch_from, self._branch_to = branch_from, branch_to
        self._ahead: _Ahead | None = None

    def seen_pages(self, pages: Pages) -> Pages:
        """The pages that the next token sees, as far as `cover` went."""
        sinks = min(self._windows.sink_pages, self._covered)
        parts = [pages[:sinks], pages[max(self._seen_from, sinks) : self._covered]]
        if self._ahead is not None:
            parts.append(pages[self._ahead.first : self._ahead.last])
        return np.concatenate(parts)

    def coverable_tokens(self, capacity_tokens: int) -> int:
        """Up to which token `cover` could go now, if nothing is given up before. O(1)."""
        return min(capacity_tokens, (self._covered + self._windows.num_available) * self._windows.page_size)

    def cover(self, pages: Pages, first: int, last: int) -> None:
        """Give up what no token from `first` on sees, and lend window pages to those of `[first, last)`.

        Raises: OutOfPagesError if they do not suffice (what was given up stays so); InvalidRequestError if the tokens
            see what was given up or tokens that were never covered, or the lease has no pages for them.
        """
        windows = self._windows
        self._settle(pages, first)
        capacity_tokens = len(pages) * windows.page_size
        if windows.first_seen(first) < self._seen_from or last > capacity_tokens:
            least = self._seen_from * windows.page_size + windows.window_tokens - 1
            raise InvalidRequestError(
                f"tokens {first} to {last} cannot be computed: the lease has pages for {capacity_tokens} tokens, "
                f"and gave up what tokens before {least} see"
            )
        if first > self._covered * windows.page_size:
            raise InvalidRequestError(
                f"tokens {first} to {last} cannot be computed: those from {self._covered * windows.page_size} on come "
                f"first"
            )
        self._give_up_until(pages, windows.first_seen(first))
        end = -(-last // windows.page_size)
        if end > self._covered:
            windows.take(pages[self._covered : end])
            self._covered = end

    def prepare_load(self, pages: Pages, first: int, last: int) -> None:
        """Lend window pages to those pages that the token after `last` sees, and no others of `[first, last)`."""
        windows = self._windows
        assert not windows.sink_pages, "sinks are not loaded"
        self._settle(pages, first)
        end = -(-last // windows.page_size)
        start = min(end, max(self._covered, windows.first_seen(last)))
        windows.take(pages[start:end])
        self._ahead = _Ahead(last, start, end)

    def uncover(self, pages: Pages, kept: int) -> None:
        """See the pages from `kept` on no more. O(pages given up)."""
        self._give_ahead_back(pages)
        first = max(kept, self._seen_from)
        if first < self._covered:
            self._windows.unpin_passed(pages[first : self._covered])
            self._covered = first

    def checkpoint_at(self, num_tokens: int) -> None:
        """Nothing to do: a hit may end wherever the window is."""

    def advance(self, num_tokens: int) -> None:
        """Nothing to do."""

    def share(self, held: HeldTokens, first_page: int) -> None:
        """Nothing to do."""

    def state_slots(self) -> tuple[int, ...]:
        """There are none."""
        return ()

    def release(self, pages: Pages) -> None:
        """Unpin all; what a request ended on is taken back later than what it passed. O(pages seen)."""
        self._windows.unpin_ended(self.seen_pages(pages))

    def _settle(self, pages: Pages, first: int) -> None:
        """Tokens from `first` on are to be computed: see what was loaded before them, or give it back."""
        ahead = self._ahead
        if ahead is None or first < ahead.num_tokens:
            self._give_ahead_back(pages)
            return
        self._ahead = None
        if ahead.first > self._covered:  # nothing is seen between
            self._give_up_until(pages, self._covered)
            self._seen_from = ahead.first
        self._covered = max(self._covered, ahead.last)

    def _give_ahead_back(self, pages: Pages) -> None:
        """Nothing more is loaded."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            unused = pages[ahead.first : ahead.last]
            self._windows.unpin_passed(unused)
            self._windows.drop_unshared(unused)

    def _give_up_until(self, pages: Pages, page: int) -> None:
        """See the pages before `page` no more, sinks apart."""
        windows = self._windows
        first, last = max(self._seen_from, windows.sink_pages), min(page, self._covered)
        self._seen_from = max(self._seen_from, page)
        if first >= last:
            return
        branch_from, branch_to = np.clip([self._branch_from, self._branch_to], first, last)
        windows.unpin_ended(pages[branch_from:branch_to])
        windows.unpin_passed(np.concatenate([pages[first:branch_from], pages[branch_to:last]]))
        windows.drop_unshared(pages[first:last])
