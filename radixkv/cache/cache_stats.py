"""What a prefix cache tells of itself."""

from __future__ import annotations

from typing import NamedTuple

from radixkv.cache.insight.eviction_ages import EvictionAges
from radixkv.cache.quotas.accounts import NamespaceUse


class SizeEstimate(NamedTuple):
    """The token hit rate that the traffic so far would have had in an LRU cache of `capacity_tokens` tokens.

    `factor` is that size in units of the pool's.
    """

    factor: float
    capacity_tokens: int
    hit_rate: float


class CacheStats(NamedTuple):
    """What a `PrefixCache` holds now, and what it did so far.

    `total_tokens = evictable_tokens + protected_tokens` are what the tree's pages have room for; `leased_pages` are
    held by leases only. `hit_tokens` of the `query_tokens` that leases were acquired for were cached; acquisitions that
    were refused, and `resume`, do not count. `copied_tokens` of them came from a page that was shared in
    part; `evicted_tokens` made room for others (what `reset` forgot is not among them).
    Of `window_pages`, which the layers that see a window share, `free_window_pages` are lent to no page, and
    `evictable_window_pages` to cached pages alone; `window_pages_taken_back` counts those that cached pages lost so far
    (all four are 0 where every layer keeps everything).
    Of `states` of recurrent layers that there is room for, `free_states` hold nothing, and `evictable_states` are kept
    by the cache alone; `states_taken_back` counts those that it lost for others' sake so far (all four are 0 where no
    layer keeps a state).
    `estimated_hit_rates` tell, from a sample of the traffic, what pools of other sizes would bring (empty without
    diagnostics). `broken_promise_tokens` of the `evicted_tokens` were to be kept longer (`keep_for_s`), and
    `eviction_ages` tell how long the evicted tokens had not been used (nothing is counted without diagnostics).
    `namespaces` tell what those with a quota hold, and last what all others hold together (empty without quotas).
    """

    num_pages: int
    page_size: int
    free_pages: int
    leased_pages: int
    total_tokens: int
    evictable_tokens: int
    protected_tokens: int
    num_leases: int
    query_tokens: int
    hit_tokens: int
    copied_tokens: int
    evicted_tokens: int
    window_pages: int = 0
    free_window_pages: int = 0
    evictable_window_pages: int = 0
    window_pages_taken_back: int = 0
    states: int = 0
    free_states: int = 0
    evictable_states: int = 0
    states_taken_back: int = 0
    estimated_hit_rates: tuple[SizeEstimate, ...] = ()
    broken_promise_tokens: int = 0
    eviction_ages: EvictionAges = EvictionAges()
    namespaces: tuple[NamespaceUse, ...] = ()

    @property
    def hit_rate(self) -> float:
        """Share of the tokens asked for that were cached; 0 before the first query."""
        return self.hit_tokens / self.query_tokens if self.query_tokens else 0.0

    @property
    def used_pages(self) -> int:
        """Pages in the tree or held by leases."""
        return self.num_pages - self.free_pages
