"""One store below the pool, with the threads that read and write it and what is known of its speed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from radixkv.cache.token_ids import TOKEN_BYTES
from radixkv.tiers.arrivals import Arrivals
from radixkv.tiers.backoff import Backoff
from radixkv.tiers.known_keys import KnownKeys
from radixkv.tiers.load_choice import LoadRate
from radixkv.tiers.page_chain import fitting_pages
from radixkv.tiers.page_store import FoundPage, PageStore, StoreStats
from radixkv.tiers.reader import Load, PageReader
from radixkv.tiers.writer import PageWriter

PROBE_BYTES = 8 << 20
MAX_PROBE_S = 30.0  # a probe that takes longer is given up

logger = logging.getLogger(__name__)


class TierStats(NamedTuple):
    """What a tier holds, and what it did for this engine.

    `loaded_tokens` were loaded in place of being computed, with `loaded_states` of recurrent layers, or windows of
    layers that see one, each of which also counts as the pages that hold its parts. Of the requests that found more in
    the tier than in the pool, `loads` loaded it, `slower` computed it because that is measured to be faster, and
    `unavailable` did because the tier had failed or hung; `given_up` of the loads took too long, `missed` of them ended
    early, as pages were gone or damaged. `dropped_pages` could not be written in time. `is_slow` tells that it is off
    until a probe finds it faster than computing.
    """

    name: str
    store: StoreStats
    loaded_tokens: int
    loaded_pages: int
    loaded_states: int
    loads: int
    slower: int
    unavailable: int
    given_up: int
    missed: int
    written_pages: int
    dropped_pages: int
    queued_bytes: int
    read_errors: int
    write_errors: int
    last_error: str | None
    seconds_per_mb: float | None
    is_slow: bool


class Tier:
    """A store, its reader, its writer, and how fast it is. All but the threads belongs to the engine's thread."""

    def __init__(
        self,
        store: PageStore,
        arrivals: Arrivals,
        *,
        max_write_bytes_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store = store
        self.rate = LoadRate()
        self.reader = PageReader(store, arrivals, clock=clock)
        self.known = KnownKeys()  # of a store that does not find at once
        on_written = None if store.finds_at_once else self.known.add
        self.writer = PageWriter(store, max_bytes_s=max_write_bytes_s, clock=clock, on_written=on_written)
        self.loaded_tokens = self.loaded_pages = self.loaded_states = self.loads = 0
        self.slower = self.unavailable = self.given_up = self.missed = 0
        self._clock = clock
        self._finding = Backoff(f"looking up pages in the {store.name} tier", clock)
        self._probe: Load | None = None

    @property
    def name(self) -> str:
        """What stats and outputs call it."""
        return self.store.name

    @property
    def page_size(self) -> int:
        """Tokens a page."""
        return self.store.page_size

    def find(self, parent_key: bytes, tokens: bytes) -> list[FoundPage]:
        """As `PageStore.find`, checked; nothing while the index of the store fails."""
        if self._finding.rests:
            return []
        try:
            found = self.store.find(parent_key, tokens)
            pages = fitting_pages(found, parent_key, tokens, self.page_size)
        except Exception as error:  # whatever the store raises: it costs hits, no request
            self._finding.failed(error)
            return []
        if len(pages) < len(found):
            self._finding.failed("it found pages that do not follow each other, or hold other tokens")
        else:
            self._finding.worked()
        return pages

    @property
    def finds_at_once(self) -> bool:
        """Whether `find` reads memory alone. If not, the reader's thread calls it, and `known` tells what it found."""
        return self.store.finds_at_once

    def num_stored(self, parent_key: bytes, tokens: bytes, keys: Sequence[bytes]) -> int:
        """How many of the first pages of a sequence are stored whole, as far as can be told at once. O(pages).

        Args:
            tokens: of whole pages after `parent_key`, and `keys` those of these pages.
        """
        if not self.finds_at_once:
            return next((number for number, key in enumerate(keys) if key not in self.known), len(keys))
        return sum(page.num_tokens == self.page_size for page in self.find(parent_key, tokens))

    def has_tail(self, parent_key: bytes, tokens: bytes, key: bytes) -> bool:
        """Whether the page of a sequence that `tokens` fill in part is stored, as far as can be told at once."""
        if not self.finds_at_once:
            return key in self.known
        found = self.find(parent_key, tokens)
        return bool(found) and found[0].num_tokens * TOKEN_BYTES >= len(tokens)

    def num_bytes(self, num_pages: int) -> int:
        """Bytes of so many pages."""
        return num_pages * self.store.payload_bytes

    def probe(self, pages: Sequence[FoundPage]) -> None:
        """Measure how fast it is now, by a load that nobody waits for, if it is time for that."""
        if self._probe is None and self.reader.is_available and self.rate.probe_is_due(self._clock()):
            self._probe = self.reader.start(pages[: max(1, PROBE_BYTES // self.store.payload_bytes)])

    def poll(self) -> None:
        """Take note of what a probe measured. O(1)."""
        probe = self._probe
        if probe is None:
            return
        self.reader.take(probe)
        waited_s = self._clock() - probe.started_at
        if probe.is_over and probe.num_arrived:
            self.rate.probed(self.num_bytes(probe.num_arrived), probe.read_s)
        elif waited_s > MAX_PROBE_S:
            self.reader.give_up(probe)
            self.rate.probed(self.num_bytes(len(probe.pages)), waited_s)
        if probe.is_over:
            self._probe = None

    def stats(self) -> TierStats:
        """What it did so far. O(1)."""
        per_byte = self.rate.seconds(1 << 20)
        backoffs = (self._finding, self.reader.backoff, self.writer.backoff)
        errors = [backoff.last_error for backoff in backoffs if backoff.last_error is not None]
        store = self.store.stats()
        return TierStats(
            name=self.name,
            store=store,
            loaded_tokens=self.loaded_tokens,
            loaded_pages=self.loaded_pages,
            loaded_states=self.loaded_states,
            loads=self.loads,
            slower=self.slower,
            unavailable=self.unavailable,
            given_up=self.given_up,
            missed=self.missed,
            written_pages=self.writer.pages_written,
            dropped_pages=self.writer.pages_dropped,
            queued_bytes=self.writer.queued_bytes,
            read_errors=self._finding.errors + self.reader.backoff.errors,
            write_errors=self.writer.backoff.errors,
            last_error=errors[-1] if errors else store.last_error,
            seconds_per_mb=per_byte,
            is_slow=self.rate.is_slow,
        )

    def leave(self) -> None:
        """As `close`, without waiting: the writer's thread lets go of the store once it has written what is left."""
        self.reader.stop()
        self.writer.stop(at_end=self._let_go)

    def wait(self, timeout_s: float) -> None:
        """Wait for the end of what `leave` began, for so long at most."""
        self.writer.wait(timeout_s)

    def close(self, timeout_s: float) -> None:
        """Write what is left and let go of the store. A store that hangs is left to its threads, which end with it."""
        read, written = self.reader.close(timeout_s), self.writer.close(timeout_s)
        if not (read and written):
            logger.warning("the %s tier hangs, and is left open", self.name)
            return
        self._let_go()

    def _let_go(self) -> None:
        try:
            self.store.close()
        except Exception:  # whatever its medium raises: the engine closes all the same
            logger.exception("the %s tier cannot be closed", self.name)
