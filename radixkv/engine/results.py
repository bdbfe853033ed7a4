"""What an engine reports: the progress of requests, and statistics."""

from __future__ import annotations

from typing import NamedTuple

from radixkv.cache.cache_stats import CacheStats, SizeEstimate
from radixkv.engine.request import Progress, RequestOutput


class Outbox:
    """Collects the progress of one request until its reader takes it.

    What was not taken yet is joined, so a slow reader costs no more memory than the output itself. Not thread-safe.

    >>> outbox = Outbox()
    >>> outbox.put(Progress(3, [7], "to", None)), outbox.put(Progress(3, [8], " be", None))
    (None, None)
    >>> outbox.take()
    Progress(request_id=3, token_ids=[7, 8], text='to be', output=None)
    >>> outbox.take() is None
    True
    """

    def __init__(self) -> None:
        self._pending: list[Progress] = []

    def put(self, progress: Progress) -> None:
        """Add what a step brought. O(1)."""
        self._pending.append(progress)

    def take(self) -> Progress | None:
        """All progress since the last call, joined; None if there is none. O(tokens)."""
        pending, self._pending = self._pending, []
        if len(pending) <= 1:
            return pending[0] if pending else None
        return Progress(
            pending[0].request_id,
            [token_id for progress in pending for token_id in progress.token_ids],
            "".join(progress.text for progress in pending),
            pending[-1].output,
        )


class FinishedOutbox:
    """Collects the outputs of several requests, in the order in which they end. Not thread-safe."""

    def __init__(self) -> None:
        self._outputs: list[RequestOutput] = []

    def put(self, progress: Progress) -> None:
        """Keep the output if this is the request's last progress. O(1)."""
        if progress.output is not None:
            self._outputs.append(progress.output)

    def take(self) -> list[RequestOutput]:
        """The outputs that came since the last call."""
        outputs, self._outputs = self._outputs, []
        return outputs


class EngineStats(NamedTuple):
    """What the engine holds now, and what it did since it was made.

    `computed_tokens` went through the model; `generated_tokens` were sampled; `retractions` counts how often a
    running request had its pages taken back. `peak_used_pages` includes unused prefixes that are kept.
    `kv_bytes_per_token` counts a token that every layer keeps; `pool_bytes` is the size of the KV pool.
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
        """Pages that hold nothing."""
        return self.cache.free_pages

    @property
    def evictable_pages(self) -> int:
        """Pages of cached prefixes that no request reads."""
        return self.cache.evictable_tokens // self.cache.page_size

    @property
    def protected_pages(self) -> int:
        """Pages of cached prefixes that running requests read."""
        return self.cache.protected_tokens // self.cache.page_size
