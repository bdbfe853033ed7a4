"""`radixkv route`: one address for several servers, which sends each request where its prefix is cached."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from radixkv.cli.setting_options import setting_option
from radixkv.config import ServerConfig

ROUTE_EPILOG = """
Ctrl-C or SIGTERM lets running requests finish.

**Examples**

Two servers behind one address: `radixkv route --replica http://127.0.0.1:8001 --replica http://127.0.0.1:8002`

Where a request would go, and why: `curl http://127.0.0.1:8000/route/explain -d '{"prompt": "Once upon a time"}'`
"""


def route(
    replica: Annotated[
        list[str],
        typer.Option("--replica", metavar="URL", help="Address of a server; may be given several times."),
    ],
    host: Annotated[str, setting_option(ServerConfig, "host")] = "127.0.0.1",
    port: Annotated[int, setting_option(ServerConfig, "port")] = 8000,
    replica_key: Annotated[
        str | None,
        typer.Option(
            "--replica-key",
            metavar="KEY",
            envvar="RADIXKV_REPLICA_KEY",
            help="Key by which the servers know the router, if they need one. Requests keep their own.",
            show_default=False,
        ),
    ] = None,
    drain_s: Annotated[float, setting_option(ServerConfig, "drain_s")] = 30.0,
) -> None:
    """Take requests for several servers, and send each where its prefix is cached and little is queued.

    The servers may be started by anybody, with the same model and page size. Clients see the same paths.
    """
    from radixkv.cluster.requirements import check_route_installed

    check_route_installed()
    from radixkv.cluster.route_server import RouteServer
    from radixkv.cluster.route_server import route as route_until_signal

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    server = RouteServer(
        replica,
        host=host,
        port=port,
        key=replica_key,
        drain_s=drain_s,
        on_start=lambda address: _greet(server, address),
    )
    route_until_signal(server)


def _greet(server: object, address: str) -> None:
    from radixkv.cluster.route_server import RouteServer

    assert isinstance(server, RouteServer)
    typer.echo(f"radixkv routes to {len(server.fleet.members)} replicas at {address}")
    for row in server.fleet.rows():
        typer.echo(f"  {row['replica']}  {row['state']}{': ' + row['trouble'] if row['trouble'] else ''}")
