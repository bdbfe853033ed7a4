"""Fills the pages of requests from the tiers below the pool, where that is faster than computing them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.insight.explanation import BelowPool
from radixkv.cache.namespace import Namespace
from radixkv.engine.beside_pages import BesidePages, PoolBytes, fill_beside, load_chooser
from radixkv.engine.request import Request
from radixkv.errors import OutOfPagesError
from radixkv.tiers.load_choice import PrefillRate
from radixkv.tiers.page_chain import PageChain, as_bytes
from radixkv.tiers.page_store import FoundPage
from radixkv.tiers.prefix_load import PrefixLoad
from radixkv.tiers.reader import Lookup
from radixkv.tiers.state_parts import part_keys
from radixkv.tiers.tier import Tier

LOOKUP_PATIENCE_S = 0.5  # for the answer of a tier on another machine


class RequestLookup(NamedTuple):
    """What a request waits for: the answer of a tier that does not tell at once what it has.

    Attributes:
        load: which pages are of use.
        stored: all that the tier has, once that is over.
    """

    tier: Tier
    load: Lookup
    stored: list[FoundPage]

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
        page_bytes: PoolBytes,
        page_size: int,
        *,
        beside: BesidePages | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tiers, self._page_bytes, self._page_size, self._clock = tiers, page_bytes, page_size, clock
        self._beside = beside
        self._chooser = load_chooser(beside, page_size, clock)
        self.busy_s = 0.0  # that it took of the engine's time

    @property
    def prefill(self) -> PrefillRate:
        """How long computing takes."""
        return self._chooser.prefill

    def begin(self, request: Request) -> bool:
        """Begin to load what lies below for a request that has its pages. Returns False if it is to compute now.

        Of the tiers that tell at once, the one that has the most is loaded; others are asked for what these lack.
        """
        chain, chooser = chain_of(request, self._page_size), self._chooser
        candidates = []
        for tier in self._tiers:
            if tier.finds_at_once:
                pages = chooser.found(tier, request.findable_ids, request.num_computed, chain)
                if ends := chooser.ends(pages, request.num_computed):
                    candidates.append((ends[-1], tier, pages))
        candidates.sort(key=lambda candidate: candidate[0], reverse=True)  # stable: then the fastest
        if any(self._loads(request, tier, pages) for _, tier, pages in candidates):
            return True
        return self._asks_others(request)

    def _asks_others(self, request: Request) -> bool:
        """Begin to ask a tier that does not tell at once, if there is one."""
        return any(self._asks(request, tier) for tier in self._tiers if not tier.finds_at_once)

    def _loads(self, request: Request, tier: Tier, pages: Sequence[FoundPage]) -> bool:
        """Begin to load `pages` if that is worth it."""
        ends = self._chooser.ends(pages, request.num_computed)
        if ends and self._covers(request, ends[-1]):
            request.load = self._chooser.begin(tier, pages, request.num_computed)
        return request.load is not None

    def _covers(self, request: Request, num_tokens: int) -> bool:
        """Have room for what layers need besides pages: a slot for the state after so many tokens, say."""
        lease, _ = request.running()
        try:
            lease.prepare_load(request.num_computed, num_tokens)
        except OutOfPagesError:
            return False
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
        chooser, stored = self._chooser, list[FoundPage]()

        def find() -> list[FoundPage]:
            stored.extend(tier.find(parent_key, tokens))
            return chooser.useful(tier, stored, first_page)

        request.load = RequestLookup(tier, tier.reader.look_up(find), stored)
        return True

    def receive(self, request: Request) -> bool:
        """Copy what has arrived for a request into its pages. Returns True once nothing more is waited for."""
        waiting = request.load
        if isinstance(waiting, RequestLookup):
            return self._heard(request, waiting)
        assert waiting is not None, request
        is_over = waiting.receive(partial(self._fill, request, waiting))
        self._reached(request, waiting.num_loaded)
        if not is_over:
            return False
        self.end(request)
        if self._beside is not None and waiting.load.missed is not None:
            return not self._begins_again(request, waiting)
        goes_on = waiting.tier.finds_at_once and waiting.is_of_all and waiting.load.is_whole
        return not (goes_on and self._asks_others(request))

    def _begins_again(self, request: Request, failed: PrefixLoad) -> bool:
        """Begin to load up to an earlier end than the one that could not be read, if the tier has such."""
        tier = failed.tier
        if not tier.finds_at_once:
            return False
        chain = chain_of(request, self._page_size)
        pages = self._chooser.found(tier, request.findable_ids, request.num_computed, chain)
        ends = self._chooser.ends(pages, request.num_computed)
        return bool(ends) and ends[-1] < failed.last_token and self._loads(request, tier, pages)

    def _reached(self, request: Request, num_tokens: int) -> None:
        """What has come is good for so many tokens."""
        if num_tokens > request.num_computed:
            request.num_computed = num_tokens
            lease, _ = request.running()
            lease.checkpoint_at(num_tokens)  # a state that was kept once is kept again
            lease.advance(num_tokens)

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
        num_whole = sum(page.num_tokens == self._page_size for page in waiting.stored)
        tier.known.add([*keys[:num_whole], *part_keys(lookup.pages)])
        tier.known.discard(keys[num_whole:])
        return not self._loads(request, tier, lookup.pages)

    def end(self, request: Request) -> None:
        """Wait no more; what has been copied counts. Idempotent."""
        waiting = request.load
        if waiting is None:
            return
        request.load = None
        if isinstance(waiting, RequestLookup):
            waiting.tier.reader.give_up(waiting.load)
            return
        waiting.end(chain_of(request, self._page_size).keys)
        if waiting.num_taken:
            request.was_loaded(waiting.tier.name, waiting.first_token)

    def has_news(self, request: Request) -> bool:
        """Whether `receive` would do something. O(1)."""
        waiting = _load_of(request)
        if isinstance(waiting, PrefixLoad):
            return waiting.has_news
        return waiting.load.is_over or self._clock() >= waiting.deadline()

    def wait_s(self, requests: Sequence[Request]) -> float:
        """How long nothing needs to be done for these requests, if nothing arrives."""
        return max(0.0, min(_load_of(request).deadline() for request in requests) - self._clock())

    def below(self, ids: NDArray[np.int32], namespace: Namespace, cached_tokens: int) -> list[BelowPool]:
        """What each tier that tells at once holds of `ids` beyond the first `cached_tokens`. O(tokens)."""
        found, chooser = [], self._chooser
        for tier in self._tiers:
            if not tier.finds_at_once:
                continue
            pages = chooser.found(tier, ids, cached_tokens, PageChain(namespace, self._page_size))
            if ends := chooser.ends(pages, cached_tokens):
                found.append(BelowPool(tier.name, ends[-1], chooser.verdict(tier, pages, cached_tokens)))
        return found

    def _fill(self, request: Request, load: PrefixLoad, first_page: int, payloads: Sequence[bytes]) -> None:
        started_at = time.perf_counter()
        lease, _ = request.running()
        first_part = load.first_page + len(load.load.pages) - load.num_parts
        num_pages = min(len(payloads), max(0, first_part - first_page))
        if num_pages:
            self._page_bytes.write(lease.pages[first_page : first_page + num_pages], payloads[:num_pages])
        if self._beside is not None and num_pages < len(payloads):
            number = first_page + num_pages - first_part
            fill_beside(self._beside, lease, load, number, payloads[num_pages:], self._page_size)
        self.busy_s += time.perf_counter() - started_at


def chain_of(request: Request, page_size: int) -> PageChain:
    """The page keys of a request, made when they are first asked for."""
    if request.chain is None:
        request.chain = PageChain(request.cache_options.namespace, page_size)
    return request.chain


def _load_of(request: Request) -> PrefixLoad | RequestLookup:
    assert request.load is not None, request
    return request.load
