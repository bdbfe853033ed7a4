"""States of recurrent layers in a store of pages: parts of a page's size, each of which is a page of the store.

A state is valid after exactly the tokens that it was taken at: those of some whole pages, and less than a page
besides. Its parts form a chain that follows the last of these whole pages, and is found by tokens that no request can
have:

    first part     -1, the tokens after the last whole page, then -1 until `page_size` tokens are there
    others         -1, `page_size` times

What a page has in layers that see a window (`window_load`) lies there as if it were the state after its last token.

So a store needs to know nothing of states. What holds for pages holds for their parts: each has its checksum, its facts
and its place in the order in which pages give way, a part before the one that it follows, and all of them before the
page that they follow. A state of which a part is missing is not found.
"""

from __future__ import annotations

from collections.abc import Sequence

from radixkv.cache.page_keys import page_key
from radixkv.cache.token_ids import TOKEN_BYTES
from radixkv.tiers.page_store import STATE_MARK, FoundPage, is_state_part
from radixkv.tiers.tier import Tier

ASKED_PAGES = 64  # after which a tier on another machine is asked for states, the last ones of those it has


class StateParts:
    """How states of `num_parts` parts lie in stores of pages of `page_size` tokens."""

    def __init__(self, page_size: int, num_parts: int) -> None:
        self.page_size, self.num_parts = page_size, num_parts

    def tokens(self, rest: bytes) -> bytes:
        """The tokens of all parts of the state after `rest`, fewer tokens than a page, from the last whole page on."""
        assert len(rest) < self.page_size * TOKEN_BYTES, "a state follows the last whole page"
        padding = self.num_parts * self.page_size - 1 - len(rest) // TOKEN_BYTES
        return STATE_MARK + rest + STATE_MARK * padding

    def deepest(self, tier: Tier, pages: Sequence[FoundPage]) -> list[FoundPage]:
        """As many of `pages`, which follow each other, as the deepest state needs that a tier has after some of their
        tokens; and the parts of that state. Nothing if there is none.

        O(pages after it), in each of which a state after other tokens costs one more look.
        """
        first = 0 if tier.finds_at_once else max(0, len(pages) - ASKED_PAGES)
        for number in range(len(pages), first, -1):
            page = pages[number - 1]
            if page.num_tokens == self.page_size and (parts := self.find(tier, _key(page), b"")):
                return [*pages[:number], *parts]
            count = min(page.num_tokens, self.page_size - 1)
            while count:
                wanted = page.tokens[: count * TOKEN_BYTES]
                if parts := self.find(tier, page.parent_key, wanted):
                    return [*pages[: number - 1], page._replace(num_tokens=count), *parts]
                count = min(count - 1, self._shared_tokens(tier, page.parent_key, wanted))
        return []

    def find(self, tier: Tier, parent_key: bytes, rest: bytes) -> list[FoundPage]:
        """All parts of the state after `rest`; nothing if one is missing."""
        found = tier.find(parent_key, self.tokens(rest))
        is_whole = len(found) == self.num_parts and found[-1].num_tokens == self.page_size
        return found if is_whole else []

    def _shared_tokens(self, tier: Tier, parent_key: bytes, rest: bytes) -> int:
        """The most tokens of `rest` that a state shares: none after fewer tokens shares more than these."""
        found = tier.find(parent_key, self.tokens(rest)[: self.page_size * TOKEN_BYTES])
        return found[0].num_tokens - 1 if found else 0


def part_keys(pages: Sequence[FoundPage]) -> list[bytes]:
    """The keys of those of `pages` that are parts of states."""
    return [_key(page) for page in pages if is_state_part(page.tokens)]


def _key(page: FoundPage) -> bytes:
    return page_key(page.parent_key, page.tokens)
