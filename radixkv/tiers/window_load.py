"""Whether a prefix is loaded from a tier where some layers see a window: as far as the window pages reach.

What a page has in the layers that see a window lies in the store as if it were a state after the last of its tokens
(`state_parts`). A hit needs these parts of the pages that the next token sees, and of no others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from radixkv.cache.page_keys import page_key
from radixkv.cache.residency.window_pages import first_seen_page
from radixkv.cache.token_ids import TOKEN_BYTES
from radixkv.tiers.page_store import FoundPage
from radixkv.tiers.state_load import StateLoadChooser
from radixkv.tiers.state_parts import ASKED_PAGES, StateParts
from radixkv.tiers.tier import Tier


class WindowParts:
    """Where the parts of window pages lie, for layers that see `window_tokens` tokens."""

    def __init__(self, parts: StateParts, window_tokens: int) -> None:
        self._parts, self._page_size, self._window_tokens = parts, parts.page_size, window_tokens

    def deepest(self, tier: Tier, pages: Sequence[FoundPage], first_page: int) -> list[FoundPage]:
        """As many of `pages` as end where a tier has the parts of all pages that the next token sees; and those parts.

        Nothing if there is no such end. Each page is looked up once at most; of a tier on another machine those of the
        last window, and `ASKED_PAGES` before it.

        Args:
            first_page: the number of the first of `pages` in their sequence. What is seen before it is there.
        """
        least = 0
        if not tier.finds_at_once:
            least = len(pages) - ASKED_PAGES - -(-self._window_tokens // self._page_size)
        end = number = len(pages)
        found: list[list[FoundPage]] = []  # parts of the pages [number, end), the last one first
        while end:
            first = self._first_seen(pages[:end], first_page)
            while number > first:
                parts = self.find(tier, pages[number - 1]) if number > least else []
                if not parts:
                    break
                found.append(parts)
                number -= 1
            if number <= first:
                return [*pages[:end], *(part for parts in reversed(found) for part in parts)]
            end = number = number - 1
            found.clear()
        return []

    def find(self, tier: Tier, page: FoundPage) -> list[FoundPage]:
        """All parts of the window page of a stored page; nothing if one is missing."""
        if len(page.tokens) == self._page_size * TOKEN_BYTES:
            return self._parts.find(tier, page_key(page.parent_key, page.tokens), b"")
        return self._parts.find(tier, page.parent_key, page.tokens)

    def _first_seen(self, pages: Sequence[FoundPage], first_page: int) -> int:
        """Which of `pages` is the first that the token after them sees."""
        num_tokens = (first_page + len(pages) - 1) * self._page_size + pages[-1].num_tokens
        return max(0, first_seen_page(num_tokens, self._window_tokens, self._page_size) - first_page)


class WindowLoadChooser(StateLoadChooser):
    """As `StateLoadChooser`, with the window pages that the next token sees in place of a state."""

    def __init__(self, parts: StateParts, window_tokens: int, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(parts, clock)
        self._windows = WindowParts(parts, window_tokens)

    def useful(self, tier: Tier, pages: list[FoundPage], first_page: int) -> list[FoundPage]:
        """`pages` up to the last one after which all that is seen can be loaded, and the parts of its window."""
        return self._windows.deepest(tier, pages, first_page)
