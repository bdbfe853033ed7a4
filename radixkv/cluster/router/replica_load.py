"""Bookkeeping that all rules share: the replicas, what is queued at each, and what runs there."""

from __future__ import annotations

from collections.abc import Callable, Collection
from random import Random
from typing import NamedTuple

from radixkv.cluster.router.routing import Choice, Knowledge, ReplicaCost, RouteRequest
from radixkv.errors import ConfigError, InvalidRequestError, NoReplicaError

HALVED_EVERY = 256  # choices a replica: how long who was given how much is remembered


class ReplicaLoad:
    """What one replica has to do.

    Invariant: `queued_tokens` is the sum over `queue`, whose requests are all in `running`.

    Attributes:
        queue: tokens left to compute of each prompt whose first token has not come yet, in order of arrival.
        running: ids of the requests that are not finished.
        assigned_tokens: tokens that it was given to compute; older ones count less.
        routed_tokens: tokens of all prompts that went there, shared prefixes once if `held` tells what was routed.
        began_s: since when the first of `queue` has been computed.
        draining: whether it gets no more requests.
    """

    __slots__ = (
        "assigned_tokens",
        "began_s",
        "draining",
        "name",
        "queue",
        "queued_tokens",
        "routed_tokens",
        "running",
    )

    def __init__(self, name: str, now: float, assigned_tokens: float) -> None:
        self.name, self.began_s, self.assigned_tokens = name, now, assigned_tokens
        self.draining = False
        self.queue: dict[str, int] = {}
        self.running: set[str] = set()
        self.queued_tokens = self.routed_tokens = 0

    @property
    def first_tokens(self) -> int:
        """Tokens of the first prompt in the queue; 0 if it is empty."""
        return next(iter(self.queue.values()), 0)

    def take(self, request_id: str, tokens: int, now: float) -> None:
        """A request comes, of which so many tokens have to be computed. O(1)."""
        if not self.queue:
            self.began_s = now
        self.queue[request_id] = tokens
        self.running.add(request_id)
        self.queued_tokens += tokens
        self.assigned_tokens += tokens
        self.routed_tokens += tokens

    def leave_queue(self, request_id: str) -> int | None:
        """It waits no more. O(1). Returns: its tokens; None if it was not in the queue."""
        tokens = self.queue.pop(request_id, None)
        if tokens is not None:
            self.queued_tokens -= tokens
        return tokens


class Pick(NamedTuple):
    """What a rule decides, why, what makes the costs of the candidates, and what the rule learns if it is done."""

    replica: ReplicaLoad
    reason: str
    weigh: Callable[[], tuple[ReplicaCost, ...]] = tuple
    learn: Callable[[], object] = bool  # nothing


class RoutingRule:
    """A `Router` but for the rule itself, `_pick`. What is left to chance is drawn from `seed`. Not thread-safe."""

    knows: Knowledge = "held"

    def __init__(self, *, seed: int = 0) -> None:
        self.random = Random(seed)
        self.replicas: dict[str, ReplicaLoad] = {}
        self._replica_of: dict[str, ReplicaLoad] = {}
        self._num_choices = 0

    def add_replica(self, name: str, now: float) -> None:
        if name in self.replicas:
            raise ConfigError(f"names of replicas must differ; there is a replica {name!r} already")
        least = min((replica.assigned_tokens for replica in self.replicas.values()), default=0)
        self.replicas[name] = replica = ReplicaLoad(name, now, least)
        self._changed(replica)

    def remove_replica(self, name: str) -> None:
        replica = self.replicas.pop(name, None)
        if replica is not None:
            for request_id in replica.running:
                del self._replica_of[request_id]

    def drain(self, name: str) -> None:
        if name in self.replicas:
            self.replicas[name].draining = True

    def would_choose(self, request: RouteRequest, now: float, exclude: Collection[str] = ()) -> Choice:
        pick, cached_tokens = self._decide(request, now, exclude)
        return Choice(pick.replica.name, cached_tokens, pick.reason, pick.weigh)

    def choose(self, request: RouteRequest, now: float, exclude: Collection[str] = ()) -> Choice:
        pick, cached_tokens = self._decide(request, now, exclude)
        replica = pick.replica
        pick.learn()
        replica.take(request.request_id, max(1, request.prompt_tokens - cached_tokens), now)
        self._replica_of[request.request_id] = replica
        self._changed(replica)
        self._age()
        return Choice(replica.name, cached_tokens, pick.reason, pick.weigh)

    def _decide(self, request: RouteRequest, now: float, exclude: Collection[str]) -> tuple[Pick, int]:
        """What the rule says, and what that replica is thought to hold; nothing changes but what chance draws."""
        if request.prompt_tokens < 1:
            raise InvalidRequestError(f"a prompt must have at least 1 token, not {request.prompt_tokens}")
        if request.request_id in self._replica_of:
            raise InvalidRequestError(f"ids of requests must differ; {request.request_id!r} runs already")
        candidates = [r for r in self.replicas.values() if not (r.draining or r.name in exclude)]
        if not candidates:
            draining = sum(replica.draining for replica in self.replicas.values())
            raise NoReplicaError(known=len(self.replicas), draining=draining)
        pick = self._pick(request, now, candidates)
        return pick, min(request.prompt_tokens, request.held.get(pick.replica.name, 0))

    def computed(self, request_id: str, now: float, computed_tokens: int | None = None) -> None:
        replica = self._replica_of.get(request_id)
        tokens = None if replica is None else replica.leave_queue(request_id)
        if replica is None or tokens is None:
            return
        took_s = max(0.0, now - replica.began_s)
        replica.began_s = now
        self._learn(replica, tokens if computed_tokens is None else computed_tokens, took_s)
        self._changed(replica)

    def finished(self, request_id: str, now: float) -> None:
        replica = self._replica_of.pop(request_id, None)
        if replica is None:
            return
        replica.running.remove(request_id)
        was_first = next(iter(replica.queue), None) == request_id
        if replica.leave_queue(request_id) is None:
            return
        if was_first:
            replica.began_s = now
        self._changed(replica)

    def _age(self) -> None:
        self._num_choices += 1
        if self._num_choices >= HALVED_EVERY * len(self.replicas):
            self._num_choices = 0
            for replica in self.replicas.values():
                replica.assigned_tokens /= 2
                self._changed(replica)

    def _pick(self, request: RouteRequest, now: float, candidates: list[ReplicaLoad]) -> Pick:
        """Decide between `candidates`, of which there is one at least."""
        raise NotImplementedError

    def _learn(self, replica: ReplicaLoad, tokens: int, seconds: float) -> None:
        """`replica` has computed `tokens` in `seconds`."""

    def _changed(self, replica: ReplicaLoad) -> None:
        """Another request is queued there, one less, or the replica is new."""
