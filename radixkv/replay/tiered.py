"""What each of several tiers would have given on a trace: the pool, and what lies below it.

Below the pool pages are kept and found as `radixkv.tiers` does it, in LRU order, whatever the pool's policy is. Loads
and writes take no time here, and nothing is dropped: the figures are what the sizes allow, not what a slow disk makes
of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.eviction.policy import EvictionPolicy
from radixkv.cache.tree.radix_tree import RadixTree
from radixkv.config import TierWrites
from radixkv.errors import ConfigError
from radixkv.replay.simulation import BATCH, whole_pages
from radixkv.replay.traces import Request


@dataclass(frozen=True, slots=True)
class TierSize:
    """A tier by name, and how many tokens it holds. The first of several is the pool."""

    name: str
    capacity_tokens: int


@dataclass(frozen=True, slots=True)
class TierUse:
    """What one tier did.

    Attributes:
        name, capacity_tokens: as they were asked for.
        hit_tokens: tokens of prompts that were found there, and in no tier above.
        written_tokens: tokens in the pages that it took.
        evicted_tokens: tokens in the pages that gave way there.
    """

    name: str
    capacity_tokens: int
    hit_tokens: int
    written_tokens: int
    evicted_tokens: int


@dataclass(frozen=True, slots=True)
class TieredResult:
    """What a pool with tiers below it did.

    Attributes:
        policy: the pool's.
        writes: when pages went down.
        num_requests, query_tokens: of the trace.
        tiers: from the pool downwards.
    """

    policy: str
    writes: TierWrites
    num_requests: int
    query_tokens: int
    tiers: tuple[TierUse, ...]

    @property
    def hit_rate(self) -> float:
        """The share of prompt tokens that were found in any tier."""
        return sum(self.share_of(tier) for tier in self.tiers)

    def share_of(self, tier: TierUse) -> float:
        """The share of prompt tokens that one of `tiers` gave."""
        return tier.hit_tokens / self.query_tokens if self.query_tokens else 0.0


def replay_tiers(
    requests: Iterable[Request],
    tiers: Sequence[TierSize],
    policy: str | EvictionPolicy = "lru",
    writes: TierWrites = "through",
    page_size: int = 16,
    *,
    key_tokens: int = 1,
    on_progress: Callable[[int], object] = lambda _: None,
) -> TieredResult:
    """Run `requests` one after another through a pool and the tiers below it. O(tokens × tiers).

    Each request does with the pool what `replay_trace` does. What the pool lacks is looked for below, from the pool's
    end on; what was found is in the pool from then on. Pages go down

    - "through": all that a request stores, when it ends;
    - "selective": what it found in the pool or below, when it ends;
    - "back": when the pool evicts them, with the pages before them.

    Args:
        requests: iterated over once.
        tiers: from the pool downwards.
        policy: the pool's: a name in `radixkv.cache.eviction.policies.POLICIES`, or an `EvictionPolicy`.
        page_size: keys a page.
        key_tokens: tokens that a key stands for: 1 for token ids.
        on_progress: is called with a number of requests that were just done.
    Raises: ConfigError for an unknown policy, no tier, or a tier of less than one page.

    >>> requests = [Request.of_tokens(ids) for ids in ([1, 2, 3, 4], [5, 6, 7, 8], [1, 2, 3, 4], [1, 2, 9, 9])]
    >>> result = replay_tiers(requests, [TierSize("pool", 4), TierSize("disk", 100)], page_size=2)
    >>> [(tier.name, tier.hit_tokens) for tier in result.tiers], result.hit_rate
    ([('pool', 2), ('disk', 4)], 0.375)
    """
    if not tiers:
        raise ConfigError("a replay needs one tier at least, the pool")
    run = _TieredRun(tiers, policy, writes, page_size, key_tokens)
    remaining = iter(requests)
    while batch := list(islice(remaining, BATCH)):
        for request in batch:
            run.serve(request)
        on_progress(len(batch))
    return run.result(tiers)


class _Stored(NamedTuple):
    """Pages that a store took of a sequence, from the page number `first` on, and those that gave way, by their ids."""

    first: int
    taken: range
    evicted: NDArray[np.int32]


class _Store:
    """A tree that makes room for what comes, and counts. A page's id tells when it came."""

    def __init__(self, tree: RadixTree, capacity: int) -> None:
        self._tree, self._capacity = tree, capacity  # in keys
        self._next_page = 0
        self.hit_tokens = self.written_pages = self.evicted_pages = 0

    def peek(self, keys: NDArray[np.int32]) -> int:
        return self._tree.peek(keys)

    def store(self, keys: NDArray[np.int32], stored: NDArray[np.int32]) -> _Stored:
        """Use `keys`, and keep the leading pages of `stored`, which begins with them, as many as fit."""
        tree, page_size = self._tree, self._tree.page_size
        found = tree.match_prefix(keys)
        tree.inc_lock_ref(found.node)
        num_keys = min(len(stored) // page_size * page_size, self._capacity)
        missing = tree.total_size - found.length + num_keys - self._capacity
        evicted = tree.evict(missing) if missing > 0 else np.zeros(0, np.int32)
        pages = np.arange(self._next_page, self._next_page + num_keys // page_size, dtype=np.int32)
        first = tree.insert(stored[:num_keys], pages).prefix_len // page_size
        tree.dec_lock_ref(found.node)
        taken = range(self._next_page + first, self._next_page + len(pages))
        self._next_page += len(pages)
        self.written_pages += len(taken)
        self.evicted_pages += len(evicted)
        return _Stored(first, taken, evicted)


class _TieredRun:
    """A pool, the tiers below it, and what they did so far."""

    def __init__(
        self,
        tiers: Sequence[TierSize],
        policy: str | EvictionPolicy,
        writes: TierWrites,
        page_size: int,
        key_tokens: int,
    ) -> None:
        self._now_s = 0.0
        self._key_tokens, self._page_size, self._writes = key_tokens, page_size, writes
        self._stores = [self._new_store(tier, policy if number == 0 else "lru") for number, tier in enumerate(tiers)]
        self._policy_name = policy if isinstance(policy, str) else policy.name
        self._num_requests = self._query_tokens = 0
        self._ends_at: dict[int, tuple[NDArray[np.int32], int]] = {}  # for "back": what a page of the pool ends

    def _new_store(self, tier: TierSize, policy: str | EvictionPolicy) -> _Store:
        tree = RadixTree(self._page_size, policy, clock=lambda: self._now_s)
        return _Store(tree, whole_pages(tier.capacity_tokens, self._page_size * self._key_tokens) * self._page_size)

    def serve(self, request: Request) -> None:
        keys, stored, num_tokens, time_s = request
        self._now_s = max(self._now_s, time_s)  # a trace that is not in order must not turn the clock back
        self._num_requests += 1
        self._query_tokens += num_tokens
        num_found = 0
        for store in self._stores:
            num_here = max(num_found, store.peek(keys))
            store.hit_tokens += self._tokens(num_here, num_tokens) - self._tokens(num_found, num_tokens)
            num_found = num_here
        in_pool = self._stores[0].store(keys, stored)
        if self._writes == "back":
            self._hand_down_evicted(in_pool.evicted)
            for number, page in enumerate(in_pool.taken, in_pool.first + 1):
                self._ends_at[page] = stored, number * self._page_size
        else:
            going_down = stored if self._writes == "through" else keys[:num_found]
            for store in self._stores[1:]:
                store.store(keys[: len(going_down)], going_down)

    def _tokens(self, num_keys: int, num_tokens: int) -> int:
        return min(num_keys * self._key_tokens, num_tokens)  # the last block of a prompt may be partial

    def _hand_down_evicted(self, pages: NDArray[np.int32]) -> None:
        """Store the sequences that `pages` of the pool end, each once, to the end of the last of them."""
        ends: dict[int, tuple[NDArray[np.int32], int]] = {}
        for page in pages.tolist():
            keys, end = self._ends_at.pop(page)
            ends[id(keys)] = keys, max(end, ends[id(keys)][1] if id(keys) in ends else 0)
        for keys, end in ends.values():
            for store in self._stores[1:]:
                store.store(keys[:end], keys[:end])

    def result(self, tiers: Sequence[TierSize]) -> TieredResult:
        page_tokens = self._page_size * self._key_tokens
        return TieredResult(
            policy=self._policy_name,
            writes=self._writes,
            num_requests=self._num_requests,
            query_tokens=self._query_tokens,
            tiers=tuple(
                TierUse(
                    tier.name,
                    tier.capacity_tokens,
                    store.hit_tokens,
                    store.written_pages * page_tokens,
                    store.evicted_pages * page_tokens,
                )
                for tier, store in zip(tiers, self._stores, strict=True)
            ),
        )
