"""The settings of a cluster under Ray Serve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from radixkv.config.limits import MAX_COUNT
from radixkv.config.setting import Setting, check_settings, described
from radixkv.errors import ConfigError


@described
@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """Settings of `radixkv cluster up`, checked when they are made."""

    replicas: Annotated[
        int, Setting("Replicas to run; the least, with `max_replicas`.", minimum=1, maximum=MAX_COUNT)
    ] = 1
    max_replicas: Annotated[
        int | None,
        Setting(
            "Replicas at most: Ray Serve starts and ends them by load.", minimum=1, maximum=MAX_COUNT, unset="fixed"
        ),
    ] = None
    target_ongoing_requests: Annotated[
        float, Setting("With `max_replicas`: requests that each replica should have, running and waiting.", above=0)
    ] = 16.0
    cpus_per_replica: Annotated[float, Setting("Cores that Ray sets aside for a replica.", minimum=0)] = 1.0
    gpus_per_replica: Annotated[float, Setting("GPUs that Ray sets aside for a replica.", minimum=0)] = 0.0
    replica_key: Annotated[
        str | None, Setting("With `api_keys`: the key by which the replicas know the router.", unset="")
    ] = None

    def __post_init__(self) -> None:
        check_settings(self)
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ConfigError(f"max_replicas must be at least replicas; got {self.max_replicas} and {self.replicas}")
