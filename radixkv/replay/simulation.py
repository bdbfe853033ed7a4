"""What a radix tree of a given capacity and policy would have hit on a trace of requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.eviction.policy import EvictionPolicy
from radixkv.cache.tree.radix_tree import RadixTree
from radixkv.errors import ConfigError
from radixkv.replay.belady import Reuse, measure_reuse, optimal_hit_tokens
from radixkv.replay.traces import Request

BELADY = "belady"
BATCH = 256  # requests that are made ready before the clock starts


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """What one policy did with one capacity.

    Attributes:
        policy: its name.
        capacity_tokens: as it was asked for; a tree holds whole pages or blocks of it.
        num_requests: in the trace.
        query_tokens: tokens of all prompts.
        hit_tokens: those of them that were found in the cache.
        evicted_tokens: tokens in the pages that left the cache.
        elapsed_s: what the cache's work took, without the reading and making of requests.
    """

    policy: str
    capacity_tokens: int
    num_requests: int
    query_tokens: int
    hit_tokens: int
    evicted_tokens: int
    elapsed_s: float

    @property
    def hit_rate(self) -> float:
        """The share of prompt tokens that were found in the cache."""
        return self.hit_tokens / self.query_tokens if self.query_tokens else 0.0

    @property
    def us_per_request(self) -> float:
        """Microseconds a request."""
        return self.elapsed_s / self.num_requests * 1e6 if self.num_requests else 0.0


def replay_trace(
    requests: Iterable[Request],
    policy: str | EvictionPolicy,
    capacity_tokens: int,
    page_size: int = 16,
    *,
    key_tokens: int = 1,
    on_progress: Callable[[int], object] = lambda _: None,
) -> ReplayResult:
    """Run `requests` one after another through a `RadixTree` that holds `capacity_tokens`. O(tokens).

    Each request does what an engine does with it: match the prompt, pin what was found, evict as much as the rest
    needs, insert, unpin. Hits are whole pages. Of a sequence that alone is larger than the capacity the leading pages
    that fit are inserted, so it evicts all else. The tree's clock shows the time of the request that runs.

    Args:
        requests: iterated over once. See `Request.of_tokens`, `read_trace`, `ExpandedBlocks`.
        policy: a name in `radixkv.cache.eviction.policies.POLICIES`, an `EvictionPolicy`, or "belady" for the
            clairvoyant optimum (`radixkv.replay.belady`), which no policy exceeds.
        capacity_tokens: rounded down to whole pages.
        page_size: keys a page.
        key_tokens: tokens that a key stands for: 1 for token ids.
        on_progress: is called with a number of requests that were just done.
    Raises: ConfigError for an unknown policy, or a capacity of less than one page.

    >>> requests = [Request.of_tokens(ids) for ids in ([1, 2, 3, 4], [1, 2, 5, 6], [1, 2, 3, 4])]
    >>> result = replay_trace(requests, "lru", capacity_tokens=4, page_size=2)
    >>> result.hit_tokens, result.evicted_tokens, round(result.hit_rate, 2)
    (4, 4, 0.33)
    """
    if policy == BELADY:
        reuse = measure_reuse(requests, page_size, key_tokens=key_tokens, on_progress=on_progress)
        return replay_optimum(reuse, capacity_tokens, page_size * key_tokens)
    run = _Run(policy, capacity_tokens, page_size, key_tokens)
    remaining = iter(requests)
    while batch := list(islice(remaining, BATCH)):
        run.serve(batch)
        on_progress(len(batch))
    return run.result(capacity_tokens)


def replay_optimum(reuse: Reuse, capacity_tokens: int, page_tokens: int) -> ReplayResult:
    """As `replay` with "belady", from what was measured once for all capacities, in pages of `page_tokens` tokens.

    `evicted_tokens` are all tokens that were computed, but for those that the cache can still hold at the end;
    `elapsed_s` is what finding the optimum took.

    Raises: ConfigError.
    """
    start = perf_counter()
    room = whole_pages(capacity_tokens, page_tokens) * page_tokens
    hit_tokens = optimal_hit_tokens(reuse, room)
    elapsed_s = perf_counter() - start
    computed_tokens = sum(min(tokens, room) for tokens in reuse.stored_tokens) - hit_tokens
    return ReplayResult(
        policy=BELADY,
        capacity_tokens=capacity_tokens,
        num_requests=len(reuse.stored_tokens),
        query_tokens=reuse.num_tokens,
        hit_tokens=hit_tokens,
        evicted_tokens=max(0, computed_tokens - room),
        elapsed_s=elapsed_s,
    )


def whole_pages(capacity_tokens: int, page_tokens: int) -> int:
    """How many pages of `page_tokens` tokens a capacity holds. Raises: ConfigError if it holds none."""
    if capacity_tokens < page_tokens:
        raise ConfigError(f"a capacity of {capacity_tokens} tokens holds no page or block of {page_tokens}")
    return capacity_tokens // page_tokens


class _Run:
    """A tree and what it did so far."""

    def __init__(self, policy: str | EvictionPolicy, capacity_tokens: int, page_size: int, key_tokens: int) -> None:
        self._now_s = 0.0
        self._tree = RadixTree(page_size, policy, clock=lambda: self._now_s)
        self._key_tokens = key_tokens
        self._capacity = whole_pages(capacity_tokens, page_size * key_tokens) * page_size  # in keys, as the tree counts
        self._num_requests = self._query_tokens = self._hit_tokens = self._evicted_pages = 0
        self._elapsed_s = 0.0

    def serve(self, batch: Sequence[Request]) -> None:
        """Run requests, and take the time."""
        most_keys = max(len(request.stored) for request in batch)
        pages = np.zeros(most_keys // self._tree.page_size, np.int32)  # the tree never asks whether a page is in use
        self._num_requests += len(batch)
        self._query_tokens += sum(request.num_tokens for request in batch)
        start = perf_counter()
        self._serve(batch, pages)
        self._elapsed_s += perf_counter() - start

    def _serve(self, batch: Sequence[Request], pages: NDArray[np.int32]) -> None:
        tree, capacity = self._tree, self._capacity
        page_size, key_tokens = tree.page_size, self._key_tokens
        for keys, stored, num_tokens, time_s in batch:
            if time_s > self._now_s:  # a trace that is not in order must not turn the clock back
                self._now_s = time_s
            found = tree.match_prefix(keys)
            tree.inc_lock_ref(found.node)
            self._hit_tokens += min(found.length * key_tokens, num_tokens)  # the last block may be partial
            num_keys = min(len(stored) // page_size * page_size, capacity)
            missing = tree.total_size - found.length + num_keys - capacity
            if missing > 0:
                self._evicted_pages += len(tree.evict(missing))
            tree.insert(stored[:num_keys], pages[: num_keys // page_size])
            tree.dec_lock_ref(found.node)

    def result(self, capacity_tokens: int) -> ReplayResult:
        return ReplayResult(
            policy=self._tree.policy.name,
            capacity_tokens=capacity_tokens,
            num_requests=self._num_requests,
            query_tokens=self._query_tokens,
            hit_tokens=self._hit_tokens,
            evicted_tokens=self._evicted_pages * self._tree.page_size * self._key_tokens,
            elapsed_s=self._elapsed_s,
        )
