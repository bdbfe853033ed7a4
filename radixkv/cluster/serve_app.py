"""The application for Ray Serve: an ingress and its replicas, from settings."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from radixkv.cluster.requirements import check_ray_installed
from radixkv.config import ClusterConfig, EngineConfig, ServerConfig
from radixkv.config.setting import field_check, setting_fields
from radixkv.errors import ConfigError

UNBOUNDED_REQUESTS = 100_000
"""Requests at once that Serve lets through to one replica: the engine's queue is bounded itself (`max_waiting`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSettings:
    """What to run: a model, and settings of `EngineConfig`, `ServerConfig` and `ClusterConfig`."""

    model: str = "demo"
    engine: Mapping[str, Any] = field(default_factory=dict)
    server: Mapping[str, Any] = field(default_factory=dict)
    cluster: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> ClusterSettings:
        """From one mapping of all, as `serve run` gives it: texts may stand for numbers. Raises: ConfigError."""
        groups: dict[str, type] = {"cluster": ClusterConfig, "engine": EngineConfig, "server": ServerConfig}
        known = {f.name: (group, field_check(f), f.type) for group, c in groups.items() for f in setting_fields(c)}
        parts: dict[str, dict[str, Any]] = {group: {} for group in groups}
        model = "demo"
        for name, value in given.items():
            if name == "model":
                model = value
            elif name not in known:
                raise ConfigError(f"unknown setting {name!r}; the settings are model, {', '.join(known)}")
            else:
                group, check, kind = known[name]
                parts[group][name] = check(name, value if kind is str else _read(value))
        return cls(model=model, **parts)


def build(settings: ClusterSettings, *, is_local: bool = False) -> Any:
    """The application, for `serve.run`.

    Args: is_local: whether Ray Serve listens at this machine alone; if not, no live page shows texts without a key.
    Raises: ConfigError, MissingPackageError.
    """
    check_ray_installed()
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from radixkv.cluster.serve_ingress import ServeIngress
    from radixkv.cluster.serve_replica import ServeReplica
    from radixkv.cluster.serve_router import ChosenReplicaRouter

    cluster, server = ClusterConfig(**settings.cluster), ServerConfig(**settings.server)
    engine = EngineConfig(**settings.engine)
    if engine.disk_cache is not None:
        raise ConfigError("disk_cache belongs to one engine at a time; replicas share a tier with shared_cache")
    if server.api_keys is not None and cluster.replica_key is None:
        raise ConfigError("with api_keys the router needs a key of its own; set replica_key to one of an administrator")
    replicas = serve.deployment(
        ServeReplica,
        name="replicas",
        ray_actor_options={"num_cpus": cluster.cpus_per_replica, "num_gpus": cluster.gpus_per_replica},
        max_ongoing_requests=UNBOUNDED_REQUESTS,
        graceful_shutdown_timeout_s=server.drain_s,
        request_router_config=RequestRouterConfig(request_router_class=ChosenReplicaRouter),
        **_scale(cluster),
    )
    ingress = serve.deployment(
        serve.ingress()(ServeIngress),
        name="ingress",
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=UNBOUNDED_REQUESTS,
        graceful_shutdown_timeout_s=server.drain_s,
    )
    key = cluster.replica_key or server.api_key
    own = {"kv_events": "tcp://127.0.0.1:0" if server.is_local else "tcp://*:0"}
    running = replicas.bind(settings.model, own | dict(settings.engine), dict(settings.server))
    return ingress.bind(running, key, server.max_body_bytes, is_local)


def _scale(cluster: ClusterConfig) -> dict[str, Any]:
    """How many replicas, as Serve takes it."""
    if cluster.max_replicas is None:
        return {"num_replicas": cluster.replicas}
    return {
        "autoscaling_config": {
            "min_replicas": cluster.replicas,
            "initial_replicas": cluster.replicas,
            "max_replicas": cluster.max_replicas,
            "target_ongoing_requests": cluster.target_ongoing_requests,
        }
    }


def _read(value: Any) -> Any:
    """A value that came as text, as TOML reads it; a text that is none of TOML's values stays one."""
    if not isinstance(value, str):
        return value
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return value
