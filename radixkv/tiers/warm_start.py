"""Reads the hottest prefixes of a store in the background, so that a pool that starts empty does not stay so."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.keeping import MAX_KEEP_FOR_S
from radixkv.cache.namespace import Namespace
from radixkv.cache.page_keys import page_key, root_key
from radixkv.cache.token_ids import TOKEN_BYTES
from radixkv.tiers.arrivals import Arrivals
from radixkv.tiers.page_store import FoundPage, PageFacts, PageStore
from radixkv.tiers.reader import READ_BYTES
from radixkv.tiers.worker import Worker

MAX_WAITING_RUNS = 2  # read and not taken yet

logger = logging.getLogger(__name__)


class WarmRun(NamedTuple):
    """Consecutive pages of one sequence with the same facts.

    `ids` are all tokens from the start of the sequence to the end of the run; `payloads` are those of its last pages.
    """

    ids: NDArray[np.int32]
    namespace: Namespace
    facts: PageFacts
    payloads: list[bytes]


class _Place(NamedTuple):
    """Where a page stands: what comes before it, and its tokens."""

    before: _Place | None
    tokens: bytes
    namespace: Namespace


class WarmStart(Worker):
    """A thread that reads runs of pages, and ends by itself.

    A page whose predecessors are not known is left out: keys say what comes before it, whatever the store says.
    """

    def __init__(self, store: PageStore, max_pages: int, arrivals: Arrivals) -> None:
        super().__init__(f"{store.name}-warm-start")  # `_changed` guards what follows
        self._store, self._max_pages, self._arrivals = store, max_pages, arrivals
        self._runs: deque[WarmRun] = deque()
        self._is_stopped = self._is_over = False
        self._thread.start()

    @property
    def has_run(self) -> bool:
        """Whether `take` would give something."""
        return bool(self._runs)

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to take, and nothing comes."""
        with self._changed:
            return (self._is_over or self._is_stopped) and not self._runs

    def take(self) -> WarmRun | None:
        """The next run, if it was read already. Runs that go on from others come after them."""
        with self._changed:
            run = self._runs.popleft() if self._runs else None
            self._changed.notify_all()
        return run

    def stop(self) -> None:
        """Read nothing more. Does not wait."""
        with self._changed:
            self._is_stopped = True
            self._runs.clear()
            self._changed.notify_all()

    # -- in the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._read_all()
        except Exception as error:  # whatever the store's medium raises: the pool starts empty
            logger.warning("the pool starts colder than it could: the %s tier failed: %s", self._store.name, error)
        with self._changed:
            self._is_over = True
        self._arrivals.notify()

    def _read_all(self) -> None:
        hottest = self._store.hottest(self._max_pages)
        most = max(1, READ_BYTES // self._store.payload_bytes)
        for place, pages, facts in runs_of(hottest, self._store.page_size, most):
            payloads = []
            for payload in self._store.read(pages):
                if payload is None or len(payload) != self._store.payload_bytes:
                    break
                payloads.append(payload)
            with self._changed:
                self._changed.wait_for(lambda: self._is_stopped or len(self._runs) < MAX_WAITING_RUNS)
                if self._is_stopped:
                    return
                if payloads:
                    ids = _ids_to(place, len(pages) - len(payloads))
                    self._runs.append(WarmRun(ids, place.namespace, facts, payloads))
            self._arrivals.notify()


def runs_of(
    pages: Sequence[tuple[FoundPage, PageFacts]], page_size: int, most: int
) -> Iterator[tuple[_Place, list[FoundPage], PageFacts]]:
    """Consecutive pages with the same facts, at most `most` of them, with the place of the last one."""
    places: dict[bytes, _Place] = {}
    run: list[FoundPage] = []
    last: tuple[_Place, PageFacts, bytes] | None = None
    for page, facts in pages:
        before = places.get(page.parent_key)
        if before is None and page.parent_key != root_key(*facts.namespace):
            continue
        namespace = Namespace(*facts.namespace) if before is None else before.namespace
        place = _Place(before, page.tokens, namespace)
        is_whole = len(page.tokens) == page_size * TOKEN_BYTES
        key = page_key(page.parent_key, page.tokens) if is_whole else b""
        if is_whole:
            places[key] = place
        if last is not None:
            goes_on = last[2] == page.parent_key and _kept(last[1]) == _kept(facts) and len(run) < most
            if not goes_on:
                yield last[0], run, last[1]
                run = []
        run.append(page)
        last = place, facts, key
    if last is not None:
        yield last[0], run, last[1]


def _kept(facts: PageFacts) -> tuple[int, int, float | None]:
    """The facts that a node of the cache has once for all of its tokens."""
    return facts.hits, facts.priority, facts.kept_until_s


def _ids_to(place: _Place, num_left_out: int) -> NDArray[np.int32]:
    """The tokens from the start of a sequence to the end of `place`, but for its last pages."""
    tokens: list[bytes] = []
    current: _Place | None = place
    while current is not None:
        tokens.append(current.tokens)
        current = current.before
    tokens = tokens[num_left_out:]
    tokens.reverse()
    return np.frombuffer(b"".join(tokens), "<i4").astype(np.int32, copy=False)


def seconds_left(facts: PageFacts, now_s: float) -> float | None:
    """How long a page is still to be kept, by the wall clock; None if it need not be."""
    if facts.kept_until_s is None or facts.kept_until_s <= now_s:
        return None
    return min(facts.kept_until_s - now_s, MAX_KEEP_FOR_S)
