"""What is simulated when several replicas are, and what came of it. See `radixkv.replay.replicas`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from radixkv.config.checks import Bounds, checked_int, checked_number
from radixkv.errors import ConfigError

Incident: TypeAlias = Literal["die", "join", "drain", "slow"]


@dataclass(frozen=True, slots=True)
class Happening:
    """What happens to a replica when so many requests have arrived.

    Attributes:
        after_requests: before the request of this number (from 0) is routed.
        what: the replica "die"s, with all that it holds; "drain"s: gets no more requests; gets "slow" by `factor`; or
            a new one "join"s, empty, under the next number.
        replica: its number, from 0; of no meaning for "join".
        factor: how many times as long everything takes from then on.
    """

    after_requests: int
    what: Incident
    replica: int = 0
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Fleet:
    """What is simulated.

    Attributes:
        num_replicas: at the beginning.
        capacity_tokens: of all their caches together, in equal parts.
        shared_tokens: of a tier that all share; 0 without.
        load: how much of the time all replicas would compute if nothing were cached.
        prefill_tokens_per_s: what one replica computes.
        event_delay_s: how long events take to the router.
        decode_s: how long a request decodes after its first token.
        happenings: in any order.
    """

    num_replicas: int
    capacity_tokens: int
    shared_tokens: int = 0
    load: float = 0.6
    prefill_tokens_per_s: float = 10_000.0
    event_delay_s: float = 0.05
    decode_s: float = 0.0
    happenings: Sequence[Happening] = ()

    def __post_init__(self) -> None:
        checked_int("num_replicas", self.num_replicas, 1)
        checked_number("load", self.load, Bounds(above=0))
        checked_number("prefill_tokens_per_s", self.prefill_tokens_per_s, Bounds(above=0))
        checked_number("event_delay_s", self.event_delay_s, Bounds(minimum=0))
        checked_number("decode_s", self.decode_s, Bounds(minimum=0))
        known = self.num_replicas
        for happening in sorted(self.happenings, key=lambda happening: happening.after_requests):
            if happening.what == "join":
                known += 1
            elif not 0 <= happening.replica < known:
                raise ConfigError(f"replicas are numbered from 0 to {known - 1}; there is no {happening.replica}")


@dataclass(frozen=True, slots=True)
class FleetResult:
    """What one router did.

    Attributes:
        router: its name.
        num_replicas, capacity_tokens: as they were asked for; of all replicas together.
        query_tokens: tokens of all prompts.
        hit_tokens: those of them that were found, in the replica or the shared tier.
        shared_hit_tokens: those of them that were found in the shared tier alone.
        work_s: for each replica, how long it computed and loaded.
        ttft_s: for each request, from its arrival until its prompt was computed.
    """

    router: str
    num_replicas: int
    capacity_tokens: int
    query_tokens: int
    hit_tokens: int
    shared_hit_tokens: int
    work_s: tuple[float, ...]
    ttft_s: NDArray[np.float64]

    @property
    def hit_rate(self) -> float:
        """The share of prompt tokens that were not computed."""
        return self.hit_tokens / self.query_tokens if self.query_tokens else 0.0

    @property
    def shared_hit_rate(self) -> float:
        """The share of prompt tokens that only the shared tier had."""
        return self.shared_hit_tokens / self.query_tokens if self.query_tokens else 0.0

    @property
    def max_over_mean_work(self) -> float:
        """How much more the busiest replica did than all did on average."""
        total_s = sum(self.work_s)
        return max(self.work_s) * len(self.work_s) / total_s if total_s else 1.0

    def ttft_percentile_s(self, percent: float) -> float:
        """The time to the first token that `percent` of the requests did not exceed."""
        return float(np.percentile(self.ttft_s, percent)) if len(self.ttft_s) else 0.0
