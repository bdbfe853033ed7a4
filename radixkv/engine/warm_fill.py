"""Fills an empty pool with what a store holds, while nothing else needs the pages."""

from __future__ import annotations

import time

from radixkv.cache.prefix_cache import PrefixCache
from radixkv.engine.beside_pages import PoolBytes
from radixkv.tiers.warm_start import WarmRun, WarmStart, seconds_left


class WarmFill:
    """Puts the runs of a `WarmStart` into the cache, one a step. It takes free pages alone, and evicts nothing.

    Attributes:
        pages: so many were filled.
    """

    def __init__(self, start: WarmStart, cache: PrefixCache, page_bytes: PoolBytes) -> None:
        self._start, self._cache, self._page_bytes = start, cache, page_bytes
        self._filled: list[WarmRun] = []
        self.pages = 0

    @property
    def has_work(self) -> bool:
        """Whether `step` would do something."""
        return self._start.has_run or self._start.is_over  # at the end of which a step takes note

    def step(self) -> bool:
        """Fill pages with one run, if one was read. Returns False once nothing more comes."""
        run = self._start.take()
        if run is not None and not self._fill(run):
            self._start.stop()
        if not self._start.is_over:
            return True
        self._put_in_order()
        return False

    def close(self, timeout_s: float) -> bool:
        """Fill nothing more. Returns False if the store hangs."""
        return self._start.close(timeout_s)

    def _fill(self, run: WarmRun) -> bool:
        """Returns False if no free page is left."""
        cache, page_size = self._cache, self._cache.page_size
        num_pages = cache.pages_for(len(run.ids))
        if cache.num_pages - cache.used_pages < len(run.payloads) + 1:
            return False
        extra_key, cache_salt = run.namespace
        if (
            cache.peek(run.ids, extra_key=extra_key, cache_salt=cache_salt)
            < (num_pages - len(run.payloads)) * page_size
        ):
            return True  # what comes before it is not there
        with cache.resume(
            run.ids,
            extra_key=extra_key,
            cache_salt=cache_salt,
            priority=run.facts.priority,
            keep_for_s=seconds_left(run.facts, time.time()),
        ) as lease:
            first = max(lease.cached_tokens // page_size, num_pages - len(run.payloads))
            payloads = run.payloads[first - num_pages :] if first < num_pages else []
            if payloads:
                self._page_bytes.write(lease.pages[first:], payloads)
            lease.commit(run.ids)
            lease.recall_hits(run.facts.hits)
            self.pages += len(payloads)
        self._filled.append(run._replace(payloads=[]))
        return True

    def _put_in_order(self) -> None:
        """Use what was filled once more, the hottest last: so it is evicted last."""
        for run in reversed(self._filled):
            extra_key, cache_salt = run.namespace
            with self._cache.reading(run.ids, extra_key=extra_key, cache_salt=cache_salt):
                pass
        self._filled.clear()
