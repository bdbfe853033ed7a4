"""What every routing rule is given, does and answers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeAlias

Knowledge: TypeAlias = Literal["held", "routed"]
"""What `RouteRequest.held` must tell a rule: what replicas hold, by their events, or all that was ever routed there."""


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """A request that needs a replica.

    Attributes:
        request_id: not the id of another request that runs.
        prompt_tokens: tokens of the prompt, at least 1.
        held: how many leading tokens of the prompt each replica holds; replicas that hold none may be left out.
        expected_output_tokens: None if unknown.
        affinity: what consistent hashing hashes, such as the name of a session.
    """

    request_id: str
    prompt_tokens: int
    held: Mapping[str, int]
    expected_output_tokens: int | None = None
    affinity: str = ""


class ReplicaCost(NamedTuple):
    """What a replica would cost, in seconds; `total_s` is the sum of the others."""

    replica: str
    queued_s: float
    compute_s: float
    price_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Choice:
    """Where a request goes.

    Attributes:
        replica: its name.
        cached_tokens: what it is thought to hold of the prompt.
        reason: why, in a few words.
        weigh: what makes `costs`, as most choices are never explained.
    """

    replica: str
    cached_tokens: int
    reason: str
    weigh: Callable[[], tuple[ReplicaCost, ...]] = tuple

    @property
    def costs(self) -> tuple[ReplicaCost, ...]:
        """The costs of each candidate; empty if the rule weighs none. O(replicas)."""
        return self.weigh()

    def explain(self) -> str:
        """The choice and the costs, a line each, the cheapest first; milliseconds. O(replicas log replicas).

        >>> cost = ReplicaCost("b", queued_s=0.5, compute_s=0.2, price_s=0.05, total_s=0.75)
        >>> print(Choice("b", 300, "the least cost", lambda: (cost,)).explain())
        b: the least cost; 300 tokens of the prompt are cached there
          b  750.0 ms = 500.0 queued + 200.0 to compute + 50.0 for what others hold
        """
        lines = [f"{self.replica}: {self.reason}; {self.cached_tokens:,} tokens of the prompt are cached there"]
        lines += [
            f"  {cost.replica}  {1000 * cost.total_s:,.1f} ms = {1000 * cost.queued_s:,.1f} queued + "
            f"{1000 * cost.compute_s:,.1f} to compute + {1000 * cost.price_s:,.1f} for what others hold"
            for cost in sorted(self.costs, key=lambda cost: (cost.total_s, cost.replica != self.replica))
        ]
        return "\n".join(lines)


class Router(Protocol):
    """Chooses a replica for each request. One class for each rule.

    No I/O, no clock: `now` is in seconds of any clock that never goes back. Not thread-safe; callers lock. What is
    told of requests that are not known (any more) changes nothing: their replica may have died in between.
    """

    @property
    def knows(self) -> Knowledge:
        """What `RouteRequest.held` must tell."""

    def add_replica(self, name: str, now: float) -> None:
        """A replica takes requests from now on. Raises: ConfigError if there is one of that name."""

    def remove_replica(self, name: str) -> None:
        """It has died: what was queued there counts no longer. Changes nothing if it is not known (any more)."""

    def drain(self, name: str) -> None:
        """It gets no more requests. Changes nothing if it is not known (any more)."""

    def choose(self, request: RouteRequest, now: float, exclude: Collection[str] = ()) -> Choice:
        """The replica for `request`, which is queued there from now on. O(replicas).

        Raises: NoReplicaError if there is none but those that drain or are excluded; InvalidRequestError for a prompt
            of no tokens, or an id that runs already.
        """

    def would_choose(self, request: RouteRequest, now: float, exclude: Collection[str] = ()) -> Choice:
        """As `choose`, but nothing is queued and nothing learned. O(replicas)."""

    def computed(self, request_id: str, now: float, computed_tokens: int | None = None) -> None:
        """The prompt was computed: its first token came. O(1).

        Args:
            computed_tokens: tokens of the prompt that were not found in the cache, if the replica has told.
        """

    def finished(self, request_id: str, now: float) -> None:
        """It is over: answered in full, failed or cut off. O(1)."""
