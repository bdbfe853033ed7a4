"""Which page of a store gives way first: a line for each namespace with a share of its own, and one for all others."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from sortedcontainers import SortedList

from radixkv.errors import ConfigError

if TYPE_CHECKING:
    from radixkv.tiers.page_index import Rank, StoredPage

Names: TypeAlias = "tuple[str | None, str | None]"
"""extra_key, cache_salt"""


class ShareUse(NamedTuple):
    """How many bytes of a store a namespace with a share is guaranteed, and holds; None stands for all others."""

    namespace: Names | None
    guaranteed_bytes: int
    used_bytes: int


class PageUse(NamedTuple):
    """How many pages of a store a namespace with a share is guaranteed, and holds; None stands for all others."""

    namespace: Names | None
    guaranteed_pages: int
    num_pages: int


class Line:
    """Pages that can give way, in order: those that are not kept by rank, then those that are free soonest.

    Attributes:
        guaranteed_pages: that pages of others cannot push out.
        num_pages: all of its pages, also those that cannot give way because others follow them.
    """

    def __init__(self, guaranteed_pages: int) -> None:
        self.guaranteed_pages = guaranteed_pages
        self.num_pages = 0
        self._unkept: SortedList[tuple[Rank, bytes]] = SortedList()
        self._kept: SortedList[tuple[float, Rank, bytes]] = SortedList()  # soonest free first

    def __len__(self) -> int:
        return len(self._unkept) + len(self._kept)

    def places(self) -> set[bytes]:
        """The places of the pages in it."""
        return {place for _, place in self._unkept} | {place for _, _, place in self._kept}

    def fill(self, pages: Collection[StoredPage]) -> None:
        """Take in pages, a few times as fast as `add`."""
        self._unkept.update((page.rank, page.place) for page in pages if page.facts.kept_until_s is None)
        self._kept.update(
            (page.facts.kept_until_s, page.rank, page.place) for page in pages if page.facts.kept_until_s is not None
        )

    def add(self, page: StoredPage) -> None:
        """Take in a page. O(log pages)."""
        if page.facts.kept_until_s is None:
            self._unkept.add((page.rank, page.place))
        else:
            self._kept.add((page.facts.kept_until_s, page.rank, page.place))

    def remove(self, page: StoredPage) -> None:
        """Take out a page. O(log pages)."""
        kept_until_s = page.facts.kept_until_s
        waiting = None if kept_until_s is None else (kept_until_s, page.rank, page.place)
        if waiting is not None and waiting in self._kept:
            self._kept.remove(waiting)
        else:
            self._unkept.remove((page.rank, page.place))

    def first(self, now_s: float) -> tuple[bool, float, Rank, bytes] | None:
        """Whether it is kept, until when, rank and place of the page that goes first; None without pages.

        O(log pages), and that for each page whose time is over.
        """
        while self._kept and self._kept[0][0] <= now_s:
            _, rank, place = self._kept.pop(0)
            self._unkept.add((rank, place))
        if self._unkept:
            return (False, 0.0, *self._unkept[0])
        return (True, *self._kept[0]) if self._kept else None


class PageLines:
    """The lines of a store. Without shares there is one.

    A salt that has no share of its own counts to its `extra_key`, as in the pool.
    """

    def __init__(self, guaranteed_pages: Mapping[Names, int] | None = None) -> None:
        self._others = Line(0)
        self._lines = {names: Line(num_pages) for names, num_pages in (guaranteed_pages or {}).items()}

    def of(self, names: Names) -> Line:
        """The line of a namespace. O(1)."""
        if not self._lines:
            return self._others
        line = self._lines.get(names)
        if line is None and names[1] is not None:
            line = self._lines.get((names[0], None))
        return self._others if line is None else line

    def all(self) -> list[Line]:
        """All lines."""
        return [*self._lines.values(), self._others]

    def uses(self) -> tuple[PageUse, ...]:
        """What each namespace with a share holds, and last all others together; empty without shares."""
        if not self._lines:
            return ()
        shares = [PageUse(names, line.guaranteed_pages, line.num_pages) for names, line in self._lines.items()]
        return (*shares, PageUse(None, 0, self._others.num_pages))

    def first_to_go(self, now_s: float, planned: Mapping[Line, int], newcomer: Line | None = None) -> bytes | None:
        """The place of the page that gives way first; None if there is none. O(shares + log pages).

        Those of namespaces that hold more than their share, with the pages `planned` for them, go first. If there is
        none, one of the newcomer's own goes; any, without a newcomer.
        """
        if not self._lines:
            first = self._others.first(now_s)
            return None if first is None else first[-1]
        lines = self.all()
        beyond = [line for line in lines if line.num_pages + planned.get(line, 0) > line.guaranteed_pages]
        for candidates in (beyond, lines if newcomer is None else [newcomer]):
            firsts = [first for line in candidates if (first := line.first(now_s)) is not None]
            if firsts:
                return min(firsts)[-1]
        return None


def guaranteed_pages(guaranteed_bytes: Mapping[Names, int], page_bytes: int, capacity_bytes: int) -> dict[Names, int]:
    """How many whole pages these shares are. Raises: ConfigError if they are more than the store's capacity."""
    asked_bytes = sum(guaranteed_bytes.values())
    if asked_bytes > capacity_bytes:
        raise ConfigError(
            f"quotas must not guarantee more than the store's {capacity_bytes} bytes; {len(guaranteed_bytes)} of them "
            f"guarantee {asked_bytes}"
        )
    return {names: num_bytes // page_bytes for names, num_bytes in guaranteed_bytes.items()}


def share_uses(uses: Sequence[PageUse], page_bytes: int) -> tuple[ShareUse, ...]:
    """The same in bytes."""
    return tuple(ShareUse(use.namespace, use.guaranteed_pages * page_bytes, use.num_pages * page_bytes) for use in uses)
