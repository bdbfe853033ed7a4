"""Rules that others use, written from their published descriptions, with their published defaults: to compare with."""

from __future__ import annotations

import math
from bisect import bisect, insort
from hashlib import blake2b

from radixkv.cluster.router.replica_load import Pick, ReplicaLoad, RoutingRule
from radixkv.cluster.router.routing import RouteRequest


class RandomRouter(RoutingRule):
    """Any replica, all as likely."""

    def _pick(self, request: RouteRequest, now: float, candidates: list[ReplicaLoad]) -> Pick:
        return Pick(self.random.choice(candidates), "drawn at random")


class RoundRobinRouter(RoutingRule):
    """One replica after the other."""

    _next = 0

    def _pick(self, request: RouteRequest, now: float, candidates: list[ReplicaLoad]) -> Pick:
        replica = candidates[self._next % len(candidates)]
        self._next += 1
        return Pick(replica, "next in turn")


class ConsistentHashRouter(RoutingRule):
    """The replica that follows the hash of `RouteRequest.affinity` on a ring, with 100 places for each replica.

    Karger et al., Consistent Hashing and Random Trees, STOC 1997; the number of places is that of Ray Serve's
    ConsistentHashRouter, which hashes a header with the session's name. Where a replica takes no requests, the next on
    the ring does. A choice is O(log places).
    """

    VIRTUAL_NODES = 100

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self._ring: list[tuple[int, str]] = []

    def add_replica(self, name: str, now: float) -> None:
        super().add_replica(name, now)
        for number in range(self.VIRTUAL_NODES):
            insort(self._ring, (_hash(f"{name} {number}"), name))

    def remove_replica(self, name: str) -> None:
        super().remove_replica(name)
        self._ring = [place for place in self._ring if place[1] != name]

    def _pick(self, request: RouteRequest, now: float, candidates: list[ReplicaLoad]) -> Pick:
        able = {replica.name: replica for replica in candidates}
        start = bisect(self._ring, (_hash(request.affinity), ""))
        for number in range(len(self._ring)):
            _, name = self._ring[(start + number) % len(self._ring)]
            if name in able:
                return Pick(able[name], f"the hash of {request.affinity!r}")
        raise AssertionError("no candidate is on the ring")


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


class BestMatchRouter(RoutingRule):
    """The replica that holds the most of the prompt, whatever waits there; of equal ones any."""

    def _pick(self, request: RouteRequest, now: float, candidates: list[ReplicaLoad]) -> Pick:
        most = max(request.held.get(replica.name, 0) for replica in candidates)
        best = [replica for replica in candidates if request.held.get(replica.name, 0) == most]
        return Pick(self.random.choice(best), "holds the most of the prompt")


class RayPrefixAffinityRouter(RoutingRule):
    """Ray Serve's PrefixCacheAffinityRouter, of Ray 2.60.

    While the queues differ by no more than `IMBALANCED_THRESHOLD` requests, which is always the case by default: the
    replica to which the longest prefix of the prompt was sent, if that is `MATCH_RATE_THRESHOLD` of it, or else the one
    whose tree is smallest. Otherwise the shorter of two queues drawn at random. Its tree holds what was routed, counts
    characters (here tokens), and by default forgets nothing.
    """

    knows = "routed"
    IMBALANCED_THRESHOLD = math.inf
    MATCH_RATE_THRESHOLD = 0.1

    def _pick(self, request: RouteRequest, now: float, candidates: list[ReplicaLoad]) -> Pick:
        queues = [len(replica.running) for replica in candidates]
        if max(queues) - min(queues) > self.IMBALANCED_THRESHOLD:
            two = self.random.sample(candidates, min(2, len(candidates)))
            return Pick(min(two, key=lambda replica: len(replica.running)), "the shorter of two queues")
        most = max(request.held.get(replica.name, 0) for replica in candidates)
        if most >= self.MATCH_RATE_THRESHOLD * request.prompt_tokens:
            best = [replica for replica in candidates if request.held.get(replica.name, 0) == most]
            return Pick(self.random.choice(best), "was sent the most of the prompt")
        return Pick(min(candidates, key=lambda replica: replica.routed_tokens), "the smallest tree")


class SGLangCacheAwareRouter(RoutingRule):
    """The policy `cache_aware` of SGLang's router 0.3.2.

    If the largest and the smallest number of running requests differ by more than `BALANCE_ABS_THRESHOLD` and by more
    than the factor `BALANCE_REL_THRESHOLD`: the replica that runs the fewest, and the cache is ignored. Otherwise the
    one to which more than `CACHE_THRESHOLD` of the prompt was sent, the most of all, or else the one whose tree is
    smallest. Its tree holds what was routed and counts characters (here tokens). That it is cut at 2**26 characters is
    left out here.
    """

    knows = "routed"
    CACHE_THRESHOLD = 0.3
    BALANCE_ABS_THRESHOLD = 64
    BALANCE_REL_THRESHOLD = 1.5

    def _pick(self, request: RouteRequest, now: float, candidates: list[ReplicaLoad]) -> Pick:
        loads = [len(replica.running) for replica in candidates]
        most_load, least_load = max(loads), min(loads)
        if most_load - least_load > self.BALANCE_ABS_THRESHOLD and most_load > self.BALANCE_REL_THRESHOLD * least_load:
            return Pick(min(candidates, key=lambda replica: len(replica.running)), "runs the fewest requests")
        most = max(request.held.get(replica.name, 0) for replica in candidates)
        if most > self.CACHE_THRESHOLD * request.prompt_tokens:
            best = [replica for replica in candidates if request.held.get(replica.name, 0) == most]
            return Pick(self.random.choice(best), "was sent the most of the prompt")
        return Pick(min(candidates, key=lambda replica: replica.routed_tokens), "the smallest tree")
