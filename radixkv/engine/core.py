"""The engine's core: stepped by the driver that owns it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.insight.explanation import Explanation
from radixkv.cache.namespace import Namespace
from radixkv.cache.prefix_cache import PrefixCache
from radixkv.cache.quotas.accounts import QuotaKey, checked_quotas
from radixkv.cache.token_ids import TokenIds
from radixkv.config import CacheQuota
from radixkv.engine.assembly import EngineParts
from radixkv.engine.executor import Executor
from radixkv.engine.lower_tiers import LowerTiers
from radixkv.engine.outputs import Progress
from radixkv.engine.request import Request
from radixkv.engine.results import EngineStats, ResetCache
from radixkv.engine.runner import nothing
from radixkv.engine.scheduler import Scheduler
from radixkv.engine.span import Span
from radixkv.engine.tier_stores import watches
from radixkv.errors import ClosedError
from radixkv.memory.req_to_token import ReqToTokenPool
from radixkv.publish.publisher import EventPublisher, EventSources
from radixkv.tiers.arrivals import Arrivals


class EngineCore:
    """Runs requests step by step, and reports what each step brought them.

    It has no lock, catches no signal and waits for nothing: one driver at a time calls it. `Engine` drives a core
    within the calls of its users; `AsyncEngine` gives it a thread of its own.

    Invariants, proved by `check_invariants`: those of the scheduler and the cache, and every request that was added and
    whose last progress was not reported is waiting, running, or will be reported by the next `step`.
    """

    def __init__(self, parts: EngineParts) -> None:
        self._parts = parts
        config = parts.config
        table = ReqToTokenPool(
            max_requests=min(config.max_running_requests, parts.cache.num_pages),  # each holds a page at least
            max_tokens=config.max_context_tokens,
            page_size=config.page_size,
        )
        self._tiers = LowerTiers(
            parts.stores,
            parts.pool,
            parts.cache,
            config.tier_writes,
            states=parts.states,
            max_write_bytes_s=None if config.tier_write_mb_s is None else config.tier_write_mb_s * 1e6,
            warm_start_share=config.warm_start_share,
            clock=parts.clock,
        )
        self._clock = parts.clock
        self._speculation = parts.speculation
        self._scheduler = Scheduler(config, parts.cache, table, self._tiers, self._speculation, parts.step_times)
        self._executor = Executor(
            parts.runner, self._scheduler, parts.sampler, parts.device_sampler, self._speculation, parts.step_times
        )
        self._steps = self._peak_used_pages = 0
        self._closed = False
        self._publisher: EventPublisher | None = None
        if config.kv_events is not None:
            self._publish(config.kv_events)

    @property
    def cache(self) -> PrefixCache:
        """Which prefixes are cached in which pages."""
        return self._parts.cache

    @property
    def event_sources(self) -> EventSources | None:
        """Where events of the cache are published; None without `kv_events`."""
        return None if self._publisher is None else self._publisher.sources

    @property
    def has_work(self) -> bool:
        """Whether a step would do something now. If not, and `waits_for_tiers`, it would once a load has come."""
        return self._scheduler.has_work

    @property
    def waits_for_tiers(self) -> bool:
        """Whether requests load what lies below the pool; `arrivals` tells when something came."""
        return bool(self._scheduler.loading)

    @property
    def arrivals(self) -> Arrivals:
        """What its tiers brought so far: a driver without work waits for more, for `wait_s` at most."""
        return self._tiers.arrivals

    @property
    def wait_s(self) -> float | None:
        """Seconds until a step has something to do although nothing came; None if that is never."""
        return self._tiers.wait_s(self._scheduler.loading)

    @property
    def requests(self) -> list[Request]:
        """Requests that have not ended: those that run, those that load, then those that wait for pages."""
        return self._scheduler.requests

    @property
    def num_waiting(self) -> int:
        """Requests that were added and hold no pages."""
        return len(self._scheduler.waiting)

    def add(self, request: Request) -> None:
        """Queue a request; its progress comes from the next steps. Raises: ClosedError."""
        self._check_open()
        self._scheduler.add(request)

    def abort(self, request_id: int) -> list[Progress]:
        """End a waiting or running request now, with all its choices; its pages are free or evictable after this.

        Args:
            request_id: of any of its choices.

        Returns: the last progress of each choice that waited or ran, whose output has the reason "abort".
        Raises: ClosedError.
        """
        self._check_open()
        progress = [self._abort(request) for request in self._scheduler.find_choices(request_id)]
        return [piece for piece in progress if piece is not None]

    def step(self, on_compute: Callable[[], object] = nothing) -> list[Progress]:
        """Run one batch: schedule, compute, choose tokens, and end what is done.

        Args:
            on_compute: as in `Runner.run`; not called if nothing is computed.

        Returns: what the step brought each request, in the order of the batch; empty if there was nothing to do.
        Raises: ClosedError. A request that fails ends with its error in its output; the others go on.
        """
        self._check_open()
        started_at, busy_s = self._clock(), self._tiers.busy_s
        batch = self._executor.step(on_compute)
        if self._tiers.learns_speed:
            self._note_speed(batch, self._clock() - started_at - (self._tiers.busy_s - busy_s))
        if batch:
            self._steps += 1
            self._peak_used_pages = max(self._peak_used_pages, self._parts.cache.used_pages)
        requests = {span.request.id: span.request for span in batch}
        for request in list(requests.values()):
            if request.is_finished:
                self._scheduler.release(request)
        requests |= {request.id: request for request in self._scheduler.take_ended()}
        progress = [request.take_progress() for request in requests.values()]
        return [piece for piece in progress if piece is not None]

    def stats(self) -> EngineStats:
        """What the core holds now, and what it did since it was made."""
        return EngineStats(
            cache=self._parts.cache.stats(),
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            loading=len(self._scheduler.loading),
            tiers=self._tiers.stats(),
            tiers_busy_s=self._tiers.busy_s,
            steps=self._steps,
            computed_tokens=self._executor.computed_tokens,
            generated_tokens=self._executor.generated_tokens,
            retractions=self._scheduler.num_retractions,
            peak_used_pages=self._peak_used_pages,
            kv_bytes_per_token=self._parts.kv_bytes_per_token,
            pool_bytes=self._parts.pool.num_bytes,
            sampled_steps=self._executor.sampled_steps,
            forced_tokens=self._executor.forced_tokens,
            speculation=None if self._speculation is None else self._speculation.stats(),
            state_pool_bytes=0 if self._parts.states is None else self._parts.states.num_bytes,
        )

    def set_quotas(self, quotas: Mapping[QuotaKey, CacheQuota]) -> None:
        """Guarantee shares of the pool and the disk to namespaces, in place of what was guaranteed before.

        Raises: as `PrefixCache.set_quotas`; ConfigError if more of the disk is guaranteed than there is; ClosedError.
        """
        self._check_open()
        checked = checked_quotas(quotas)
        self._tiers.check_quotas(checked)
        self._parts.cache.set_quotas(quotas)
        self._tiers.set_quotas(checked)

    def reset_cache(self) -> ResetCache:
        """Forget every prefix that no running request reads. O(nodes). Raises: ClosedError."""
        self._check_open()
        cache = self._parts.cache
        held = _tokens_in(cache)
        cache.reset()
        kept = _tokens_in(cache)
        return ResetCache(held - kept, kept)

    def explain(self, ids: TokenIds, namespace: Namespace, *, as_admin: bool = False) -> Explanation:
        """As `PrefixCache.explain` or `explain_as_admin`, with what lies below. Raises: as these; ClosedError."""
        self._check_open()
        cache = self._parts.cache
        explain = cache.explain_as_admin if as_admin else cache.explain
        explanation = explain(ids, extra_key=namespace.extra_key, cache_salt=namespace.cache_salt)
        below = self._tiers.below(ids, namespace, explanation.cached_tokens)
        return explanation._replace(below=tuple(below))

    def keep(self, ids: TokenIds, keep_for_s: float, namespace: Namespace) -> int:
        """As `PrefixCache.keep`. Raises: as this; ClosedError."""
        self._check_open()
        cache = self._parts.cache
        return cache.keep(ids, keep_for_s, extra_key=namespace.extra_key, cache_salt=namespace.cache_salt)

    @property
    def is_warm(self) -> bool:
        """Whether nothing more comes from the tiers to fill the pool at its start."""
        return self._tiers.is_warm

    def hand_down(self, ids: NDArray[np.int32], namespace: Namespace) -> int:
        """Hand what the pool holds of `ids` down to the tiers. Returns how many pages are not stored yet.

        Raises: ClosedError.
        """
        self._check_open()
        return self._tiers.hand_down(ids, namespace)

    def flush_tiers(self, timeout_s: float) -> bool:
        """Wait until what was handed down to the tiers is written. Returns False if it took too long.

        Safe to call from any thread. Raises: ClosedError.
        """
        self._check_open()
        return self._tiers.flush(timeout_s)

    def close(self) -> list[Progress]:
        """Abort all requests and forget the cache. Idempotent.

        Returns: the last progress of each request that had not ended.
        """
        if self._closed:
            return []
        progress = [self._abort(request) for request in self._scheduler.requests]
        self._tiers.close()
        self._parts.cache.reset()
        if self._publisher is not None:
            self._publisher.close()
        self._closed = True
        return [piece for piece in progress if piece is not None]

    def check_invariants(self) -> None:
        """Prove the invariants of the cache and the scheduler. For tests. Raises: InvariantError."""
        self._parts.cache.check_invariants()
        self._scheduler.check_invariants()

    def _note_speed(self, batch: Sequence[Span], seconds: float) -> None:
        """Tell the tiers how long the prompts of a step took to compute."""
        chunks = [span for span in batch if span.first < len(span.request.prompt_ids)]
        num_tokens = sum(span.last - span.first for span in chunks)
        if 4 * num_tokens >= 3 * sum(span.last - span.first for span in batch):
            for span in chunks:
                share = (span.last - span.first) / num_tokens
                self._tiers.computed(span.first, span.last, seconds * share)

    def _publish(self, endpoint: str) -> None:
        """Publish what the cache and its tiers hold. Raises: ConfigError if an address is taken."""
        config, cache = self._parts.config, self._parts.cache
        try:
            self._publisher = EventPublisher(
                cache,
                endpoint,
                tiers=watches(self._parts.stores),
                replay_endpoint=config.kv_events_replay,
                topic=config.kv_events_topic,
            )
        except BaseException:
            self._tiers.close()
            raise
        weakref.finalize(self, self._publisher.close)  # of a core that is dropped without `close`

    def _abort(self, request: Request) -> Progress | None:
        request.finish("abort")
        self._scheduler.release(request)
        return request.take_progress()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the engine was closed; make a new one")


def _tokens_in(cache: PrefixCache) -> int:
    """Tokens that are cached, to the token."""
    return sum(node.num_tokens for _, node in cache.nodes())
