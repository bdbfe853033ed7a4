"""What the engine gives besides finished outputs: pieces of a stream, and statistics."""

from __future__ import annotations

from typing import NamedTuple

from radixkv.cache.cache_stats import CacheStats, SizeEstimate
from radixkv.engine.request import RequestOutput


class StreamChunk(NamedTuple):
    """A piece of an output that is being generated; `output` is set in the last one."""

    request_id: int
    text: str
    token_ids: list[int]
    output: RequestOutput | None


class EngineStats(NamedTuple):
    """What the engine holds now, and what it did since it was made.

    `computed_tokens` went through the model; `generated_tokens` were sampled; `retractions` counts how often a
    running request had its pages taken back. `peak_used_pages` includes unused prefixes that are kept.
    `kv_bytes_per_token` are those of a token that every layer keeps; `pool_bytes` is the size of the KV pool.
    """

    cache: CacheStats
    running: int
    waiting: int
    steps: int
    computed_tokens: int
    generated_tokens: int
    retractions: int
    peak_used_pages: int
    kv_bytes_per_token: int
    pool_bytes: int

    @property
    def hit_rate(self) -> float:
        """Share of the prompt tokens that were found in the cache."""
        return self.cache.hit_rate

    @property
    def estimated_hit_rates(self) -> tuple[SizeEstimate, ...]:
        """The hit rates that this traffic would have had with pools of other sizes."""
        return self.cache.estimated_hit_rates

    @property
    def free_pages(self) -> int:
        return self.cache.free_pages

    @property
    def evictable_pages(self) -> int:
        return self.cache.evictable_tokens // self.cache.page_size

    @property
    def protected_pages(self) -> int:
        return self.cache.protected_tokens // self.cache.page_size
