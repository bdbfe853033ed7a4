"""Runs the application until a signal ends it."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from socket import socket
from types import FrameType

import uvicorn

from radixkv.errors import ConfigError
from radixkv.serving.app import make_app
from radixkv.serving.service import Service

CLOSING_S = 2  # that connections have to close once nothing runs any more


class Server(uvicorn.Server):
    """Serves until SIGTERM or SIGINT; then running requests finish, within `drain_s`, and new ones are refused.

    A second signal ends it at once.
    """

    def __init__(self, service: Service, *, on_start: Callable[[str], object] = lambda address: None) -> None:
        """on_start: called with the address once clients can connect. Raises: ConfigError."""
        self._service = service
        self._on_start = on_start
        self._drained_by: float | None = None
        self.was_forced = False
        super().__init__(_uvicorn_config(service))

    @property
    def address(self) -> str:
        """Where clients reach it, once it has started: `http://127.0.0.1:8000`."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        scheme = "http" if self._service.config.ssl_certfile is None else "https"
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

    def drain(self) -> None:
        """Finish what runs and then end, as after the first signal. Any thread may call it."""
        if self._drained_by is None:
            self._drained_by = time.monotonic() + self._service.config.drain_s
            self._service.admission.drain()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal; end at once at the second."""
        if self._drained_by is None:
            self.drain()
        else:
            self.was_forced = self.should_exit = True

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Listen, and say where."""
        await self._service.start()
        await super().startup(sockets)
        if self.started:
            self._on_start(self.address)

    async def on_tick(self, counter: int) -> bool:
        """Whether to end now; asked ten times a second."""
        if self._drained_by is not None:
            late = time.monotonic() >= self._drained_by
            self.should_exit = self.should_exit or late or self._service.admission.num_inside == 0
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """Abort what runs still, and close."""
        self._service.admission.drain()
        await self._service.close()
        self.force_exit = self.was_forced
        await super().shutdown(sockets)


def serve(service: Service, *, on_start: Callable[[str], object] = lambda address: None) -> bool:
    """Serve until a signal ends it. Returns: whether what ran could finish. Raises: ConfigError."""
    server = Server(service, on_start=on_start)
    try:
        server.run()
    except SystemExit as error:  # uvicorn's way to say that it cannot listen
        config = service.config
        raise ConfigError(f"cannot listen on {config.host}, port {config.port}; is another server there?") from error
    finally:
        asyncio.run(service.close())
    return not server.was_forced


def _uvicorn_config(service: Service) -> uvicorn.Config:
    config = service.config
    uvicorn_config = uvicorn.Config(
        make_app(service),
        host=config.host,
        port=config.port,
        http="auto",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        root_path=config.root_path,
        timeout_graceful_shutdown=CLOSING_S,
        ssl_certfile=config.ssl_certfile,
        ssl_keyfile=config.ssl_keyfile,
        ssl_keyfile_password=config.ssl_keyfile_password,
        ssl_ca_certs=config.ssl_ca_certs,
        ssl_cert_reqs=ssl.CERT_NONE if config.ssl_ca_certs is None else ssl.CERT_REQUIRED,
    )
    try:
        uvicorn_config.load()
    except OSError as error:  # of the certificate or the key
        raise ConfigError(f"the certificate or its key cannot be used: {error}") from error
    return uvicorn_config
