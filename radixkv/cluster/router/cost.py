"""The cost router: one cost in seconds, for every replica and every request."""

from __future__ import annotations

from radixkv.cluster.router.learned import RECOMPUTED_SHARE, CopyPrice, Speed, copy_tokens
from radixkv.cluster.router.replica_load import Pick, ReplicaLoad, RoutingRule
from radixkv.cluster.router.routing import ReplicaCost, RouteRequest
from radixkv.config.checks import Bounds, checked_number

TIE = 0.05  # costs are not known more exactly than that
_new_tuple = tuple.__new__  # calling a NamedTuple costs as much as all arithmetic of a candidate


class CostRouter(RoutingRule):
    """Sends each request where it costs the least time, its own and others'.

    The cost of a replica, in seconds, is the sum of

    - *queued*: the prompts that wait there, at that replica's own speed;
    - *to compute*: the tokens of this prompt that it does not hold;
    - *price*: of these, the tokens that another replica holds, times a factor that is learned (`CopyPrice`). Computing
      them again delays whatever comes later, and the copy takes room in a second cache.

    Costs that differ by less than 5 % are ties. Of these the replica takes it that was given the least to compute, so
    that cold prefixes are spread over all caches. There is no threshold and no second mode: a replica that is slow or
    hangs has a long queue in seconds, one that has joined an empty one, and one that died is no candidate.

    Speeds are learned from the times between first tokens (`Speed`), so `computed` must be called for each request.

    Invariant: `queued_s` of a replica is 0 when every prompt that went there was computed or is finished.

    Not thread-safe. A choice is O(replicas log replicas).

    >>> router = CostRouter()
    >>> for name in ("a", "b"): router.add_replica(name, now=0.0)
    >>> router.choose(RouteRequest("1", 1000, {"a": 900}), now=0.0).replica
    'a'
    >>> print(router.choose(RouteRequest("2", 1000, {"a": 900}), now=0.0).explain())
    a: the least cost; 900 tokens of the prompt are cached there
      a  20.0 ms = 10.0 queued + 10.0 to compute + 0.0 for what others hold
      b  189.6 ms = 0.0 queued + 100.0 to compute + 89.6 for what others hold

    Attributes:
        speed: seconds per token of each replica, as learned so far.
        price: of copies, as learned so far.
    """

    def __init__(self, *, recomputed_share: float = RECOMPUTED_SHARE, seed: int = 0) -> None:
        """Of the tokens that some replica holds, `recomputed_share` may be computed again on others for shorter queues.

        Raises: ConfigError if it is not from 0 to 1.
        """
        super().__init__(seed=seed)
        self.speed = Speed()
        self.price = CopyPrice(checked_number("recomputed_share", recomputed_share, Bounds(minimum=0, maximum=1)))

    def remove_replica(self, name: str) -> None:
        super().remove_replica(name)
        self.speed.forget(name)

    def queued_s(self, name: str, now: float) -> float:
        """How long what is queued at a replica will take, in seconds. O(1). Raises: KeyError if it is not known."""
        return self._queued_s(self.replicas[name], now)[0]

    def _queued_s(self, replica: ReplicaLoad, now: float) -> tuple[float, float]:
        """Seconds until the queue is empty, and seconds per token."""
        if not replica.queue:
            return 0.0, self.speed.s_per_token(replica.name)
        first = replica.first_tokens
        running_s = max(0.0, now - replica.began_s)
        s_per_token = self.speed.s_per_token_of_running(replica.name, first, running_s)
        first_s = max(s_per_token, first * s_per_token - running_s)  # one token at least is left
        return (replica.queued_tokens - first) * s_per_token + first_s, s_per_token

    def _pick(self, request: RouteRequest, now: float, candidates: list[ReplicaLoad]) -> Pick:
        num_tokens, factor = request.prompt_tokens, self.price.factor
        held = [min(num_tokens, request.held.get(replica.name, 0)) for replica in candidates]
        found, copied = copy_tokens(held)
        costs = []
        for replica, held_tokens in zip(candidates, held, strict=True):
            queued_s, s_per_token = self._queued_s(replica, now)
            compute_s = max(1, num_tokens - held_tokens) * s_per_token  # the last token is always computed
            price_s = factor * copied[held_tokens] * s_per_token
            total_s = queued_s + compute_s + price_s
            costs.append(_new_tuple(ReplicaCost, (replica.name, queued_s, compute_s, price_s, total_s)))
        tied_s = min([cost.total_s for cost in costs]) * (1 + TIE)
        tied = [number for number, cost in enumerate(costs) if cost.total_s <= tied_s]
        chosen = min(tied, key=lambda number: candidates[number].assigned_tokens)
        self.price.learn(found=found, copied=copied[held[chosen]])
        return Pick(candidates[chosen], "the least cost", tuple(costs))

    def _learn(self, replica: ReplicaLoad, tokens: int, seconds: float) -> None:
        self.speed.learn(replica.name, tokens, seconds)
