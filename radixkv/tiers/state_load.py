"""Whether a prefix is loaded from a tier where recurrent layers keep a state: pages as far as a state stands."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from radixkv.tiers.page_store import FoundPage, is_state_part
from radixkv.tiers.prefix_load import LoadChooser
from radixkv.tiers.state_parts import StateParts
from radixkv.tiers.tier import Tier


class StateLoadChooser(LoadChooser):
    """As `LoadChooser`. What it finds ends with the parts of a state, and pages after that are of no use.

    Pages alone bring nothing: nothing counts as loaded until the last part of the state has come.
    """

    def __init__(self, parts: StateParts, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(parts.page_size, clock)
        self._parts = parts

    def useful(self, tier: Tier, pages: list[FoundPage], first_page: int) -> list[FoundPage]:
        """`pages` up to the deepest state that the tier has after some of their tokens, and the parts of that state."""
        return self._parts.deepest(tier, pages)

    def ends(self, pages: Sequence[FoundPage], num_cached: int) -> list[int]:
        """As ever, for pages with the state after them."""
        ends = super().ends([page for page in pages if not is_state_part(page.tokens)], num_cached)
        return [num_cached] * (len(pages) - 1) + ends[-1:] if ends else []

    def _but_last(self, pages: Sequence[FoundPage], num_pages: int) -> Sequence[FoundPage]:
        """All of them: without the state the others are of no use."""
        return pages
