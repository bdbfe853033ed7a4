"""Several replicas with a router in front of them, simulated in virtual time on a trace of requests.

The model. A replica is a radix tree of pages in LRU order and one server that computes prompts one after another, in
order of arrival, at `prefill_tokens_per_s`. What a prompt finds is looked up when its turn comes. The router is the
class that routes real requests. It is told what replicas hold by events, which arrive `event_delay_s` after the prompt
was computed; until then the pages of routed prompts are expected there. Rules that know only what was routed (see
`Router.knows`) are told that. A tier that all replicas share holds what any of them has computed; loading a token takes
`LOAD_SHARE` of what computing it takes.

After its first token a request decodes for `decode_s`. Each request that decodes when a prompt's turn comes lengthens
its computation by `DECODE_SHARE`, as tokens of a batch do. By default requests have one token.

The load. Arrivals are those of the trace, stretched so that computing every prompt in full would keep all replicas busy
for the share `load` of the time between the first and the last. A trace without times has exponential gaps.

Left out: outputs of different lengths, what prompts cost decoding, batches of prompts, transfers over a network, the
time that routing takes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from math import inf
from random import Random
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.tree.radix_tree import RadixTree
from radixkv.cluster.router import Router, RouteRequest
from radixkv.replay.fleet import Fleet, FleetResult, Happening
from radixkv.replay.holders import PageHolders
from radixkv.replay.page_numbers import PagedRequest, PagedTrace
from radixkv.replay.simulation import whole_pages

LOAD_SHARE = 0.1
DECODE_SHARE = 0.02
BATCH = 256  # requests between two reports of progress


def simulate_fleet(
    trace: PagedTrace,
    fleet: Fleet,
    router: Router,
    name: str = "",
    *,
    on_progress: Callable[[int], object] = lambda _: None,
) -> FleetResult:
    """Run `trace` through `fleet`. O(requests × (pages of a prompt + replicas)).

    Args:
        router: without replicas; of no use afterwards.
        name: of the router, for the result.
        on_progress: is called with a number of requests that have just arrived.
    Raises: ConfigError if a replica's part of the capacity holds no page; NoReplicaError if none is left.
    """
    return _Simulation(trace, fleet, router).run(name, on_progress)


def arrival_times_s(trace: PagedTrace, fleet: Fleet) -> list[float]:
    """When the requests arrive, from 0 on, so that the load is what `fleet` says. O(requests)."""
    times = [request.time_s for request in trace.requests]
    if times and times[-1] == times[0]:
        random, now = Random(0), 0.0
        for number in range(len(times)):
            times[number] = now
            now += random.expovariate(1.0)
    if not times or times[-1] == times[0]:
        return [0.0] * len(times)
    duration_s = trace.num_tokens / fleet.prefill_tokens_per_s / fleet.num_replicas / fleet.load
    stretch = duration_s / (times[-1] - times[0])
    return [(time - times[0]) * stretch for time in times]


# ---------------------------------------------------------------------------------------------------------- replicas


class _Used(NamedTuple):
    """What a cache did with a request, in pages: how many leading ones it held, which it took, which gave way."""

    num_found: int
    stored: NDArray[np.int32]
    evicted: NDArray[np.int32]


class _Cache:
    """A tree that makes room for what comes; of what is larger than it the leading pages that fit."""

    def __init__(self, num_pages: int) -> None:
        self._tree, self._num_pages = RadixTree(1), num_pages

    def peek(self, pages: NDArray[np.int32]) -> int:
        return self._tree.peek(pages)

    def use(self, request: PagedRequest) -> _Used:
        tree = self._tree
        found = tree.match_prefix(request.pages[: request.num_looked_up])
        tree.inc_lock_ref(found.node)
        stored = request.pages[: self._num_pages]
        missing = tree.total_size - found.length + len(stored) - self._num_pages
        evicted = tree.evict(missing) if missing > 0 else np.zeros(0, np.int32)
        tree.insert(stored, stored)
        tree.dec_lock_ref(found.node)
        return _Used(found.length, stored[found.length :], evicted)


class _Job:
    """A request on its way: which one, when it arrived, and which pages are expected of it."""

    __slots__ = ("expected", "number")

    def __init__(self, number: int, expected: list[int]) -> None:
        self.number, self.expected = number, expected


class _Replica:
    """A replica: its cache, its queue, and what it computes now."""

    def __init__(self, number: int, num_pages: int) -> None:
        self.number, self.name = number, f"replica {number}"
        self.cache = _Cache(num_pages)
        self.queue: deque[_Job] = deque()
        self.current: _Job | None = None
        self.num_decoding = 0
        self.work_s = 0.0
        self.slowness = 1.0
        self.is_dead = False


class _Done(NamedTuple):
    """What happens to a request next: its prompt is computed, events of it arrive, or its last token came."""

    time_s: float
    order: int
    step: Literal["computed", "told", "decoded"]
    replica: _Replica
    job: _Job
    used: _Used
    computed_tokens: int


class _Simulation:
    def __init__(self, trace: PagedTrace, fleet: Fleet, router: Router) -> None:
        self._trace, self._fleet, self._router = trace, fleet, router
        page_tokens = trace.page_tokens
        self._replica_pages = whole_pages(fleet.capacity_tokens // fleet.num_replicas, page_tokens)
        self._shared = _Cache(whole_pages(fleet.shared_tokens, page_tokens)) if fleet.shared_tokens else None
        self._arrivals = arrival_times_s(trace, fleet)
        self._held = PageHolders(trace.num_pages)
        self._routed = PageHolders(trace.num_pages) if router.knows == "routed" else None
        self._replicas: list[_Replica] = []
        self._by_name: dict[str, _Replica] = {}
        self._coming: list[_Done] = []  # a heap
        self._order = self._hit_tokens = self._shared_hit_tokens = 0
        self._ttft_s = np.zeros(len(trace.requests))
        for _ in range(fleet.num_replicas):
            self._join(0.0)

    def run(self, name: str, on_progress: Callable[[int], object]) -> FleetResult:
        happenings = self._happenings()
        next_happening = next(happenings, None)
        for number, now in enumerate(self._arrivals):
            self._advance(now)
            while next_happening is not None and next_happening.after_requests <= number:
                self._happen(next_happening, now)
                next_happening = next(happenings, None)
            self._route(number, now)
            if (number + 1) % BATCH == 0:
                on_progress(BATCH)
        on_progress(len(self._arrivals) % BATCH)
        self._advance(inf)
        fleet = self._fleet
        return FleetResult(
            router=name,
            num_replicas=fleet.num_replicas,
            capacity_tokens=fleet.capacity_tokens,
            query_tokens=self._trace.num_tokens,
            hit_tokens=self._hit_tokens,
            shared_hit_tokens=self._shared_hit_tokens,
            work_s=tuple(replica.work_s for replica in self._replicas),
            ttft_s=self._ttft_s,
        )

    # -- requests ----------------------------------------------------------------------------------------------------

    def _route(self, number: int, now: float) -> None:
        request = self._trace.requests[number]
        pages = request.pages.tolist()
        known = self._held if self._routed is None else self._routed
        held = known.leading(pages[: request.num_looked_up])
        choice = self._router.choose(
            RouteRequest(
                str(number),
                request.num_tokens,
                {self._replicas[replica].name: self._tokens(found, request) for replica, found in held.items()},
                affinity=request.affinity,
            ),
            now,
        )
        replica = self._by_name[choice.replica]
        if self._routed is not None:
            self._routed.store(replica.number, pages[: request.num_looked_up])
        expected = pages[self._held.leading(pages).get(replica.number, 0) : self._replica_pages]
        self._held.expect(replica.number, expected)
        replica.queue.append(_Job(number, expected))
        self._start(replica, now)

    def _start(self, replica: _Replica, now: float) -> None:
        if replica.current is not None or not replica.queue:
            return
        job = replica.current = replica.queue.popleft()
        request = self._trace.requests[job.number]
        shared_pages = 0 if self._shared is None else self._shared.peek(request.pages[: request.num_looked_up])
        used = replica.cache.use(request)
        found_tokens = self._tokens(used.num_found, request)
        loaded_tokens = max(0, self._tokens(shared_pages, request) - found_tokens)
        self._hit_tokens += found_tokens + loaded_tokens
        self._shared_hit_tokens += loaded_tokens
        computed_tokens = max(1, request.num_tokens - found_tokens - loaded_tokens)  # an engine computes the last one
        slowness = replica.slowness * (1 + DECODE_SHARE * replica.num_decoding)
        s_per_token = slowness / self._fleet.prefill_tokens_per_s
        work_s = (computed_tokens + LOAD_SHARE * loaded_tokens) * s_per_token
        replica.work_s += work_s
        self._push(_Done(now + work_s, self._next(), "computed", replica, job, used, computed_tokens))

    def _tokens(self, num_pages: int, request: PagedRequest) -> int:
        return min(num_pages * self._trace.page_tokens, request.num_tokens)  # the last block of a prompt may be partial

    def _push(self, done: _Done) -> None:
        heappush(self._coming, done)

    def _next(self) -> int:
        """Of what happens at the same time, the order."""
        self._order += 1
        return self._order

    def _advance(self, until: float) -> None:
        """Let everything happen that is due."""
        while self._coming and self._coming[0].time_s <= until:
            done = heappop(self._coming)
            if done.replica.is_dead:
                continue
            if done.step == "computed":
                self._complete(done)
            elif done.step == "decoded":
                done.replica.num_decoding -= 1
                self._router.finished(str(done.job.number), done.time_s)
            else:
                self._held.remove(done.replica.number, done.used.evicted.tolist())
                self._held.store(done.replica.number, done.used.stored.tolist())
                self._held.expect_no_more(done.replica.number, done.job.expected)

    def _complete(self, done: _Done) -> None:
        now, replica, number = done.time_s, done.replica, done.job.number
        self._ttft_s[number] = now - self._arrivals[number]
        self._router.computed(str(number), now, done.computed_tokens)
        if self._fleet.decode_s:
            replica.num_decoding += 1
            self._push(done._replace(time_s=now + self._fleet.decode_s, order=self._next(), step="decoded"))
        else:
            self._router.finished(str(number), now)
        if self._shared is not None:
            self._shared.use(self._trace.requests[number])
        self._push(done._replace(time_s=now + self._fleet.event_delay_s, order=self._next(), step="told"))
        replica.current = None
        self._start(replica, now)

    # -- incidents ---------------------------------------------------------------------------------------------------

    def _happenings(self) -> Iterator[Happening]:
        return iter(sorted(self._fleet.happenings, key=lambda happening: happening.after_requests))

    def _happen(self, happening: Happening, now: float) -> None:
        if happening.what == "join":
            self._join(now)
            return
        replica = self._replicas[happening.replica]
        if happening.what == "slow":
            replica.slowness = happening.factor
        elif happening.what == "drain":
            self._router.drain(replica.name)
        elif not replica.is_dead:
            self._die(replica, now)

    def _join(self, now: float) -> None:
        replica = _Replica(len(self._replicas), self._replica_pages)
        self._replicas.append(replica)
        self._by_name[replica.name] = replica
        self._router.add_replica(replica.name, now)

    def _die(self, replica: _Replica, now: float) -> None:
        """All that it holds is lost; the requests that it had not computed go elsewhere."""
        replica.is_dead = True
        self._router.remove_replica(replica.name)
        for holders in (self._held, self._routed):
            if holders is not None:
                holders.forget(replica.number)
        lost = [replica.current, *replica.queue]
        for job in lost:
            if job is not None:
                self._route(job.number, now)
