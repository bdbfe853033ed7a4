"""What a page needs besides its number before a hit may end there: the protocol, and the case of nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.events import EventChannel, PageRun
from radixkv.cache.namespace import Namespace
from radixkv.cache.tree.page_ids import PageBytes

Pages: TypeAlias = NDArray[np.int32]
Shortfall: TypeAlias = Literal["window", "state"]

RefCounts: TypeAlias = Callable[[Pages], NDArray[np.int32]]
"""ref_counts(pages): how many references each of `pages` has, in the tree and in leases."""


class HeldTokens(NamedTuple):
    """Leading tokens of a prompt that the tree holds.

    Attributes:
        namespace: where they are.
        tokens: int32, which they are.
        page_runs: the pages with their KV in order, the last one perhaps in part; more may follow.
    """

    namespace: Namespace
    tokens: NDArray[np.int32]
    page_runs: Sequence[PageBytes]

    @property
    def pages(self) -> Pages:
        """`page_runs` as one array, read-only. O(pages)."""
        return np.frombuffer(b"".join(self.page_runs), np.int32)


class SidePages(NamedTuple):
    """How many things of one kind a residency lends besides the pages of the cache."""

    total: int
    free: int
    evictable: int
    num_taken_back: int  # from cached pages, since the cache was made


NO_SIDE_PAGES = SidePages(0, 0, 0, 0)


class KeptState(NamedTuple):
    """The state of recurrent layers after the first `num_tokens` tokens of a sequence, and the slot that holds it."""

    num_tokens: int
    slot: int


class Claim(Protocol):
    """One lease's share of a residency. Its verbs take `pages`, those of the lease as they are at the time."""

    def seen_pages(self, pages: Pages) -> Pages:
        """Those of `pages` that this claim pins. O(result)."""
        ...

    def coverable_tokens(self, capacity_tokens: int) -> int:
        """Up to which token `cover` could, or should, go now, for a lease with pages for `capacity_tokens`. O(1)."""
        ...

    def checkpoint_at(self, num_tokens: int) -> None:
        """Expect hits to end after so many tokens."""
        ...

    def cover(self, pages: Pages, first: int, last: int) -> None:
        """Get ready to compute the tokens `[first, last)`. O(pages that come or go).

        Raises: OutOfPagesError, InvalidRequestError, as `Lease.cover`.
        """
        ...

    def prepare_load(self, pages: Pages, first: int, last: int) -> None:
        """Get ready for the tokens `[first, last)` to be loaded rather than computed. O(pages that come or go).

        The request may go on after `last` if they come, which the next `cover` tells, or after `first` as before.

        Raises: OutOfPagesError; nothing has changed then.
        """
        ...

    def uncover(self, pages: Pages, kept: int) -> None:
        """Undo `cover` for all but the first `kept` of `pages`, which the lease is about to give back. Cannot fail."""
        ...

    def advance(self, num_tokens: int) -> None:
        """The first `num_tokens` tokens, to which `cover` went, are computed now. Cannot fail."""
        ...

    def share(self, held: HeldTokens, first_page: int) -> None:
        """The tree holds `held` from now on, the pages from `first_page` on for the lease's sake. O(pages of these)."""
        ...

    def state_slots(self) -> tuple[int, ...]:
        """Slots of recurrent states for the next step: the one to read and the one to write; () without such states."""
        ...

    def release(self, pages: Pages) -> None:
        """Unpin everything. Cannot fail."""
        ...


class Residency(Protocol):
    """What else must be there for a page of the cache to be of use: window pages, say.

    `PrefixCache` asks it where a hit may end, and tells it which pages are read, copied and freed; each lease holds one
    `Claim`. A cache whose pages need nothing more has `Everywhere`.
    """

    @property
    def num_changes(self) -> int:
        """A number that grows whenever `usable_tokens` or `holds` may have changed."""
        ...

    @property
    def shortfall(self) -> Shortfall:
        """What is missing where the tree holds more of a prompt than `usable_tokens`."""
        ...

    @property
    def sight_tokens(self) -> int:
        """How many tokens before the end of a hit have to have something besides their page."""
        ...

    @property
    def can_go_back(self) -> bool:
        """Whether a request may drop the last tokens that it computed, and compute others in their place."""
        ...

    def attach(self, num_pages: int, page_size: int, ref_counts: RefCounts) -> None:
        """Serve a cache of that many pages. Raises: ConfigError if this was made for another size."""
        ...

    def usable_tokens(self, held: HeldTokens) -> int:
        """How many of the tokens that the tree holds may be hit: the most after which a request can go on."""
        ...

    def holds(self, page: int) -> bool:
        """Whether `page` can be copied."""
        ...

    def has_room(self, cached_tokens: int, next_tokens: int, spare_pages: int) -> bool:
        """Whether a request could compute `next_tokens` tokens after a hit of `cached_tokens`, and leave `spare_pages`
        for others."""
        ...

    def claim(self, pages: Pages, found: HeldTokens, held_tokens: int, source: int | None) -> Claim:
        """Pin what the next token of a new lease sees.

        Args:
            pages: those of the lease.
            found: the leading tokens that it found, all of which are usable.
            held_tokens: how many the tree holds in whole pages, and of the next one, usable or not.
            source: the page that the last of the found tokens will be copied from; None if all are in whole pages.

        Raises: OutOfPagesError if there is no room to copy to; nothing is pinned then.
        """
        ...

    def hand_over(self, own: Pages, theirs: Pages) -> None:
        """A lease reads `theirs`, which hold the same tokens, in place of its `own` pages from now on. O(pages)."""
        ...

    def drop(self, pages: Pages) -> None:
        """`pages` are free now. O(pages)."""
        ...

    def report_to(self, channel: EventChannel, cached: Callable[[], Iterable[PageRun]]) -> None:
        """Send events of what comes and goes from now on; `cached` gives what the tree holds already. Idempotent."""
        ...

    def side_pages(self) -> SidePages:
        """The window pages that it lends now. O(1)."""
        ...

    def states(self) -> SidePages:
        """The slots of recurrent states that it lends now. O(1)."""
        ...

    def kept_states(self, held: HeldTokens, first_token: int) -> list[KeptState]:
        """The states that are kept after more than `first_token` of the tokens that the tree holds, in order.

        O(pages), O(page_size) for each page where some are near. Slots are good until the residency is used again.
        """
        ...

    def kept_beside(self, held: HeldTokens, first_token: int) -> list[KeptState]:
        """What a hit after more than `first_token` of the tokens that the tree holds needs besides pages, in order.

        States; or window pages, each as a state after the last of its tokens. O(pages), as `kept_states`.
        """
        ...

    def check_invariants(self, pins: NDArray[np.integer], in_tree: NDArray[np.bool_], claims: Sequence[Claim]) -> None:
        """Prove its own invariants. O(num_pages).

        Args:
            pins: [num_pages], how many claims see each page.
            in_tree: [num_pages]
            claims: those that were not released.

        Raises: InvariantError.
        """
        ...


class NoClaim:
    """The claim of a lease whose pages need nothing besides."""

    def seen_pages(self, pages: Pages) -> Pages:
        """None of them."""
        return pages[:0]

    def coverable_tokens(self, capacity_tokens: int) -> int:
        """All that the lease has pages for."""
        return capacity_tokens

    def cover(self, pages: Pages, first: int, last: int) -> None:
        """Nothing to do."""

    def prepare_load(self, pages: Pages, first: int, last: int) -> None:
        """Nothing to do."""

    def uncover(self, pages: Pages, kept: int) -> None:
        """Nothing to do."""

    def checkpoint_at(self, num_tokens: int) -> None:
        """Nothing to do: hits may end anywhere."""

    def advance(self, num_tokens: int) -> None:
        """Nothing to do."""

    def share(self, held: HeldTokens, first_page: int) -> None:
        """Nothing to do."""

    def state_slots(self) -> tuple[int, ...]:
        """There are none."""
        return ()

    def release(self, pages: Pages) -> None:
        """Nothing to do."""


class Everywhere:
    """The residency of a cache whose pages hold all that is needed, in every layer: nothing to do anywhere."""

    @property
    def num_changes(self) -> int:
        """Nothing ever changes."""
        return 0

    @property
    def shortfall(self) -> Shortfall:
        """Nothing is ever missing."""
        return "window"

    @property
    def sight_tokens(self) -> int:
        """None of them."""
        return 0

    @property
    def can_go_back(self) -> bool:
        """Always: KV is overwritten where it lies."""
        return True

    def attach(self, num_pages: int, page_size: int, ref_counts: RefCounts) -> None:
        """Any cache will do."""

    def usable_tokens(self, held: HeldTokens) -> int:
        """All of them."""
        return len(held.tokens)

    def holds(self, page: int) -> bool:
        """Always."""
        return True

    def has_room(self, cached_tokens: int, next_tokens: int, spare_pages: int) -> bool:
        """Always: the cache's own pages are counted elsewhere."""
        return True

    def claim(self, pages: Pages, found: HeldTokens, held_tokens: int, source: int | None) -> NoClaim:
        """The same for every lease."""
        return _NO_CLAIM

    def hand_over(self, own: Pages, theirs: Pages) -> None:
        """Nothing to do."""

    def drop(self, pages: Pages) -> None:
        """Nothing to do."""

    def report_to(self, channel: EventChannel, cached: Callable[[], Iterable[PageRun]]) -> None:
        """Nothing to tell."""

    def side_pages(self) -> SidePages:
        """None."""
        return NO_SIDE_PAGES

    def states(self) -> SidePages:
        """None."""
        return NO_SIDE_PAGES

    def kept_states(self, held: HeldTokens, first_token: int) -> list[KeptState]:
        """None."""
        return []

    def kept_beside(self, held: HeldTokens, first_token: int) -> list[KeptState]:
        """Nothing."""
        return []

    def check_invariants(self, pins: NDArray[np.integer], in_tree: NDArray[np.bool_], claims: Sequence[Claim]) -> None:
        """Nothing to prove."""


_NO_CLAIM = NoClaim()
