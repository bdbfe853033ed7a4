"""Prefixes that were promised to be kept, and whether they were."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from radixkv.engine.async_engine import AsyncEngine
from radixkv.serving.generation import CacheUse, Ids, Keep

MAX_PROMISES = 1024
MAX_BYTES = 16 << 20
CHECKED_AT_A_TIME = 64


class _Promise(NamedTuple):
    prefix: Ids
    use: CacheUse
    until: float


class Promises:
    """Remembers the last promises, and counts those that were broken: evicted before their time, for want of room.

    Belongs to the event loop's thread.
    """

    def __init__(self, engine: AsyncEngine, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: tells seconds."""
        self._engine = engine
        self._clock = clock
        self._open: OrderedDict[tuple[str | None, str | None, bytes], _Promise] = OrderedDict()
        self._num_bytes = 0
        self.num_broken = self.num_held = 0

    @property
    def num_open(self) -> int:
        """Promises that are remembered and whose time is not over."""
        return len(self._open)

    def add(self, keep: Keep, use: CacheUse) -> None:
        """A prefix is kept from now on. The oldest promises are forgotten where there are too many."""
        key = (use.extra_key, use.cache_salt, keep.prefix.tobytes())
        self._forget(key)
        self._open[key] = _Promise(keep.prefix, use, self._clock() + keep.keep_for_s)
        self._num_bytes += len(key[2])
        while len(self._open) > MAX_PROMISES or self._num_bytes > MAX_BYTES:
            self._forget(next(iter(self._open)))

    async def check(self) -> None:
        """Look after the promises that were not looked after for the longest time, 64 of them."""
        for key, promise in list(self._open.items())[:CHECKED_AT_A_TIME]:
            if promise.until <= self._clock():
                self._forget(key)
                self.num_held += 1
                continue
            use = promise.use
            found = await self._engine.explain(promise.prefix, extra_key=use.extra_key, cache_salt=use.cache_salt)
            if self._open.get(key) is not promise:  # made anew meanwhile
                continue
            if found.cached_tokens < len(promise.prefix):
                self._forget(key)
                self.num_broken += 1
            else:
                self._open.move_to_end(key)

    def _forget(self, key: tuple[str | None, str | None, bytes]) -> None:
        if self._open.pop(key, None) is not None:
            self._num_bytes -= len(key[2])
