"""What a cache holds, followed by its events in another thread, so that nobody need ask the cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from radixkv.cache.events import PageRun, Removed, Stored
from radixkv.cache.page_keys import root_key
from radixkv.cache.token_ids import TOKEN_BYTES
from radixkv.publish import wire
from radixkv.publish.event_queue import Everything, Item
from radixkv.publish.wire import Pages, WireEvent

PAGES_AN_EVENT = 256  # in snapshots


class HeldPage(NamedTuple):
    """A page or tail that is held; see `Pages`."""

    parent: int | None
    namespace_key: bytes
    tokens: bytes


class TreeMirror:
    """The pages that a cache holds, by their names on the wire, and the events that tell of each change.

    Pages stand in the order in which they were stored. A cache stores no page before its parent and removes none before
    its children, so parents come first. About 300 bytes a page. A repeated event changes nothing.
    """

    def __init__(self, page_size: int, epoch: int) -> None:
        self.page_size, self.epoch = page_size, epoch
        self._pages: dict[int, HeldPage] = {}

    @property
    def num_pages(self) -> int:
        """Pages and tails that are held."""
        return len(self._pages)

    def apply(self, item: Item) -> list[WireEvent]:
        """Follow one event. Returns: what is to be sent. O(tokens), a digest for each page."""
        if isinstance(item, Everything):
            self._pages.clear()
            return [wire.cleared(self.epoch, item.dropped), *(event for run in item.runs for event in self._store(run))]
        if isinstance(item, Stored):
            return self._store(item.run)
        if isinstance(item, Removed):
            return self._remove(item.run)
        self._pages.clear()
        return [wire.cleared(self.epoch)]

    def lose(self, dropped: int) -> WireEvent:
        """Know nothing any more, as events were dropped. Returns: what is to be sent."""
        self._pages.clear()
        return wire.cleared(self.epoch, dropped)

    def snapshot(self) -> Iterator[WireEvent]:
        """All that is held as `BlockStored` events, parents first. O(tokens)."""
        names: list[int] = []
        tokens: list[bytes] = []
        first: HeldPage | None = None
        for name, page in self._pages.items():
            is_tail = len(page.tokens) < self.page_size * TOKEN_BYTES
            follows = bool(names) and page.parent == names[-1] and not is_tail and len(names) < PAGES_AN_EVENT
            if first is not None and not follows:
                yield self._stored(names, first, tokens)
                names, tokens, first = [], [], None
            if is_tail:
                yield self._stored([name], page, [page.tokens])
                continue
            first = first or page
            names.append(name)
            tokens.append(page.tokens)
        if first is not None:
            yield self._stored(names, first, tokens)

    def _stored(self, names: list[int], first: HeldPage, tokens: list[bytes]) -> WireEvent:
        is_tail = len(tokens[0]) < self.page_size * TOKEN_BYTES
        pages = Pages(names, first.parent, first.namespace_key, b"".join(tokens), is_tail)
        return wire.stored(pages, self.page_size, self.epoch)

    def _store(self, run: PageRun) -> list[WireEvent]:
        names = [wire.name_of(key) for key in run.page_keys]
        parent = wire.name_of(run.parent_key) if run.start else None
        namespace_key, tokens = root_key(*run.namespace), run.tokens.tobytes()
        page_bytes = self.page_size * TOKEN_BYTES
        before = parent
        for number, name in enumerate(names):
            page = HeldPage(before, namespace_key, tokens[number * page_bytes : (number + 1) * page_bytes])
            self._pages.setdefault(name, page)
            before = name
        return [wire.stored(Pages(names, parent, namespace_key, tokens, run.is_tail), self.page_size, self.epoch)]

    def _remove(self, run: PageRun) -> list[WireEvent]:
        names = [wire.name_of(key) for key in run.page_keys]
        for name in names:
            self._pages.pop(name, None)
        return [wire.removed(names, self.epoch, is_tail=run.is_tail)]
