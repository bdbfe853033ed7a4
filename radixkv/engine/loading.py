"""Fills the pages of requests from the tiers below the pool, where that is faster than computing them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.insight.explanation import BelowPool
from radixkv.cache.namespace import Namespace
from radixkv.engine.request import Request
from radixkv.memory.page_bytes import PageBytes
from radixkv.tiers.load_choice import PrefillRate
from radixkv.tiers.page_chain import PageChain, as_bytes
from radixkv.tiers.page_store import FoundPage
from radixkv.tiers.reader import Load, Lookup
from radixkv.tiers.tier import Tier

LEAST_PATIENCE_S = 0.25  # a load is waited for as long as computing would take, but not less
MOST_SILENCE_S = 2.0  # and given up when nothing came for so long
LOOKUP_PATIENCE_S = 0.5  # for the answer of a tier on another machine
MEASURED_TOKENS = 128  # of a long load are computed where it is not known how long that takes


@dataclass(slots=True, eq=False)
class RequestLoad:
    """What a request waits for: pages of `tier`, from its page number `first_page` on.

    `ends[i]` is where the tokens end of which the KV is there once i + 1 pages are.
    """

    tier: Tier
    load: Load
    first_page: int
    first_token: int
    ends: list[int]
    patience_s: float | None
    num_taken: int = 0
    copy_s: float = 0.0

    def deadline(self) -> float:
        """When it is given up, if nothing comes before."""
        by_silence = self.load.last_arrival_at + MOST_SILENCE_S
        return by_silence if self.patience_s is None else min(by_silence, self.load.started_at + self.patience_s)


class RequestLookup(NamedTuple):
    """What a request waits for: the answer of a tier that does not tell at once what it has."""

    tier: Tier
    load: Lookup

    def deadline(self) -> float:
        """When it is given up."""
        return self.load.started_at + LOOKUP_PATIENCE_S


class Loader:
    """Finds what requests can load, and copies it into their pages as it arrives.

    A request's load is its `load`; it holds its lease and its row meanwhile, and only this, in the engine's thread,
    writes its pages. However it ends, what arrived is used and the rest is computed.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        page_bytes: PageBytes,
        page_size: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tiers, self._page_bytes, self._page_size, self._clock = tiers, page_bytes, page_size, clock
        self.prefill = PrefillRate()
        self.busy_s = 0.0  # that it took of the engine's time

    def begin(self, request: Request) -> bool:
        """Begin to load what lies below for a request that has its pages. Returns False if it is to compute now.

        Of the tiers that tell at once, the one that has the most is loaded; others are asked if these have nothing.
        """
        chain = chain_of(request, self._page_size)
        candidates = []
        for tier in self._tiers:
            if tier.finds_at_once:
                pages = self._found(tier, request.findable_ids, request.num_computed, chain)
                if ends := self._ends(pages, request.num_computed):
                    candidates.append((ends[-1], tier, pages))
        candidates.sort(key=lambda candidate: candidate[0], reverse=True)  # stable: then the fastest
        if any(self._loads(request, tier, pages) for _, tier, pages in candidates):
            return True
        return any(self._asks(request, tier) for tier in self._tiers if not tier.finds_at_once)

    def _loads(self, request: Request, tier: Tier, pages: Sequence[FoundPage]) -> bool:
        """Begin to load `pages` if that is worth it."""
        ends = self._ends(pages, request.num_computed)
        if not ends:
            return False
        if not tier.reader.is_available:
            tier.unavailable += 1
            return False
        compute_s = self.prefill.seconds(request.num_computed, ends[-1])
        num_bytes = tier.num_bytes(len(pages))
        if not tier.rate.is_faster(num_bytes, compute_s, self._clock()):
            tier.slower += 1
            tier.probe(pages)
            return False
        if compute_s is None and tier.rate.seconds(num_bytes) is not None:
            num_measured = -(-MEASURED_TOKENS // self._page_size)
            if len(pages) > 4 * num_measured:
                pages, ends = pages[:-num_measured], ends[:-num_measured]
        tier.loads += 1
        patience_s = None if compute_s is None else max(LEAST_PATIENCE_S, compute_s)
        first_page = request.num_computed // self._page_size
        request.load = RequestLoad(tier, tier.reader.start(pages), first_page, request.num_computed, ends, patience_s)
        return True

    def _asks(self, request: Request, tier: Tier) -> bool:
        """Begin to ask a tier that does not tell at once."""
        ids = request.findable_ids
        if len(ids) <= request.num_computed or not tier.rate.may_be_tried(self._clock()):
            return False
        if not tier.reader.is_available or tier.reader.keeps_waiting:
            tier.unavailable += 1
            return False
        first_page = request.num_computed // self._page_size
        chain = chain_of(request, self._page_size)
        chain.grow(ids)
        parent_key, tokens = chain.parent_key(first_page), as_bytes(ids[first_page * self._page_size :])
        request.load = RequestLookup(tier, tier.reader.look_up(lambda: tier.find(parent_key, tokens)))
        return True

    def receive(self, request: Request) -> bool:
        """Copy what has arrived for a request into its pages. Returns True once nothing more is waited for."""
        waiting = request.load
        if isinstance(waiting, RequestLookup):
            return self._heard(request, waiting)
        assert waiting is not None, request
        reader, load = waiting.tier.reader, waiting.load
        is_over = load.is_over  # before what has arrived is taken: then nothing is left
        payloads = reader.take(load)
        if payloads:
            self._fill(request, waiting, payloads)
        if not is_over and self._clock() < waiting.deadline():
            return False
        if not is_over:
            waiting.tier.given_up += 1
            waited_s = self._clock() - load.started_at  # for at least half of it, as far as is known
            share = max(0.5, load.num_arrived / len(load.pages))
            waiting.tier.rate.record(waiting.tier.num_bytes(len(load.pages)), waited_s / share)
        self.end(request)
        return True

    def _heard(self, request: Request, waiting: RequestLookup) -> bool:
        """Take the answer of a tier. Returns True if there is nothing to load, or it took too long."""
        tier, lookup = waiting.tier, waiting.load
        if not lookup.is_over:
            if self._clock() < waiting.deadline():
                return False
            tier.given_up += 1
            self.end(request)
            return True
        request.load = None
        keys = chain_of(request, self._page_size).keys[request.num_computed // self._page_size :]
        num_whole = sum(page.num_tokens == self._page_size for page in lookup.pages)
        tier.known.add(keys[:num_whole])
        tier.known.discard(keys[num_whole:])
        return not self._loads(request, tier, lookup.pages)

    def end(self, request: Request) -> None:
        """Wait no more; what has been copied counts. Idempotent."""
        waiting = request.load
        if waiting is None:
            return
        request.load = None
        waiting.tier.reader.give_up(waiting.load)
        if isinstance(waiting, RequestLookup):
            return
        if waiting.load.missed is not None:
            waiting.tier.missed += 1
            waiting.tier.known.discard(
                chain_of(request, self._page_size).keys[waiting.first_page + waiting.num_taken :]
            )
        if waiting.num_taken and (waiting.load.is_whole or waiting.load.missed is not None):
            seconds = waiting.load.read_s + waiting.copy_s
            waiting.tier.rate.record(waiting.tier.num_bytes(waiting.num_taken), seconds)
        if waiting.num_taken:
            request.was_loaded(waiting.tier.name, waiting.first_token)
            waiting.tier.loaded_tokens += max(0, request.num_computed - waiting.first_token)
            waiting.tier.loaded_pages += waiting.num_taken

    def has_news(self, request: Request) -> bool:
        """Whether `receive` would do something. O(1)."""
        waiting = _load_of(request)
        arrived = isinstance(waiting, RequestLoad) and waiting.load.num_waiting > 0
        return arrived or waiting.load.is_over or self._clock() >= waiting.deadline()

    def wait_s(self, requests: Sequence[Request]) -> float:
        """How long nothing needs to be done for these requests, if nothing arrives."""
        return max(0.0, min(_load_of(request).deadline() for request in requests) - self._clock())

    def below(self, ids: NDArray[np.int32], namespace: Namespace, cached_tokens: int) -> list[BelowPool]:
        """What each tier that tells at once holds of `ids` beyond the first `cached_tokens`. O(tokens)."""
        found = []
        for tier in self._tiers:
            if not tier.finds_at_once:
                continue
            pages = self._found(tier, ids, cached_tokens, PageChain(namespace, self._page_size))
            ends = self._ends(pages, cached_tokens)
            if not ends:
                continue
            compute_s = self.prefill.seconds(cached_tokens, ends[-1])
            load_s = tier.rate.seconds(tier.num_bytes(len(pages)))
            reason: Literal["loaded", "slower than computing", "unavailable"] = "loaded"
            if not tier.reader.is_available:
                reason = "unavailable"
            elif load_s is not None and compute_s is not None and load_s >= compute_s:
                reason = "slower than computing"
            found.append(BelowPool(tier.name, ends[-1], reason))
        return found

    def _found(self, tier: Tier, ids: NDArray[np.int32], num_cached: int, chain: PageChain) -> list[FoundPage]:
        """What a tier has of `ids` from the page on in which the first `num_cached` tokens end."""
        if num_cached >= len(ids):
            return []
        first_page = num_cached // self._page_size
        first = first_page * self._page_size
        chain.grow(ids[:first])
        return tier.find(chain.parent_key(first_page), as_bytes(ids[first:]))

    def _ends(self, pages: Sequence[FoundPage], num_cached: int) -> list[int]:
        """Where the tokens of each of these pages end; nothing if they bring no more than is there already."""
        first = num_cached // self._page_size * self._page_size
        ends = [first + number * self._page_size + page.num_tokens for number, page in enumerate(pages)]
        return ends if ends and ends[-1] > num_cached else []

    def _fill(self, request: Request, waiting: RequestLoad, payloads: Sequence[bytes]) -> None:
        started_at = time.perf_counter()
        lease, _ = request.running()
        first = waiting.first_page + waiting.num_taken
        self._page_bytes.write(lease.pages[first : first + len(payloads)], payloads)
        waiting.num_taken += len(payloads)
        request.num_computed = max(request.num_computed, waiting.ends[waiting.num_taken - 1])
        seconds = time.perf_counter() - started_at
        waiting.copy_s += seconds
        self.busy_s += seconds


def chain_of(request: Request, page_size: int) -> PageChain:
    """The page keys of a request, made when they are first asked for."""
    if request.chain is None:
        request.chain = PageChain(request.cache_options.namespace, page_size)
    return request.chain


def _load_of(request: Request) -> RequestLoad | RequestLookup:
    assert request.load is not None, request
    return request.load
