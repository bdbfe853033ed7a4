"""Runs a router in front of servers that anybody started."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from socket import socket
from typing import Any

import uvicorn

from radixkv.cluster.fleet import Fleet
from radixkv.cluster.http_link import HttpLink, new_client
from radixkv.cluster.known_prompts import PromptReader
from radixkv.cluster.replica_info import ReplicaInfo
from radixkv.cluster.replica_link import Headers
from radixkv.cluster.route_app import RouteApp
from radixkv.cluster.router.cost import CostRouter
from radixkv.config import ServerConfig
from radixkv.errors import ConfigError, RadixKVError
from radixkv.models.loader import load_tokenizer

logger = logging.getLogger(__name__)

CHECK_EVERY_S = 2.0


class Readers:
    """Makes the reader of prompts when a replica has said what it serves; a model's tokenizer is loaded once."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._made: tuple[str, PromptReader | None] | None = None
        self._lock = threading.Lock()

    def __call__(self) -> PromptReader | None:
        """The reader for what the replicas serve; None if its tokenizer cannot be had here, or nobody answered yet."""
        info = self._fleet.info
        if info is None:
            return None
        with self._lock:
            if self._made is None or self._made[0] != info.model:
                self._made = (info.model, _reader(info))
            return self._made[1]


def _reader(info: ReplicaInfo) -> PromptReader | None:
    try:
        return PromptReader(load_tokenizer(info.model), info.vocab_size)
    except (RadixKVError, OSError) as error:
        logger.warning("requests are routed by load alone: %s", error)
        return None


class RouteServer(uvicorn.Server):
    """Serves until SIGTERM or SIGINT; then what runs finishes, within `drain_s`."""

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        key: str | None = None,
        drain_s: float = 30.0,
        check_every_s: float = CHECK_EVERY_S,
        on_start: Callable[[str], object] = lambda address: None,
    ) -> None:
        """Args:
            addresses: of the replicas.
            key: what the replicas know the router by, if they need a key.
            check_every_s: time between two looks at each replica.

        Raises: ConfigError.
        """
        if not addresses:
            raise ConfigError("a router needs at least one --replica")
        self._client = new_client()
        headers: Headers = [] if key is None else [(b"authorization", f"Bearer {key}".encode())]
        self.fleet = Fleet(CostRouter(), headers=headers)
        for address in addresses:
            self.fleet.join(HttpLink(address, self._client))
        self._readers = Readers(self.fleet)
        self.app = RouteApp(self.fleet, self._readers, is_local=ServerConfig(host=host).is_local)
        self._check_every_s = check_every_s
        self._on_start = on_start
        self._checking: asyncio.Task[None] | None = None
        config: Any = uvicorn.Config(
            self.app,
            host=host,
            port=port,
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,  # the replica's own goes through
            timeout_graceful_shutdown=max(1, round(drain_s)),
        )
        super().__init__(config)

    @property
    def address(self) -> str:
        """Where clients reach it, once it has started."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Look at the replicas, listen, and say where."""
        await self.fleet.check_all()
        await asyncio.to_thread(self._readers)
        await super().startup(sockets)
        if self.started:
            self._checking = asyncio.create_task(self.fleet.keep_checking(self._check_every_s, self._readers))
            self._on_start(self.address)

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """Let what runs finish, and close."""
        await super().shutdown(sockets)
        if self._checking is not None:
            self._checking.cancel()
            with suppress(asyncio.CancelledError):
                await self._checking
        await self._client.aclose()
        await asyncio.to_thread(self.fleet.close)


def route(server: RouteServer) -> None:
    """Serve until a signal ends it. Raises: ConfigError if it cannot listen."""
    try:
        server.run()
    except SystemExit as error:  # uvicorn's way to say that it cannot listen
        config = server.config
        raise ConfigError(f"cannot listen on {config.host}, port {config.port}; is another server there?") from error
