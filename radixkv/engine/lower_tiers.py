"""What lies below the pool, as the scheduler and the core see it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence

from radixkv.cache.insight.explanation import BelowPool
from radixkv.cache.namespace import Namespace
from radixkv.cache.prefix_cache import PrefixCache
from radixkv.cache.token_ids import TokenIds, token_array
from radixkv.config import CacheQuota, TierWrites
from radixkv.engine.beside_pages import beside_pages, pool_bytes
from radixkv.engine.handing_down import HandDown
from radixkv.engine.kv_memory import Pool
from radixkv.engine.loading import Loader
from radixkv.engine.request import Request
from radixkv.engine.tier_shares import check_tier_shares, set_tier_shares
from radixkv.engine.warm_fill import WarmFill
from radixkv.errors import ConfigError
from radixkv.memory.state_pool import StatePool
from radixkv.tiers.arrivals import Arrivals
from radixkv.tiers.ending import CLOSE_TIMEOUT_S, Ending
from radixkv.tiers.page_store import PageStore
from radixkv.tiers.tier import Tier, TierStats
from radixkv.tiers.warm_start import WarmStart

logger = logging.getLogger(__name__)


class LowerTiers:
    """The tiers below a pool: what requests load from them, and what goes down to them. The fastest comes first.

    Belongs to the engine's thread; what blocks runs in the threads of the tiers. Of an engine without tiers it does
    nothing.
    """

    def __init__(
        self,
        stores: Sequence[PageStore],
        pool: Pool | None,
        cache: PrefixCache | None,
        writes: TierWrites = "through",
        *,
        states: StatePool | None = None,
        max_write_bytes_s: float | None = None,
        warm_start_share: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        close_timeout_s: float = CLOSE_TIMEOUT_S,
    ) -> None:
        """Takes over `stores`, and closes them in the end.

        Args:
            states: those of recurrent layers, if there are any. The pool is not filled at the start then, nor where
                layers see a window.

        Raises: ConfigError if they do not fit the pool.
        """
        self.arrivals = Arrivals()
        self._close_timeout_s = close_timeout_s
        self._tiers: list[Tier] = []
        self._loader: Loader | None = None
        self._down: HandDown | None = None
        self._warm: WarmFill | None = None
        self._ending: Ending | None = None
        if not stores or pool is None or cache is None:
            return
        page_bytes = pool_bytes(pool)
        for store in stores:
            _check_fits(store, cache.page_size, page_bytes.payload_bytes)
        self._tiers = [Tier(store, self.arrivals, max_write_bytes_s=max_write_bytes_s, clock=clock) for store in stores]
        warm_starts: list[WarmStart] = []
        self._ending = Ending(self, self._tiers, warm_starts)
        beside = beside_pages(pool, cache, states, page_bytes.payload_bytes)
        self._loader = Loader(self._tiers, page_bytes, cache.page_size, beside=beside, clock=clock)
        self._down = HandDown(self._tiers, page_bytes, cache, writes, beside=beside)
        warm_pages = int(warm_start_share * cache.num_pages) if beside is None else 0
        for store in stores:
            if store.name == "disk" and warm_pages:  # what the host's memory holds is gone, the others' is not ours
                warm_starts.append(WarmStart(store, warm_pages, self.arrivals))
                self._warm = WarmFill(warm_starts[-1], cache, page_bytes)

    @classmethod
    def none(cls) -> LowerTiers:
        """No tiers."""
        return cls((), None, None)

    @property
    def busy_s(self) -> float:
        """Seconds of the engine's time that copying to and from the tiers took so far."""
        if self._loader is None or self._down is None:
            return 0.0
        return self._loader.busy_s + self._down.busy_s

    def check_quotas(self, quotas: Mapping[Namespace, CacheQuota]) -> None:
        """Raises: ConfigError if `set_quotas` would."""
        check_tier_shares(self._stores(), quotas)

    def set_quotas(self, quotas: Mapping[Namespace, CacheQuota]) -> None:
        """Guarantee shares of the disk and of host memory to namespaces, in place of what was guaranteed before.

        Raises: ConfigError.
        """
        set_tier_shares(self._stores(), quotas)

    def _stores(self) -> list[PageStore]:
        return [tier.store for tier in self._tiers]

    def begin_load(self, request: Request) -> bool:
        """Begin to load what lies below for a request that was just given its pages. Returns False if nothing is to be
        waited for.
        """
        return self._loader is not None and self._loader.begin(request)

    def receive(self, request: Request) -> bool:
        """Copy what has arrived for a request that loads. Returns True once it waits no more."""
        assert self._loader is not None, "nothing can be loading"
        return self._loader.receive(request)

    def end_load(self, request: Request) -> None:
        """Let a request wait no more. Idempotent."""
        if self._loader is not None:
            self._loader.end(request)

    def have_news(self, loading: Sequence[Request]) -> bool:
        """Whether something came for one of the requests that load, or one has waited long enough. O(loading)."""
        return self._loader is not None and any(map(self._loader.has_news, loading))

    def wait_s(self, loading: Sequence[Request]) -> float | None:
        """Seconds until one of these requests has waited long enough; None if there is none."""
        return self._loader.wait_s(loading) if self._loader is not None and loading else None

    def shared(self, request: Request) -> None:
        """A request has shared what it computed so far, and may go on."""
        if self._down is not None:
            _without_raising(self._down.shared, request)

    def ends(self, request: Request) -> None:
        """A request has shared what it computed, and is about to give its pages back."""
        if self._down is not None:
            _without_raising(self._down.ends, request)

    def hand_down(self, ids: TokenIds, namespace: Namespace) -> int:
        """Hand down what the pool holds of `ids`, whatever the rule. Returns how many pages are not stored yet."""
        return 0 if self._down is None else self._down.prefix(token_array(ids), namespace)

    @property
    def learns_speed(self) -> bool:
        """Whether `computed` is of use."""
        return self._loader is not None

    def computed(self, first: int, last: int, seconds: float) -> None:
        """The tokens `[first, last)` of a prompt took so long to compute."""
        if self._loader is not None:
            self._loader.prefill.record(first, last, seconds)

    def poll(self) -> None:
        """Do what is to be done now and then: fill some more of an empty pool, take note of probes. O(tiers) else."""
        if self._warm is not None and not self._warm.step():
            self._warm = None
        for tier in self._tiers:
            tier.poll()

    @property
    def is_warm(self) -> bool:
        """Whether nothing more comes to fill the pool at its start."""
        return self._warm is None

    @property
    def has_warm_pages(self) -> bool:
        """Whether `poll` would fill pages of the pool, or find that nothing more comes."""
        return self._warm is not None and self._warm.has_work

    def below(self, ids: TokenIds, namespace: Namespace, cached_tokens: int) -> list[BelowPool]:
        """What each tier holds of `ids` beyond the first `cached_tokens`, which are in the pool. O(tokens)."""
        return [] if self._loader is None else self._loader.below(token_array(ids), namespace, cached_tokens)

    def stats(self) -> tuple[TierStats, ...]:
        """What each tier did so far. O(tiers)."""
        return tuple(tier.stats() for tier in self._tiers)

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that was handed down is written. Returns False if that took too long."""
        return all(tier.writer.flush(timeout_s) for tier in self._tiers)

    def close(self) -> None:
        """Write what is left, and close the stores. One that hangs is left to itself. Idempotent."""
        if self._down is not None:
            self._down.close()
        if self._warm is not None:
            self._warm.close(self._close_timeout_s)
        for tier in self._tiers:
            tier.close(self._close_timeout_s)
        self._loader = self._down = self._warm = None
        if self._ending is not None:
            self._ending.is_done()


def _without_raising(hand_down: Callable[[Request], object], request: Request) -> None:
    """Hand pages of a request down; if that fails they are lost below, and the request goes on."""
    try:
        hand_down(request)
    except Exception:
        logger.exception("what request %d computed cannot be handed down", request.id)


def _check_fits(store: PageStore, page_size: int, payload_bytes: int) -> None:
    if (store.page_size, store.payload_bytes) != (page_size, payload_bytes):
        raise ConfigError(
            f"the pages of the {store.name} tier must hold {page_size} tokens in {payload_bytes} bytes, as the pool's "
            f"do; they hold {store.page_size} in {store.payload_bytes}"
        )
