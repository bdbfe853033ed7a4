"""Pages in host memory: the tier below a GPU's pool, and what the tests compare other stores with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from threading import Lock

from radixkv.cache.token_ids import TOKEN_BYTES
from radixkv.errors import ClosedError, ConfigError
from radixkv.tiers.page_index import PageIndex, StoredPage
from radixkv.tiers.page_lines import Names, guaranteed_pages, share_uses
from radixkv.tiers.page_slots import PageSlots, check_page
from radixkv.tiers.page_store import FoundPage, NewPage, PageFacts, StoreStats
from radixkv.tiers.page_watch import PageWatch


class HostStore:
    """A `PageStore` in memory, of at most `capacity_bytes` of payloads. It knows no faults and forgets at the end."""

    finds_at_once = True
    name = "host"

    def __init__(
        self,
        page_size: int,
        payload_bytes: int,
        capacity_bytes: int,
        *,
        policy: str = "lru",
        clock: Callable[[], float] = time.time,
    ) -> None:
        """An empty store. Raises: ConfigError if not even one page fits."""
        if payload_bytes < 1 or capacity_bytes < payload_bytes:
            raise ConfigError(
                f"a store needs room for a page of at least 1 byte, not {capacity_bytes} for {payload_bytes}"
            )
        self.page_size, self.payload_bytes, self.capacity_bytes = page_size, payload_bytes, capacity_bytes
        self._clock = clock
        self._lock = Lock()
        self._index = PageIndex(page_size, policy)
        self._slots = PageSlots(self._index, capacity_bytes // payload_bytes)
        self._payloads: dict[int, bytes] = {}  # by slot
        self._pages_read = self._pages_written = self._pages_evicted = self._missing = 0
        self._is_closed = False

    @property
    def watch(self) -> PageWatch:
        """How to follow what it holds."""
        return PageWatch(self._index, self._lock)

    def find(self, parent_key: bytes, tokens: bytes) -> list[FoundPage]:
        """As `PageStore.find`. Raises: ClosedError."""
        with self._lock:
            self._check_open()
            return self._index.find(parent_key, tokens)

    def read(self, pages: Sequence[FoundPage]) -> list[bytes | None]:
        """As `PageStore.read`; nothing is copied. Raises: ClosedError."""
        with self._lock:
            self._check_open()
            stored = [self._index.get(page.parent_key, page.tokens) for page in pages]
            payloads = [None if page is None else self._payloads[page.slot] for page in stored]
            self._missing += payloads.count(None)
            self._pages_read += len(payloads) - payloads.count(None)
            return payloads

    def write(self, pages: Sequence[NewPage]) -> None:
        """As `PageStore.write`; a page for which there is no room counts as evicted at once.

        Raises: InvalidPagesError, ClosedError.
        """
        for page in pages:
            check_page(page, self.page_size, self.payload_bytes)
        with self._lock:
            self._check_open()
            plan = self._slots.plan([(page, b"") for page in pages], self._clock())
            self._payloads.update((page.slot, payload) for page, payload in plan.new)
            self._slots.commit(plan)
            self._pages_written += len(plan.new)
            self._pages_evicted += len(plan.giving_way) + plan.left_out

    def touch(self, pages: Iterable[tuple[bytes, bytes, PageFacts]]) -> None:
        """As `PageStore.touch`. Raises: ClosedError."""
        with self._lock:
            self._check_open()
            for parent_key, tokens, facts in pages:
                page = self._index.get(parent_key, tokens)
                if page is not None:
                    self._index.update(page, facts)

    def remove(self, parent_key: bytes) -> int:
        """As `PageStore.remove`. Raises: ClosedError."""
        with self._lock:
            self._check_open()
            pages = self._index.below(parent_key)
            for page in pages:
                self._slots.drop(page)
                del self._payloads[page.slot]
            return len(pages)

    def hottest(self, max_pages: int) -> list[tuple[FoundPage, PageFacts]]:
        """As `PageStore.hottest`. O(pages × log pages). Raises: ClosedError."""
        with self._lock:
            self._check_open()
            return [(found_whole(page), page.facts) for page in self._index.hottest(max_pages, self._clock())]

    def check_shares(self, guaranteed_bytes: Mapping[Names, int]) -> dict[Names, int]:
        """How many pages `set_shares` would guarantee. Raises: ConfigError if they are more than the capacity."""
        return guaranteed_pages(guaranteed_bytes, self.payload_bytes, self.capacity_bytes)

    def set_shares(self, guaranteed_bytes: Mapping[Names, int]) -> None:
        """Guarantee bytes to namespaces, in place of what was guaranteed before; as `DiskStore.set_shares`.

        Raises: ConfigError if they are more than the capacity; ClosedError.
        """
        pages = self.check_shares(guaranteed_bytes)
        with self._lock:
            self._check_open()
            self._index.set_shares(pages)

    def stats(self) -> StoreStats:
        """As `PageStore.stats`."""
        with self._lock:
            return StoreStats(
                pages=len(self._index),
                bytes=len(self._index) * self.payload_bytes,
                capacity_bytes=self.capacity_bytes,
                pages_read=self._pages_read,
                pages_written=self._pages_written,
                pages_evicted=self._pages_evicted,
                misses={"evicted": self._missing} if self._missing else {},
                errors=0,
                last_error=None,
                namespaces=share_uses(self._index.uses(), self.payload_bytes),
            )

    def check_invariants(self) -> None:
        """Prove the invariants. O(pages × log pages). Raises: InvariantError."""
        with self._lock:
            self._slots.check_invariants()

    def close(self) -> None:
        """As `PageStore.close`."""
        with self._lock:
            self._is_closed = True
            self._payloads.clear()
            self._index.is_lost()

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedError("the store is closed")


def found_whole(page: StoredPage) -> FoundPage:
    """A page of which all tokens are wanted."""
    return FoundPage(page.parent_key, page.tokens, len(page.tokens) // TOKEN_BYTES)
