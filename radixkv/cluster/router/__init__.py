"""Where a request goes: the cost router, and the rules of others to compare with. Pure: no I/O and no clock."""

from __future__ import annotations

from radixkv.cluster.router.cost import CostRouter
from radixkv.cluster.router.peers import (
    BestMatchRouter,
    ConsistentHashRouter,
    RandomRouter,
    RayPrefixAffinityRouter,
    RoundRobinRouter,
    SGLangCacheAwareRouter,
)
from radixkv.cluster.router.replica_load import RoutingRule
from radixkv.cluster.router.routing import Choice, Knowledge, ReplicaCost, Router, RouteRequest
from radixkv.config.checks import checked_choice

__all__ = [
    "ROUTERS",
    "BestMatchRouter",
    "Choice",
    "ConsistentHashRouter",
    "CostRouter",
    "Knowledge",
    "RandomRouter",
    "RayPrefixAffinityRouter",
    "ReplicaCost",
    "RoundRobinRouter",
    "RouteRequest",
    "Router",
    "SGLangCacheAwareRouter",
    "new_router",
]

ROUTERS: dict[str, type[RoutingRule]] = {
    "cost": CostRouter,
    "random": RandomRouter,
    "round-robin": RoundRobinRouter,
    "consistent-hash": ConsistentHashRouter,
    "best-match": BestMatchRouter,
    "ray-prefix-affinity": RayPrefixAffinityRouter,
    "sglang-cache-aware": SGLangCacheAwareRouter,
    "threshold": SGLangCacheAwareRouter,  # the same by the name of what it does
}


def new_router(name: str, *, seed: int = 0) -> Router:
    """A router without replicas, by its name in `ROUTERS`. Raises: ConfigError for another name."""
    checked_choice("router", name, tuple(ROUTERS))
    return ROUTERS[name](seed=seed)
