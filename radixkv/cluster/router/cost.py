"""The cost router: one cost in seconds, for every replica and every request."""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from radixkv.cluster.router.learned import (
    FIRST_WORK,
    NO_WORK,
    RECOMPUTED_SHARE,
    CopyPrice,
    Floats,
    Work,
    copy_tokens,
    relative_slowness,
)
from radixkv.cluster.router.replica_load import Pick, ReplicaLoad, RoutingRule
from radixkv.cluster.router.routing import ReplicaCost, RouteRequest
from radixkv.config.checks import Bounds, checked_number

TIE = 0.05  # costs are not known more exactly than that
LEAST_S_PER_TOKEN = LEAST_WAIT_S = 1e-9

# Columns of the table of replicas
QUEUED, FIRST, BEGAN, ASSIGNED, DONE_TOKENS, DONE_S = range(6)


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

    Speeds are learned from the times between first tokens (`relative_slowness`), so `computed` must be called for each
    request.

    Invariant: `queued_s` of a replica is 0 if and only if every prompt that went there was computed or is finished.

    Not thread-safe. A choice is O(replicas log replicas), in array operations.

    >>> router = CostRouter()
    >>> for name in ("a", "b"): router.add_replica(name, now=0.0)
    >>> router.choose(RouteRequest("1", 1000, {"a": 900}), now=0.0).replica
    'a'
    >>> print(router.choose(RouteRequest("2", 1000, {"a": 900}), now=0.0).explain())
    a: the least cost; 900 tokens of the prompt are cached there
      a  20.0 ms = 10.0 queued + 10.0 to compute + 0.0 for what others hold
      b  190.0 ms = 0.0 queued + 100.0 to compute + 90.0 for what others hold

    Attributes:
        price: of copies, as learned so far.
    """

    def __init__(self, *, recomputed_share: float = RECOMPUTED_SHARE, seed: int = 0) -> None:
        """Of the tokens that some replica holds, `recomputed_share` may be computed again on others for shorter queues.

        Raises: ConfigError if it is not from 0 to 1.
        """
        super().__init__(seed=seed)
        self.price = CopyPrice(checked_number("recomputed_share", recomputed_share, Bounds(minimum=0, maximum=1)))
        self._pooled = FIRST_WORK
        self._work: dict[str, Work] = {}
        self._row: dict[str, int] = {}
        self._free_rows: list[int] = []
        self._table: Floats = np.zeros((0, 6))

    def add_replica(self, name: str, now: float) -> None:
        if name not in self._row:
            if not self._free_rows:
                rows = len(self._table)
                self._table = np.concatenate((self._table, np.zeros((max(8, rows), 6))))
                self._free_rows = list(range(len(self._table) - 1, rows - 1, -1))
            self._row[name] = self._free_rows.pop()
            self._work[name] = NO_WORK
        super().add_replica(name, now)

    def remove_replica(self, name: str) -> None:
        super().remove_replica(name)
        if name in self._row:
            self._free_rows.append(self._row.pop(name))
            del self._work[name]

    def queued_s(self, name: str, now: float) -> float:
        """How long what is queued at a replica will take, in seconds. Raises: KeyError if it is not known."""
        queued_s, _ = self._queued_s(np.array([self._row[name]]), now)
        return float(queued_s[0])

    def s_per_token(self, name: str, now: float) -> float:
        """How long a replica takes for a token of a prompt, as learned. Raises: KeyError if it is not known."""
        _, s_per_token = self._queued_s(np.array([self._row[name]]), now)
        return float(s_per_token[0])

    def _queued_s(self, rows: NDArray[np.intp], now: float) -> tuple[Floats, Floats]:
        """Seconds until each queue is empty, and seconds per token."""
        queued, first, began, _, done_tokens, done_s = self._table[rows].T
        pooled = max(LEAST_S_PER_TOKEN, self._pooled.seconds / self._pooled.tokens)
        running_s = np.where(first > 0, np.maximum(0.0, now - began), 0.0)
        s_per_token = pooled * relative_slowness(done_tokens, done_s, first, running_s, pooled)
        first_s = np.abs(first * s_per_token - running_s)  # what is overdue is expected to take as long again
        waits = (queued > 0) * LEAST_WAIT_S
        return (queued - first) * s_per_token + first_s + waits, s_per_token

    def _pick(self, request: RouteRequest, now: float, candidates: list[ReplicaLoad]) -> Pick:
        names = [replica.name for replica in candidates]
        rows = np.fromiter(map(self._row.__getitem__, names), np.intp, len(names))
        held = np.fromiter((request.held.get(name, 0) for name in names), np.float64, len(names))
        np.minimum(held, request.prompt_tokens, out=held)
        copied = copy_tokens(held)
        queued_s, s_per_token = self._queued_s(rows, now)
        compute_s = np.maximum(1.0, request.prompt_tokens - held) * s_per_token  # the last token is always computed
        price_s = self.price.factor * copied * s_per_token
        total_s = queued_s + compute_s + price_s
        tied = np.flatnonzero(total_s <= total_s.min() * (1 + TIE))
        chosen = int(tied[np.argmin(self._table[rows[tied], ASSIGNED])])
        costs = partial(_costs, names, queued_s, compute_s, price_s, total_s)
        learn = partial(self.price.learn, found=float(held.max()), copied=float(copied[chosen]))
        return Pick(candidates[chosen], "the least cost", costs, learn)

    def _learn(self, replica: ReplicaLoad, tokens: int, seconds: float) -> None:
        self._pooled = self._pooled.then(tokens, seconds)
        self._work[replica.name] = self._work[replica.name].then(tokens, seconds)

    def _changed(self, replica: ReplicaLoad) -> None:
        self._table[self._row[replica.name]] = (
            replica.queued_tokens,
            replica.first_tokens,
            replica.began_s,
            replica.assigned_tokens,
            *self._work[replica.name],
        )


def _costs(names: list[str], *seconds: Floats) -> tuple[ReplicaCost, ...]:
    return tuple(ReplicaCost(name, *row) for name, row in zip(names, np.array(seconds).T.tolist(), strict=True))
