"""Hands pages of the pool down to the tiers below it."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.events import Event, Removed
from radixkv.cache.namespace import Namespace
from radixkv.cache.page_keys import tail_key
from radixkv.cache.prefix_cache import PrefixCache
from radixkv.cache.token_ids import TOKEN_BYTES
from radixkv.config import TierWrites
from radixkv.engine.beside_pages import BesidePages, PoolBytes
from radixkv.engine.loading import chain_of
from radixkv.engine.request import Request
from radixkv.memory.window_bytes import WindowBytes
from radixkv.tiers.page_chain import PageChain, as_bytes
from radixkv.tiers.page_store import PageFacts
from radixkv.tiers.run_copies import RunCopies
from radixkv.tiers.state_copies import StateCopies
from radixkv.tiers.tier import Tier
from radixkv.tiers.writer import PageRecord


class HandDown:
    """Copies pages for the writers of the tiers, in the engine's thread: a memcpy, bounded by their queues.

    - "through": what a request computed, whole pages after each chunk of its prompt, and the rest when it ends;
    - "selective": what a request found cached, when it ends: pages that were used a second time;
    - "back": what is evicted, before its pages go to others; and what is left when the engine is closed.

    Pages that a tier has, or that wait for its writer, are not copied again.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        page_bytes: PoolBytes,
        cache: PrefixCache,
        writes: TierWrites,
        *,
        beside: BesidePages | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._tiers, self._page_bytes, self._writes = tiers, page_bytes, writes
        self._cache, self._page_size = cache, cache.page_size
        self._runs = RunCopies(tiers, page_bytes, cache, wall_clock=wall_clock)
        self._beside = beside
        self._states = None if beside is None else StateCopies(beside, cache.page_size)
        self._busy_s = 0.0
        if writes == "back":
            cache.add_observer(self._observe)

    @property
    def busy_s(self) -> float:
        """Seconds of the engine's time that it took."""
        return self._busy_s + self._runs.busy_s

    def shared(self, request: Request) -> None:
        """A request has shared what it computed so far, and may go on."""
        if self._writes == "through":
            self._hand_down(request, is_end=False)

    def ends(self, request: Request) -> None:
        """A request has shared what it computed, and is about to give its pages back."""
        if self._writes != "back":
            self._hand_down(request, is_end=True)

    def prefix(self, ids: NDArray[np.int32], namespace: Namespace) -> int:
        """Hand down what the pool holds of `ids`. Returns how many pages are not stored, whether they wait or not."""
        return self._runs.prefix(ids, namespace).missing + self._states_of_prefix(ids, namespace)

    def close(self) -> None:
        """Hand down what would be lost, parents first."""
        if self._writes == "back":
            for node, run in self._cache.cached_runs():
                self._runs.leaves(run, self._runs.facts(node.hits, node.priority, node.keep_until, run.namespace))

    # -- pages of a request ------------------------------------------------------------------------------------------

    def _hand_down(self, request: Request, *, is_end: bool) -> None:
        started_at = time.perf_counter()
        lease, _ = request.running()
        num_tokens = request.num_shared
        if self._writes == "selective":
            num_tokens = min(num_tokens, lease.cached_tokens)
            if self._states is None:  # else a state stands there, and is of no use without the last tokens
                num_tokens = num_tokens // self._page_size * self._page_size
        num_pages = num_tokens // self._page_size
        chain_of(request, self._page_size).grow(request.computed_ids[: num_pages * self._page_size])
        facts: list[PageFacts] = []
        for tier in self._tiers:
            first = self._first_missing(tier, request, num_pages)
            wanted = [page for page in range(first, num_pages) if not self._is_queued(tier, request, page)]
            if is_end and num_tokens % self._page_size and self._wants_tail(tier, request, num_pages):
                wanted.append(num_pages)
            accepted = wanted[: tier.writer.num_accepted()]
            facts = facts or self._facts_of_pages(request, num_pages + 1)
            if accepted:
                self._copy(tier, request, accepted, num_tokens, facts)
            request.handed_pages[tier.name] = wanted[len(accepted)] if len(accepted) < len(wanted) else num_pages
            self._hand_down_states(tier, request, num_tokens, facts, is_end=is_end)
            if is_end:
                tier.writer.dropped(len(wanted) - len(accepted))
                self._touch(tier, request, min(request.stored_pages[tier.name], num_pages), facts)
        self._busy_s += time.perf_counter() - started_at

    def _hand_down_states(
        self, tier: Tier, request: Request, num_tokens: int, facts: Sequence[PageFacts], *, is_end: bool
    ) -> None:
        """Copy the states (or window pages) after the first `num_tokens` tokens that are new; at the end all from those
        on that the request found.

        Those before were not used, and give way in time.
        """
        if self._states is None or self._beside is None:
            return
        lease, _ = request.running()
        if not is_end and isinstance(self._beside, WindowBytes):  # the last page goes when it is full
            num_tokens -= num_tokens % self._page_size
        ids, namespace = request.computed_ids[:num_tokens], request.cache_options.namespace
        first = request.handed_states.get(tier.name, 0)
        if is_end:
            first = max(0, lease.cached_tokens - self._cache.sight_tokens)
        kept = self._cache.kept_beside(ids, [lease.pages[: self._cache.pages_for(num_tokens)].data], namespace, first)
        chain = chain_of(request, self._page_size)
        copied = self._states.copy(tier, kept, ids, chain, facts.__getitem__, touches=is_end)
        request.handed_states[tier.name] = num_tokens
        if is_end:
            tier.writer.dropped(copied.refused)

    def _states_of_prefix(self, ids: NDArray[np.int32], namespace: Namespace) -> int:
        """Hand down the states after tokens of `ids`. Returns how many of the pages that hold them are not stored."""
        if self._states is None:
            return 0
        num_held, path = self._cache.cached_path(ids, extra_key=namespace.extra_key, cache_salt=namespace.cache_salt)
        kept = self._cache.kept_beside(ids[:num_held], [node.pages for node in path], namespace, 0)
        ends = [node.end for node in path]

        def facts_of(page: int) -> PageFacts:
            node = path[bisect_right(ends, page * self._page_size)]
            return self._runs.facts(node.hits, node.priority, node.keep_until, namespace)

        chain = PageChain(namespace, self._page_size)
        copied = [self._states.copy(tier, kept, ids[:num_held], chain, facts_of, touches=True) for tier in self._tiers]
        return sum(each.missing for each in copied)

    def _first_missing(self, tier: Tier, request: Request, num_pages: int) -> int:
        """The first page of a request that was not handed down yet and is not stored. O(pages that are new)."""
        first = request.handed_pages.get(tier.name, 0)
        if first < num_pages:
            chain = chain_of(request, self._page_size)
            tokens = as_bytes(request.computed_ids[first * self._page_size : num_pages * self._page_size])
            first += tier.num_stored(chain.parent_key(first), tokens, chain.keys[first:num_pages])
        request.stored_pages.setdefault(tier.name, first)
        return first

    def _is_queued(self, tier: Tier, request: Request, page: int) -> bool:
        return tier.writer.is_queued(chain_of(request, self._page_size).keys[page])

    def _wants_tail(self, tier: Tier, request: Request, page: int) -> bool:
        """Whether the end of a request, in its page number `page`, is to be stored, too."""
        tokens = self._tokens_of(request, page, request.num_shared)
        parent_key = chain_of(request, self._page_size).parent_key(page)
        return not tier.has_tail(parent_key, tokens, tail_key(parent_key, tokens))

    def _tokens_of(self, request: Request, page: int, num_tokens: int) -> bytes:
        first = page * self._page_size
        return as_bytes(request.computed_ids[first : min(first + self._page_size, num_tokens)])

    def _copy(
        self, tier: Tier, request: Request, numbers: Sequence[int], num_tokens: int, facts: Sequence[PageFacts]
    ) -> None:
        """Copy pages of a request, of which `num_tokens` tokens are shared, for the tier's writer."""
        chain = chain_of(request, self._page_size)
        records = []
        for page in numbers:
            tokens, parent_key = self._tokens_of(request, page, num_tokens), chain.parent_key(page)
            key = chain.keys[page] if page < len(chain.keys) else tail_key(parent_key, tokens)
            records.append(PageRecord(key, parent_key, tokens, facts[page]))
        lease, _ = request.running()
        last_tokens = len(records[-1].tokens) // TOKEN_BYTES
        tier.writer.hand_down(records, self._page_bytes.read(lease.pages[list(numbers)], last_tokens=last_tokens))

    def _touch(self, tier: Tier, request: Request, num_pages: int, facts: Sequence[PageFacts]) -> None:
        """Bring the facts of the first pages of a request up to date in the tier."""
        chain = chain_of(request, self._page_size)
        pages = range(num_pages)
        tier.writer.touch(
            [
                (chain.parent_key(page), self._tokens_of(request, page, request.num_computed), facts[page])
                for page in pages
            ]
        )

    def _facts_of_pages(self, request: Request, num_pages: int) -> list[PageFacts]:
        """The facts of the first pages of a request; those that the tree has not are as the last one that it has."""
        lease, _ = request.running()
        namespace = request.cache_options.namespace
        facts: list[PageFacts] = []
        for node in lease.whole_path():
            of_node = self._runs.facts(node.hits, node.priority, node.keep_until, namespace)
            facts += [of_node] * (node.end // self._page_size - len(facts))
        last = facts[-1] if facts else self._runs.facts(0, request.cache_options.priority, 0.0, namespace)
        return facts + [last] * (num_pages - len(facts))

    # -- pages that are evicted --------------------------------------------------------------------------------------

    def _observe(self, event: Event) -> None:
        if isinstance(event, Removed) and event.medium == "pool" and event.cause == "evicted":
            facts = self._runs.facts(event.hits, event.priority, event.keep_until, event.run.namespace)
            self._runs.leaves(event.run, facts)
