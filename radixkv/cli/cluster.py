"""`radixkv cluster`: replicas of a server on Ray Serve, behind one address."""

from __future__ import annotations

import logging
import os
import signal
import threading
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from radixkv.cli.serve import ServedEngineOptions
from radixkv.cli.setting_options import FromSettings, with_option_groups
from radixkv.config import ClusterConfig, EngineConfig, ServerConfig
from radixkv.errors import ConfigError

CLUSTER_COMMANDS = typer.Typer(
    name="cluster",
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)
UP_EPILOG = """
Ctrl-C or SIGTERM lets running requests finish, and ends all replicas.

**Examples**

Three replicas: `radixkv cluster up demo --replicas 3`

As many as the load needs, warm from a shared tier:
`radixkv cluster up Qwen/Qwen3-0.6B --replicas 2 --max-replicas 8 --shared-cache redis://cache:6379`

The same by Ray Serve's own command: `serve run radixkv.cluster:app model=demo replicas=3`
"""
CLUSTER_SETTINGS = FromSettings(ClusterConfig, left_out={}, more={}, panel="Replicas")
ROUTED_SERVER_SETTINGS = FromSettings(
    ServerConfig,
    left_out={
        "root_path": "Ray Serve's own setting",
        "ssl_certfile": "Ray Serve's own setting",
        "ssl_keyfile": "Ray Serve's own setting",
        "ssl_keyfile_password": "Ray Serve's own setting",
        "ssl_ca_certs": "Ray Serve's own setting",
    },
    more={},
    panel="Server",
)
OBJECT_STORE_BYTES = 128 << 20  # answers pass through it, and nothing that is large


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOptions:
    """How many replicas, and how large: settings of `ClusterConfig`."""

    settings: Annotated[dict[str, Any], CLUSTER_SETTINGS] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedServerOptions:
    """Where to listen, and whom to serve: settings of `ServerConfig`."""

    settings: Annotated[dict[str, Any], ROUTED_SERVER_SETTINGS] = field(default_factory=dict)


@CLUSTER_COMMANDS.callback()
def cluster() -> None:
    """Run replicas of a server on Ray Serve, behind one address."""


@CLUSTER_COMMANDS.command("up", epilog=UP_EPILOG)
@with_option_groups
def up(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help='"demo", a model directory, or a hub id such as "Qwen/Qwen3-0.6B".')
    ] = "demo",
    ray_address: Annotated[
        str | None,
        typer.Option(
            "--ray-address",
            metavar="ADDRESS",
            help="A Ray cluster that runs already; without it, Ray is started on this machine, and ended.",
            show_default=False,
        ),
    ] = None,
    *,
    cluster_options: ClusterOptions,
    engine_options: ServedEngineOptions,
    server_options: RoutedServerOptions,
) -> None:
    """Run replicas of a server on Ray Serve, until a signal ends them."""
    config, server = ClusterConfig(**cluster_options.settings), ServerConfig(**server_options.settings)
    EngineConfig(**engine_options.settings)  # refuses wrong settings before the imports
    from radixkv.cluster.requirements import check_ray_installed

    check_ray_installed()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions

    from radixkv.cluster.serve_app import ClusterSettings, build

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    settings = ClusterSettings(
        model=model, engine=engine_options.settings, server=server_options.settings, cluster=cluster_options.settings
    )
    application = build(settings, is_local=server.is_local)
    _join_ray(ray, ray_address, config, server)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # after Ray has set its own
        signal.signal(number, lambda *_: ended.set())
    try:
        serve.start(proxy_location="HeadOnly", http_options=HTTPOptions(host=server.host, port=server.port))
        _deploy(serve, application)
        typer.echo(f"radixkv serves {server.served_model_name or model} at http://{server.host}:{server.port}")
        typer.echo(f"  replicas  {config.replicas}{f' to {config.max_replicas}' if config.max_replicas else ''}")
        while not ended.wait(1.0):
            pass
    finally:
        serve.shutdown()
        ray.shutdown()


def _deploy(serve: Any, application: Any) -> None:
    """Raises: ConfigError if Serve cannot start it."""
    try:
        serve.run(application, name="radixkv", route_prefix="/")
    except RuntimeError as error:  # Serve has no narrower one
        raise ConfigError(f"the cluster does not start: {error}; the logs of Ray Serve say more") from error


def _join_ray(ray: Any, address: str | None, cluster: ClusterConfig, server: ServerConfig) -> None:
    """Connect to a Ray cluster, or start one that is just large enough, for this machine alone."""
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is not None:
        ray.init(address=address, **quiet)
        return
    most = cluster.max_replicas or cluster.replicas
    ray.init(
        num_cpus=max(1, round(most * cluster.cpus_per_replica + 0.5)),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        _node_ip_address="127.0.0.1" if server.is_local else None,
        **quiet,
    )
