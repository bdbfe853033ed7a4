"""What a cache and its tiers hold, followed by their events in another thread, so that nobody need ask them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from radixkv.cache.events import PageRun, Removed, Stored
from radixkv.cache.page_keys import root_key, tail_key
from radixkv.cache.token_ids import TOKEN_BYTES
from radixkv.publish import wire
from radixkv.publish.event_queue import Everything, Item
from radixkv.publish.tier_feed import TierChange, TierPage
from radixkv.publish.wire import Pages, WireEvent

PAGES_AN_EVENT = 256  # in snapshots, and of tiers
NAMES_AN_EVENT = 1024


class HeldPage(NamedTuple):
    """A page or tail that is held; see `Pages`."""

    parent: int | None
    namespace_key: bytes
    tokens: bytes


Held = dict[int, HeldPage]
"""Pages by their names on the wire."""


class HeldMirror:
    """The pages that each medium holds, by their names on the wire, and the events that tell of each change.

    The pool stores no page before its parent and removes none before its children. A tier may hold a page whose parent
    it does not hold: that one is in the pool, or was lost. About 300 bytes a page of the pool and 200 of a tier, whose
    tokens are the store's. A repeated event changes nothing.
    """

    def __init__(self, page_size: int, epoch: int, tiers: Iterable[str] = ()) -> None:
        """`tiers`: the media below the pool."""
        self.page_size, self.epoch = page_size, epoch
        self._held: dict[str, Held] = {medium: {} for medium in (wire.POOL, *tiers)}

    # -- the pool ----------------------------------------------------------------------------------------------------

    def apply(self, item: Item) -> list[WireEvent]:
        """Follow one event of the pool. Returns: what is to be sent. O(tokens), a digest for each page."""
        if isinstance(item, Everything):
            return [*self._clear(wire.POOL, item.dropped), *(event for run in item.runs for event in self._store(run))]
        if isinstance(item, Stored):
            return self._store(item.run)
        if isinstance(item, Removed):
            return self._remove(item.run)
        return self._clear(wire.POOL)

    def lose(self, dropped: int) -> list[WireEvent]:
        """Know nothing of the pool any more, as events were dropped. Returns: what is to be sent."""
        return self._clear(wire.POOL, dropped)

    def _store(self, run: PageRun) -> list[WireEvent]:
        names = [wire.name_of(key) for key in run.page_keys]
        parent = wire.name_of(run.parent_key) if run.start else None
        namespace_key, tokens = root_key(*run.namespace), run.tokens.tobytes()
        page_bytes = self.page_size * TOKEN_BYTES
        before, held = parent, self._held[wire.POOL]
        for number, name in enumerate(names):
            page = HeldPage(before, namespace_key, tokens[number * page_bytes : (number + 1) * page_bytes])
            held.setdefault(name, page)
            before = name
        pages = Pages(names, parent, namespace_key, tokens, run.is_tail)
        return [wire.stored(pages, self.page_size, self.epoch, wire.POOL)]

    def _remove(self, run: PageRun) -> list[WireEvent]:
        names = [wire.name_of(key) for key in run.page_keys]
        for name in names:
            self._held[wire.POOL].pop(name, None)
        return [wire.removed(names, self.epoch, wire.POOL, is_tail=run.is_tail)]

    def _clear(self, medium: str, dropped: int = 0) -> list[WireEvent]:
        """Forget a medium. `AllBlocksCleared` is for all media: where another one holds something, names are sent."""
        held, self._held[medium] = self._held[medium], {}
        if not any(self._held.values()):
            return [wire.cleared(self.epoch, dropped)]
        events = self._removed(medium, held)
        if dropped:
            events = events or [wire.removed([], self.epoch, medium, is_tail=False)]
            events[0]["dropped"] = dropped
        return events

    # -- tiers -------------------------------------------------------------------------------------------------------

    def follow(self, medium: str, changes: Sequence[TierChange]) -> list[WireEvent]:
        """Follow changes of a tier, in order. Returns: what is to be sent. O(tokens)."""
        held, events = self._held[medium], []
        for (is_page, is_stored), group in groupby(changes, lambda change: (change.page is not None, change.is_stored)):
            pages = [self._named(change.page) for change in group if change.page is not None]
            if not is_page:
                events += self._clear(medium)
                held = self._held[medium]
            elif is_stored:
                held.update(pages)
                events += self._stored(medium, pages)
            else:
                for name, _ in pages:
                    held.pop(name, None)
                pages.reverse()  # stores remove the end of a sequence first, readers are told parents first
                events += self._removed(medium, dict(pages))
        return events

    def replace(self, medium: str, pages: Iterable[TierPage]) -> list[WireEvent]:
        """A tier holds these pages and no others. Returns: what differs, to be sent. O(pages)."""
        before, now = self._held[medium], dict(map(self._named, pages))
        self._held[medium] = now
        gone = {name: page for name, page in before.items() if name not in now}
        new = {name: page for name, page in now.items() if name not in before}
        return [*self._removed(medium, gone), *self._stored(medium, _parents_first(new))]

    def _named(self, page: TierPage) -> tuple[int, HeldPage]:
        is_first = page.parent_key == page.root
        parent = None if is_first else wire.name_of(page.parent_key)
        key = tail_key(page.parent_key, page.tokens) if page.key is None else page.key
        return wire.name_of(key), HeldPage(parent, page.root, page.tokens)

    # -- all ---------------------------------------------------------------------------------------------------------

    def snapshot(self) -> Iterator[WireEvent]:
        """All that is held as `BlockStored` events, the pool first; of each medium, parents first. O(tokens)."""
        for medium, held in self._held.items():
            yield from self._stored(medium, _parents_first(held))

    def _stored(self, medium: str, pages: Iterable[tuple[int, HeldPage]]) -> Iterator[WireEvent]:
        """`BlockStored` of pages in that order, some together where they follow one another."""
        names: list[int] = []
        tokens: list[bytes] = []
        first: HeldPage | None = None
        for name, page in pages:
            is_tail = self._is_tail(page)
            follows = bool(names) and page.parent == names[-1] and not is_tail and len(names) < PAGES_AN_EVENT
            if first is not None and not follows:
                yield self._stored_run(medium, names, first, tokens)
                names, tokens, first = [], [], None
            if is_tail:
                yield self._stored_run(medium, [name], page, [page.tokens])
                continue
            first = first or page
            names.append(name)
            tokens.append(page.tokens)
        if first is not None:
            yield self._stored_run(medium, names, first, tokens)

    def _stored_run(self, medium: str, names: list[int], first: HeldPage, tokens: list[bytes]) -> WireEvent:
        pages = Pages(names, first.parent, first.namespace_key, b"".join(tokens), self._is_tail(first))
        return wire.stored(pages, self.page_size, self.epoch, medium)

    def _removed(self, medium: str, pages: Held) -> list[WireEvent]:
        """`BlockRemoved` of pages, given parents first: the last ones come in the first event. None if no pages."""
        tails = [name for name, page in pages.items() if self._is_tail(page)]
        names = [name for name, page in pages.items() if not self._is_tail(page)]
        parts = [names[start : start + NAMES_AN_EVENT] for start in range(0, len(names), NAMES_AN_EVENT)]
        return [
            *(wire.removed([name], self.epoch, medium, is_tail=True) for name in tails),
            *(wire.removed(part, self.epoch, medium, is_tail=False) for part in reversed(parts)),
        ]

    def _is_tail(self, page: HeldPage) -> bool:
        return len(page.tokens) < self.page_size * TOKEN_BYTES


def _parents_first(pages: Held) -> Iterator[tuple[int, HeldPage]]:
    """`pages`, each after its parent if that is there, and sequences together where they can be. O(pages)."""
    after: dict[int, list[int]] = {}
    stack: list[int] = []
    for name, page in pages.items():
        if page.parent is not None and page.parent in pages:
            after.setdefault(page.parent, []).append(name)
        else:
            stack.append(name)
    stack.reverse()
    while stack:
        name = stack.pop()
        yield name, pages[name]
        stack.extend(reversed(after.get(name, ())))
