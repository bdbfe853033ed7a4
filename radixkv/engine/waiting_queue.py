"""Requests that wait, and which of them goes first."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterator
from itertools import islice

from sortedcontainers import SortedDict

from radixkv.cache.prefix_cache import PrefixCache
from radixkv.cache.watch import PrefixWatch
from radixkv.engine.request import Request
from radixkv.engine.resolved_config import ResolvedConfig

LPM_WINDOW = 256  # the oldest waiting requests that compete for the longest prefix
MOST_REFRESHED = 32  # prompts that are looked up anew in one step, each at O(tokens)


class WaitingQueue:
    """Waiting requests in order of arrival; `candidates` names those to be admitted next.

    Under "lpm" the longest cached prefix goes first, but for requests that were retracted, and those that `max_skips`
    later ones have overtaken, so that none starves. Under "fcfs" the order is that of arrival.

    What a step costs does not grow with the number of requests: the oldest `LPM_WINDOW` compete, and of those the
    prompts are looked up in which something has changed, `MOST_REFRESHED` at most. O(log waiting) to add or remove.
    """

    def __init__(self, config: ResolvedConfig, cache: PrefixCache) -> None:
        self._cache = cache
        self._prefix_cache = config.prefix_cache
        self._by_prefix = config.prefix_cache and config.schedule_policy == "lpm"
        self._max_skips = config.max_skips
        self._requests: SortedDict[int, Request] = SortedDict()  # by id, which grows with arrival
        self._watches: dict[int, PrefixWatch] = {}  # of those that compete
        self._last_looked_up = -1
        self._retracted: set[int] = set()
        self._overtakers: list[int] = []  # ids of the admitted that are younger than the oldest here, sorted
        self._skipped_before: dict[int, int] = {}  # overtakers that were here before a request came

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        """In order of arrival."""
        return iter(self._requests.values())

    def __contains__(self, request: Request) -> bool:
        return request.id in self._requests

    def find(self, request_id: int) -> Request | None:
        """The request of that id; None if it does not wait. O(1)."""
        request: Request | None = self._requests.get(request_id)
        return request

    def add(self, request: Request) -> None:
        """Let `request` wait."""
        self._requests[request.id] = request
        if request.retractions:
            self._retracted.add(request.id)
        if skips := self._younger_admitted(request.id):
            self._skipped_before[request.id] = skips

    def remove(self, request: Request) -> None:
        """It waits no more, and was not admitted."""
        del self._requests[request.id]
        self._watches.pop(request.id, None)
        self._skipped_before.pop(request.id, None)
        self._retracted.discard(request.id)
        oldest = next(iter(self._requests), None)
        del self._overtakers[: len(self._overtakers) if oldest is None else bisect_right(self._overtakers, oldest)]

    def admitted(self, request: Request) -> None:
        """It waits no more; the older ones were overtaken once more."""
        insort(self._overtakers, request.id)
        self.remove(request)

    def candidates(self) -> list[Request]:
        """Those that compete to be admitted, the first one in front."""
        window = list(islice(self._requests.values(), LPM_WINDOW))
        if not self._by_prefix:
            return window
        self._look_up(window)
        urgent: list[Request] = []
        if self._retracted or len(self._overtakers) >= self._max_skips:
            urgent = [request for request in window if self._goes_first(request)]
            window = [request for request in window if not self._goes_first(request)]
        window.sort(key=self.known_tokens, reverse=True)  # stable: then by age
        return urgent + window

    def known_tokens(self, request: Request) -> int:
        """How many leading tokens of `request` were cached when it was last looked up. O(1)."""
        watch = self._watches.get(request.id)
        return 0 if watch is None else watch.cached_tokens

    def cached_tokens(self, request: Request) -> int:
        """How many leading tokens `request` would find cached now. O(1) if nothing has changed there."""
        if not self._prefix_cache:
            return 0
        watch = self._watches.get(request.id)
        if watch is None:
            extra_key, cache_salt = request.cache_options.namespace
            watch = self._cache.watch(request.findable_ids, extra_key=extra_key, cache_salt=cache_salt)
            self._watches[request.id] = watch
        elif not watch.is_current():
            watch.refresh()
        return watch.cached_tokens

    def _look_up(self, window: list[Request]) -> None:
        """Look up what has changed; where that is too much for one step, the next one goes on from there."""
        stale = [r for r in window if (watch := self._watches.get(r.id)) is None or not watch.has_same_pages()]
        if len(stale) > MOST_REFRESHED:
            start = next((i for i, request in enumerate(stale) if request.id > self._last_looked_up), 0)
            stale = [*stale[start:], *stale[:start]][:MOST_REFRESHED]
            self._last_looked_up = stale[-1].id
        for request in stale:
            self.cached_tokens(request)

    def _goes_first(self, request: Request) -> bool:
        skips = self._younger_admitted(request.id) - self._skipped_before.get(request.id, 0)
        return skips >= self._max_skips or request.retractions > 0

    def _younger_admitted(self, request_id: int) -> int:
        return len(self._overtakers) - bisect_right(self._overtakers, request_id)
