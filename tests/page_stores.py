"""A store of pages in memory: what the tiers are tested against, and how stores fail."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

from radixkv.cache.page_keys import page_key, root_key
from radixkv.errors import TierError
from radixkv.tiers.page_store import FoundPage, NewPage, PageFacts, StoreStats

TOKEN_BYTES = 4


class MemoryStore:
    """Pages in a dict, without a bound; tests break it by exchanging what it does.

    Attributes:
        pages: (parent key, tokens) -> payload and facts; outlives `close`.
        before_read, before_write: called first, in the thread of the tier; they may hang or raise.
        finds_at_once: as of a store in this process.
        change_payloads: what becomes of what is read.
    """

    def __init__(self, page_size: int, payload_bytes: int, name: str = "disk") -> None:
        self.name, self.page_size, self.payload_bytes = name, page_size, payload_bytes
        self.pages: dict[tuple[bytes, bytes], tuple[bytes, PageFacts]] = {}
        self.before_read: Callable[[], object] = lambda: None
        self.before_write: Callable[[], object] = lambda: None
        self.before_find: Callable[[], object] = lambda: None
        self.change_payloads: Callable[[list[bytes | None]], list[bytes | None]] = lambda payloads: payloads
        self.finds_at_once = True
        self.num_closed = self.num_reads = self.num_writes = 0
        self._lock = threading.Lock()

    def find(self, parent_key: bytes, tokens: bytes) -> list[FoundPage]:
        self.before_find()
        found: list[FoundPage] = []
        page_bytes = self.page_size * TOKEN_BYTES
        with self._lock:
            while tokens:
                wanted = tokens[:page_bytes]
                children = [key for key in self.pages if key[0] == parent_key]
                best = max(children, key=lambda key: common_tokens(key[1], wanted), default=None)
                if best is None or not (common := common_tokens(best[1], wanted)):
                    break
                found.append(FoundPage(parent_key, best[1], common))
                if common < self.page_size:
                    break
                parent_key, tokens = page_key(parent_key, wanted), tokens[page_bytes:]
        return found

    def read(self, pages: Sequence[FoundPage]) -> list[bytes | None]:
        self.num_reads += 1
        self.before_read()
        with self._lock:
            stored = [self.pages.get((page.parent_key, page.tokens)) for page in pages]
        return self.change_payloads([None if page is None else page[0] for page in stored])

    def write(self, pages: Sequence[NewPage]) -> None:
        self.num_writes += 1
        self.before_write()
        with self._lock:
            for parent_key, tokens, payload, facts in pages:
                assert len(payload) == self.payload_bytes
                assert 0 < len(tokens) <= self.page_size * TOKEN_BYTES
                self.pages[parent_key, tokens] = payload, facts

    def touch(self, pages: Iterable[tuple[bytes, bytes, PageFacts]]) -> None:
        with self._lock:
            for parent_key, tokens, facts in pages:
                if (parent_key, tokens) in self.pages:
                    self.pages[parent_key, tokens] = self.pages[parent_key, tokens][0], facts

    def remove(self, parent_key: bytes) -> int:
        raise NotImplementedError

    def hottest(self, max_pages: int) -> list[tuple[FoundPage, PageFacts]]:
        with self._lock:
            left = sorted(self.pages.items(), key=lambda item: -item[1][1].used_s)
        chosen: list[tuple[FoundPage, PageFacts]] = []
        known = {root_key(*facts.namespace) for _, (_, facts) in left}
        while ready := next((item for item in left if item[0][0] in known), None):
            left.remove(ready)
            (parent_key, tokens), (_, facts) = ready
            known.add(page_key(parent_key, tokens))
            chosen.append((FoundPage(parent_key, tokens, len(tokens) // TOKEN_BYTES), facts))
        return chosen[:max_pages]

    def stats(self) -> StoreStats:
        size = len(self.pages) * self.payload_bytes
        return StoreStats(len(self.pages), size, 1 << 40, 0, 0, 0, {}, 0, None)

    def close(self) -> None:
        self.num_closed += 1


def common_tokens(one: bytes, other: bytes) -> int:
    """How many leading tokens are the same."""
    length = 0
    while length < min(len(one), len(other)) and one[length : length + 4] == other[length : length + 4]:
        length += TOKEN_BYTES
    return length // TOKEN_BYTES


class Hanging:
    """A medium that hangs until it is let go on."""

    def __init__(self) -> None:
        self.entered, self.go_on = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.entered.set()
        assert self.go_on.wait(60), "nobody let it go on"


def failing() -> None:
    raise TierError("the medium is gone")
