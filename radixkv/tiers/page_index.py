"""The index of a store of pages, in memory: finds chains of pages, and tells which page gives way first.

Pages lie ordered by `parent key ‖ tokens`. So the pages after one parent are neighbours, and of two byte strings in
order, none between them shares less with either than they share with each other: the page that shares the most
tokens with what is asked for lies directly before or after it.

A page that others follow never gives way before them. A page whose parent is not there can come in, because caches
evict from the end of a sequence; it is found as soon as its parent comes, too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Protocol

import numpy as np
from sortedcontainers import SortedDict

from radixkv.cache.page_keys import page_key, root_key
from radixkv.cache.token_ids import TOKEN_BYTES
from radixkv.config.checks import checked_choice
from radixkv.errors import InvariantError
from radixkv.tiers.page_lines import Line, Names, PageLines, PageUse
from radixkv.tiers.page_store import FoundPage, PageFacts, is_state_part

logger = logging.getLogger(__name__)

STORE_POLICIES = ("lru", "lfu", "priority")
"""Orders in which pages give way. Kept pages go last and low priorities first in each; "priority" adds nothing to
"lru", and is here for caches of that policy."""

Rank = tuple[int, int, float]


class StoredPage:
    """A page of a store: its key, its facts, and where its payload lies."""

    __slots__ = ("checksum", "facts", "key", "parent_key", "place", "rank", "root", "slot", "tokens")

    def __init__(
        self,
        parent_key: bytes,
        tokens: bytes,
        facts: PageFacts,
        *,
        slot: int = 0,
        checksum: bytes = b"",
        root: bytes | None = None,
    ) -> None:
        self.parent_key = parent_key
        self.tokens = tokens
        self.facts = facts
        self.slot = slot
        self.checksum = checksum
        self.root = root_key(*facts.namespace) if root is None else root
        self.place = parent_key + tokens
        self.key: bytes | None = None  # of a whole page in an index: what pages after it have as their parent
        self.rank: Rank = (0, 0, 0.0)


class PageObserver(Protocol):
    """Is told of each change of an index, in the thread that makes it, under the lock of its store; not of states.

    It must neither wait nor change the index. One that raises is logged and told nothing more: it missed something.
    """

    def stored(self, page: StoredPage) -> None:
        """`page` can be found from now on."""
        ...

    def removed(self, page: StoredPage) -> None:
        """`page` cannot be found any more; those that follow it stay."""
        ...

    def cleared(self) -> None:
        """Nothing can be found any more."""
        ...


class PageIndex:
    """The pages of a store by key, and the order in which they give way. Not thread-safe.

    Invariants, which `check_invariants` proves:

    - `_after` counts the pages that follow each key, and what holds it (`hold`); keys with none are not in it.
    - a page is in its namespace's line if no page follows it, and in none otherwise; each line counts its pages.

    Attributes:
        observer: is told of each change; None if nobody listens, which costs a comparison.
    """

    def __init__(self, page_size: int, policy: str = "lru") -> None:
        """An empty index. Raises: ConfigError for an unknown policy."""
        self.page_size = page_size
        self.policy = checked_choice("policy", policy, STORE_POLICIES)
        self._page_bytes = page_size * TOKEN_BYTES
        self._pages: SortedDict[bytes, StoredPage] = SortedDict()  # by place
        self._whole: dict[bytes, StoredPage] = {}  # whole pages by their own key
        self._after: dict[bytes, int] = {}
        self._lines = PageLines()
        self.observer: PageObserver | None = None

    def __len__(self) -> int:
        return len(self._pages)

    def __iter__(self) -> Iterator[StoredPage]:
        """All pages, those of one parent together."""
        return iter(self._pages.values())

    def get(self, parent_key: bytes, tokens: bytes) -> StoredPage | None:
        """The page of exactly these tokens. O(1)."""
        page: StoredPage | None = self._pages.get(parent_key + tokens)
        return page

    def find(self, parent_key: bytes, tokens: bytes) -> list[FoundPage]:
        """As `PageStore.find`. O(pages found + log of all pages)."""
        found: list[FoundPage] = []
        for start in range(0, len(tokens), self._page_bytes):
            wanted = tokens[start : start + self._page_bytes]
            page = self._pages.get(parent_key + wanted)
            if page is None or page.key is None:
                closest = self._closest(parent_key, wanted)
                return found if closest is None else [*found, closest]
            found.append(FoundPage(parent_key, page.tokens, self.page_size))
            parent_key = page.key
        return found

    def _closest(self, parent_key: bytes, wanted: bytes) -> FoundPage | None:
        """The page after `parent_key` that shares the most first tokens with `wanted`; None if none shares any."""
        position = self._pages.bisect_left(parent_key + wanted)
        best = None
        for neighbour in (position - 1, position):
            if 0 <= neighbour < len(self._pages):
                page = self._pages.peekitem(neighbour)[1]
                shared = shared_tokens(page.tokens, wanted) if page.parent_key == parent_key else 0
                if shared > (best.num_tokens if best else 0):
                    best = FoundPage(parent_key, page.tokens, shared)
        return best

    def fill(self, pages: dict[bytes, StoredPage]) -> None:
        """Take in pages, given by place, while there are none. O(pages × log pages), a few times as fast as `add`."""
        assert not self._pages, "an index is filled once"
        assert self.observer is None, "who listens is told of single pages alone"
        for page in pages.values():
            if len(page.tokens) == self._page_bytes:
                page.key = page_key(page.parent_key, page.tokens)
                self._whole[page.key] = page
            self._after[page.parent_key] = self._after.get(page.parent_key, 0) + 1
        self._pages.update(pages)
        last = [page for page in pages.values() if page.key not in self._after]
        for page in last:
            page.rank = self._rank(page.facts)
        self._fill_lines()

    def set_shares(self, guaranteed_pages: Mapping[Names, int]) -> None:
        """Guarantee so many pages to namespaces, in place of what was guaranteed before. O(pages × log pages)."""
        self._lines = PageLines(guaranteed_pages)
        self._fill_lines()

    def _fill_lines(self) -> None:
        """Put all pages into lines that are empty."""
        pages: dict[Line, list[StoredPage]] = {}
        for page in self:
            line = self.line_of(page.facts)
            line.num_pages += 1
            if page.key not in self._after:
                pages.setdefault(line, []).append(page)
        for line, members in pages.items():
            line.fill(members)

    def line_of(self, facts: PageFacts) -> Line:
        """The line of pages with these facts. O(1)."""
        return self._lines.of(facts.namespace)

    def uses(self) -> tuple[PageUse, ...]:
        """What each namespace with a share holds, and last all others together; empty without shares. O(shares)."""
        return self._lines.uses()

    def add(self, page: StoredPage) -> None:
        """Take in a page that is not there. O(log pages)."""
        self._pages[page.place] = page
        self.line_of(page.facts).num_pages += 1
        if len(page.tokens) == self._page_bytes:
            page.key = page_key(page.parent_key, page.tokens)
            self._whole[page.key] = page
        self.hold(page.parent_key)
        if page.key not in self._after:
            self._queue(page)
        observer = self.observer
        if observer is not None and not is_state_part(page.tokens):
            self._tell(lambda: observer.stored(page))

    def discard(self, page: StoredPage) -> None:
        """Take out a page that is there; pages that follow it stay. O(log pages)."""
        del self._pages[page.place]
        self.line_of(page.facts).num_pages -= 1
        if page.key is not None:
            del self._whole[page.key]
        if page.key not in self._after:
            self._unqueue(page)
        self.let_go(page.parent_key)
        observer = self.observer
        if observer is not None and not is_state_part(page.tokens):
            self._tell(lambda: observer.removed(page))

    def is_lost(self) -> None:
        """Tell that nothing can be found any more, as the store is closed and keeps nothing."""
        observer = self.observer
        if observer is not None:
            self._tell(observer.cleared)

    def _tell(self, tell: Callable[[], object]) -> None:
        try:
            tell()
        except Exception:
            self.observer = None
            logger.exception("the observer of a store failed, and is told nothing more")

    def update(self, page: StoredPage, facts: PageFacts) -> None:
        """Give a page that is there other facts. O(log pages)."""
        is_queued = page.key not in self._after
        if is_queued:
            self._unqueue(page)
        self.line_of(page.facts).num_pages -= 1
        self.line_of(facts).num_pages += 1
        page.facts, page.root = facts, root_key(*facts.namespace)
        if is_queued:
            self._queue(page)

    def hold(self, key: bytes) -> None:
        """Keep the page of that key, if it is there or comes, from giving way until `let_go`."""
        count = self._after.get(key, 0)
        if count == 0 and key in self._whole:
            self._unqueue(self._whole[key])
        self._after[key] = count + 1

    def let_go(self, key: bytes) -> None:
        """Undo one `hold`."""
        self._after[key] -= 1
        if self._after[key] == 0:
            del self._after[key]
            if key in self._whole:
                self._queue(self._whole[key])

    def first_to_go(
        self, now_s: float, newcomer: PageFacts | None = None, planned: Mapping[Line, int] = MappingProxyType({})
    ) -> StoredPage | None:
        """The page that gives way first; None if there is none, or each is held. O(log pages + shares).

        Pages whose `kept_until_s` is not over go last, those that are free soonest first. With shares, those go before
        all others whose namespace holds more than its own; if there is none, of the newcomer's only.

        Args:
            newcomer: for which it gives way.
            planned: how many pages will come to each line besides.
        """
        place = self._lines.first_to_go(now_s, planned, None if newcomer is None else self.line_of(newcomer))
        return None if place is None else self._page(place)

    def gives_way_to(self, page: StoredPage, newcomer: PageFacts, now_s: float, num_planned: int = 1) -> bool:
        """Whether the store should give up `page` to hold a page of the facts `newcomer`.

        It should for one that its namespace's share has room for. Else it should not if `page` alone is kept, or has a
        higher priority. How recently each was used is no reason: clocks are set back at times.
        """
        line = self.line_of(newcomer)
        if line is not self.line_of(page.facts) and line.num_pages + num_planned <= line.guaranteed_pages:
            return True
        worth, offered = ((_is_kept(facts, now_s), facts.priority) for facts in (page.facts, newcomer))
        return offered >= worth

    def below(self, parent_key: bytes) -> list[StoredPage]:
        """All pages that follow `parent_key`, directly or not, parents first. O(their number × log of all pages)."""
        found: list[StoredPage] = []
        keys = [parent_key]
        while keys:
            key = keys.pop()
            for place in self._pages.irange(key, key + b"\xff" * (self._page_bytes + 1)):
                page = self._pages[place]
                if page.parent_key == key:
                    found.append(page)
                    if page.key is not None and page.key in self._after:
                        keys.append(page.key)
        return found

    def unused_since(self, time_s: float, now_s: float) -> list[StoredPage]:
        """Pages that were not used after `time_s` and are not kept, and that no other page follows. O(pages)."""
        needed: set[bytes] = set()
        for page in self:
            here: StoredPage | None = page
            if page.facts.used_s > time_s or _is_kept(page.facts, now_s):
                while here is not None and here.place not in needed:
                    needed.add(here.place)
                    here = self._whole.get(here.parent_key)
        return [page for page in self if page.place not in needed]

    def hottest(self, max_pages: int, now_s: float) -> list[StoredPage]:
        """As `PageStore.hottest`: last to go, first listed; each with what is missing of the pages before it.

        Pages that cannot be reached from their namespace's first page are left out. O(pages × log pages).
        """
        return self.chains(self.by_worth(list(self), now_s), max_pages)

    def by_worth(self, pages: list[StoredPage], now_s: float) -> list[StoredPage]:
        """`pages`, the last to go first. Reads nothing of the index, so it needs no lock. O(pages × log pages)."""
        return sorted(pages, key=lambda page: (_is_kept(page.facts, now_s), self._rank(page.facts)), reverse=True)

    def chains(self, by_worth: Iterable[StoredPage], max_pages: int) -> list[StoredPage]:
        """`hottest`, of pages in that order; those that are not there any more are left out. O(pages looked at)."""
        reached: dict[bytes, bool] = {}  # by place: whether it is listed, or else cannot be reached
        listed: list[StoredPage] = []
        for page in by_worth:
            chain = []
            before: StoredPage | None = self._pages.get(page.place)
            while before is not None and before.place not in reached:
                chain.append(before)
                before = self._whole.get(before.parent_key)
            if not chain:
                continue
            is_reached = _is_first(chain[-1]) if before is None else reached[before.place]
            reached.update((member.place, is_reached) for member in chain)
            if is_reached:
                listed += reversed(chain)
            if len(listed) >= max_pages:
                break
        return listed[:max_pages]

    def check_invariants(self) -> None:
        """Prove the invariants. O(pages × log pages). Raises: InvariantError."""
        after: dict[bytes, int] = {}
        for page in self:
            after[page.parent_key] = after.get(page.parent_key, 0) + 1
        lines = self._lines.all()
        queued = [place for line in lines for place in line.places()]
        expected = {page.place for page in self if page.key not in self._after}
        is_once = len(queued) == len(expected) == sum(map(len, lines))
        if after != self._after or set(queued) != expected or not is_once:
            raise InvariantError(f"the index of {len(self)} pages contradicts itself: {len(queued)} can give way")
        counted: dict[Line, int] = {}
        for page in self:
            line = self.line_of(page.facts)
            counted[line] = counted.get(line, 0) + 1
            if page.place in expected and page.place not in line.places():
                raise InvariantError(f"a page of {page.facts.namespace} is in another line")
        if any(line.num_pages != counted.get(line, 0) for line in lines):
            raise InvariantError(f"pages are counted wrongly: {self.uses()}")

    def _page(self, place: bytes) -> StoredPage:
        page: StoredPage = self._pages[place]
        return page

    def _rank(self, facts: PageFacts) -> Rank:
        return (facts.priority, facts.hits if self.policy == "lfu" else 0, facts.used_s)

    def _queue(self, page: StoredPage) -> None:
        page.rank = self._rank(page.facts)
        self.line_of(page.facts).add(page)

    def _unqueue(self, page: StoredPage) -> None:
        self.line_of(page.facts).remove(page)


def _is_kept(facts: PageFacts, now_s: float) -> bool:
    return facts.kept_until_s is not None and facts.kept_until_s > now_s


def _is_first(page: StoredPage) -> bool:
    """Whether it is the first page of a namespace whose names are known."""
    return page.parent_key == page.root == root_key(*page.facts.namespace)


def shared_tokens(left: bytes, right: bytes) -> int:
    """How many first tokens (little-endian int32) two byte strings share.

    >>> shared_tokens(bytes(8) + b"x", bytes(12))
    2
    """
    num_tokens = min(len(left), len(right)) // TOKEN_BYTES
    differs = np.frombuffer(left, np.int32, num_tokens) != np.frombuffer(right, np.int32, num_tokens)
    return int(differs.argmax()) if differs.any() else num_tokens
