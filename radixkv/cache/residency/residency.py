"""What a page needs besides its number before a hit may end there: the protocol, and the case of nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.events import EventChannel, PageRun
from radixkv.cache.tree.node import TreeNode

Pages: TypeAlias = NDArray[np.int32]

RefCounts: TypeAlias = Callable[[Pages], NDArray[np.int32]]
"""ref_counts(pages): how many references each of `pages` has, in the tree and in leases."""


class SidePages(NamedTuple):
    """How many pages a residency lends besides those of the cache."""

    total: int
    free: int
    evictable: int
    num_taken_back: int  # from cached pages, since the cache was made


class Claim(Protocol):
    """One lease's share of a residency. Its verbs take `pages`, those of the lease as they are at the time."""

    def seen_pages(self, pages: Pages) -> Pages:
        """Those of `pages` that this claim pins. O(result)."""
        ...

    def coverable_tokens(self, capacity_tokens: int) -> int:
        """Up to which token `cover` could go now, for a lease with pages for `capacity_tokens`. O(1)."""
        ...

    def cover(self, pages: Pages, first: int, last: int) -> None:
        """Get ready to compute the tokens `[first, last)`. O(pages that come or go).

        Raises: OutOfPagesError, InvalidRequestError, as `Lease.cover`.
        """
        ...

    def uncover(self, pages: Pages, kept: int) -> None:
        """Undo `cover` for all but the first `kept` of `pages`, which the lease is about to give back. Cannot fail."""
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
        """A number that grows whenever `usable_pages`, `usable_tokens` or `holds` may have changed."""
        ...

    def attach(self, num_pages: int, page_size: int, ref_counts: RefCounts) -> None:
        """Serve a cache of that many pages. Raises: ConfigError if this was made for another size."""
        ...

    def usable_pages(self, pages: Pages) -> int:
        """How many of the leading whole `pages` of a prefix may be hit: the most after which a request can go on."""
        ...

    def usable_tokens(self, path: Sequence[TreeNode], num_tokens: int) -> int:
        """How many of the `num_tokens` tokens that the tree holds along `path` may be hit, a last page in part too."""
        ...

    def holds(self, page: int) -> bool:
        """Whether `page` can be copied."""
        ...

    def has_room(self, cached_tokens: int, next_tokens: int, spare_pages: int) -> bool:
        """Whether a request could compute `next_tokens` tokens after a hit of `cached_tokens`, and leave `spare_pages`
        for others."""
        ...

    def claim(self, pages: Pages, cached_tokens: int, held_tokens: int, source: int | None) -> Claim:
        """Pin what the next token of a new lease sees.

        Args:
            pages: those of the lease.
            cached_tokens: how many leading tokens it found.
            held_tokens: how many the tree holds, usable or not.
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
        """What it lends now. O(1)."""
        ...

    def check_invariants(self, pins: NDArray[np.integer], in_tree: NDArray[np.bool_]) -> None:
        """Prove its own invariants. O(num_pages).

        Args:
            pins: [num_pages], how many claims see each page.
            in_tree: [num_pages]

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

    def uncover(self, pages: Pages, kept: int) -> None:
        """Nothing to do."""

    def release(self, pages: Pages) -> None:
        """Nothing to do."""


class Everywhere:
    """The residency of a cache whose pages hold all that is needed, in every layer: nothing to do anywhere."""

    @property
    def num_changes(self) -> int:
        """Nothing ever changes."""
        return 0

    def attach(self, num_pages: int, page_size: int, ref_counts: RefCounts) -> None:
        """Any cache will do."""

    def usable_pages(self, pages: Pages) -> int:
        """All of them."""
        return len(pages)

    def usable_tokens(self, path: Sequence[TreeNode], num_tokens: int) -> int:
        """All of them."""
        return num_tokens

    def holds(self, page: int) -> bool:
        """Always."""
        return True

    def has_room(self, cached_tokens: int, next_tokens: int, spare_pages: int) -> bool:
        """Always: the cache's own pages are counted elsewhere."""
        return True

    def claim(self, pages: Pages, cached_tokens: int, held_tokens: int, source: int | None) -> NoClaim:
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
        return SidePages(0, 0, 0, 0)

    def check_invariants(self, pins: NDArray[np.integer], in_tree: NDArray[np.bool_]) -> None:
        """Nothing to prove."""


_NO_CLAIM = NoClaim()
