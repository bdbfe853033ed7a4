"""Requests that wait, and which of them goes first."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Sequence
from functools import partial
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

    What a step costs does not grow with the number of requests: the oldest `LPM_WINDOW` compete, and are kept in order.
    The cache tells which of their prefixes have changed, and of those `MOST_REFRESHED` at most are looked up in a step.
    O(log waiting) to add or remove.
    """

    def __init__(self, config: ResolvedConfig, cache: PrefixCache) -> None:
        self._cache = cache
        self._prefix_cache = config.prefix_cache
        self._by_prefix = config.prefix_cache and config.schedule_policy == "lpm"
        self._max_skips = config.max_skips
        self._requests: SortedDict[int, Request] = SortedDict()  # by id, which grows with arrival
        self._watches: dict[int, PrefixWatch] = {}  # of those that compete, or were asked for
        self._ranks: dict[int, tuple[int, int]] = {}  # of those that compete under "lpm": (-cached tokens, id)
        self._in_order: list[tuple[int, int]] = []  # the same, sorted
        self._stale: dict[int, None] = {}  # ids of those that compete and must be looked up, in order
        self._residency_changes = cache.residency_changes
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

    def add(self, request: Request) -> None:
        """Let `request` wait."""
        self._requests[request.id] = request
        if request.retractions:
            self._retracted.add(request.id)
        if skips := self._younger_admitted(request.id):
            self._skipped_before[request.id] = skips
        if self._by_prefix and request.id <= self._youngest_to_compete():
            self._compete(request.id)
            if len(self._requests) > LPM_WINDOW:
                self._withdraw(self._requests.peekitem(LPM_WINDOW)[0])

    def remove(self, request: Request) -> None:
        """It waits no more, and was not admitted."""
        del self._requests[request.id]
        if request.id in self._ranks:
            self._withdraw(request.id)
            if len(self._requests) >= LPM_WINDOW:
                self._compete(self._youngest_to_compete())
        elif (watch := self._watches.pop(request.id, None)) is not None:
            watch.close()
        self._skipped_before.pop(request.id, None)
        self._retracted.discard(request.id)
        oldest = next(iter(self._requests), None)
        del self._overtakers[: len(self._overtakers) if oldest is None else bisect_right(self._overtakers, oldest)]

    def admitted(self, request: Request) -> None:
        """It waits no more; the older ones were overtaken once more."""
        insort(self._overtakers, request.id)
        self.remove(request)

    def candidates(self) -> Iterator[Request]:
        """Those that compete to be admitted, the first one in front; not those that have left when it is their turn."""
        if not self._by_prefix:
            return self._waiting_still(list(islice(self._requests, LPM_WINDOW)))
        self._look_up()
        first = self._urgent()
        if not first:
            return self._waiting_still([request_id for _, request_id in self._in_order])
        urgent = set(first)
        return self._waiting_still(first + [i for _, i in self._in_order if i not in urgent])

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
            watch = self._watches[request.id] = self._watch(request)
        elif watch.is_current():
            return watch.cached_tokens
        else:
            watch.refresh()
        if request.id in self._ranks:
            self._rank(request.id, watch.cached_tokens)
        return watch.cached_tokens

    def _watch(self, request: Request) -> PrefixWatch:
        note = partial(self._stale.setdefault, request.id) if request.id in self._ranks else None
        # its ids were checked when it came: `cache.watch` would read them all once more
        return PrefixWatch(self._cache, request.findable_ids, request.cache_options.namespace, note)

    # -- who competes under "lpm", and in which order ----------------------------------------------------------------

    def _youngest_to_compete(self) -> int:
        """The id up to which the waiting compete."""
        youngest: int = self._requests.peekitem(min(len(self._requests), LPM_WINDOW) - 1)[0]
        return youngest

    def _compete(self, request_id: int) -> None:
        if (watch := self._watches.pop(request_id, None)) is not None:
            watch.close()  # it takes no note of changes
        rank = self._ranks[request_id] = (0, request_id)
        insort(self._in_order, rank)
        self._stale[request_id] = None

    def _withdraw(self, request_id: int) -> None:
        del self._in_order[bisect_left(self._in_order, self._ranks.pop(request_id))]
        if (watch := self._watches.pop(request_id, None)) is not None:
            watch.close()
        self._stale.pop(request_id, None)

    def _rank(self, request_id: int, cached_tokens: int) -> None:
        """Give it the place that `cached_tokens`, just looked up, ask for."""
        self._stale.pop(request_id, None)
        before, rank = self._ranks[request_id], (-cached_tokens, request_id)
        if rank != before:
            self._ranks[request_id] = rank
            del self._in_order[bisect_left(self._in_order, before)]
            insort(self._in_order, rank)

    def _look_up(self) -> None:
        """Look up what has changed; where that is too much for one step, the next one goes on."""
        changes = self._cache.residency_changes
        if changes != self._residency_changes:
            self._residency_changes = changes
            for request_id in self._ranks:
                self._stale.setdefault(request_id)
        for request_id in list(islice(self._stale, MOST_REFRESHED)):
            self.cached_tokens(self._requests[request_id])
            self._stale.pop(request_id, None)

    # -- ageing ------------------------------------------------------------------------------------------------------

    def _urgent(self) -> list[int]:
        """Ids of those that compete and go before the others, the oldest first."""
        urgent: list[int] = []
        surplus = len(self._overtakers) - self._max_skips
        if surplus >= 0:  # enough to have overtaken all that are older than the last `max_skips` of them
            youngest = self._overtakers[surplus] - 1 if self._max_skips else None
            urgent += islice(self._requests.irange(None, youngest), LPM_WINDOW)
        if self._retracted or (self._skipped_before and urgent):
            special = self._retracted.union(self._skipped_before).intersection(self._ranks)
            urgent = sorted(special.union(urgent))
            urgent = [i for i in urgent if i not in special or self._goes_first(i)]
        return urgent

    def _goes_first(self, request_id: int) -> bool:
        skips = self._younger_admitted(request_id) - self._skipped_before.get(request_id, 0)
        return skips >= self._max_skips or request_id in self._retracted

    def _younger_admitted(self, request_id: int) -> int:
        return len(self._overtakers) - bisect_right(self._overtakers, request_id)

    def _waiting_still(self, request_ids: Sequence[int]) -> Iterator[Request]:
        for request_id in request_ids:
            if (request := self._requests.get(request_id)) is not None:
                yield request
