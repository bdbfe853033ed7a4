"""A replica that is reached over HTTP: a server that anybody started."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import httpx2 as httpx

from radixkv.cluster.replica_link import ReplicaAnswer, ReplicaCall, ReplicaLostError, end_to_end
from radixkv.errors import ConfigError

CONNECT_TIMEOUT_S = 5.0
IDLE_S = 2.0
"""How long an idle connection is kept: less than servers keep them, or one would seem lost that was merely closed."""


def new_client() -> httpx.AsyncClient:
    """The client that the links of a router share. An answer may take as long as it likes: a connection that is alive
    is not lost, and whether a replica lives is found out beside it."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256, keepalive_expiry=IDLE_S)
    timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S)
    return httpx.AsyncClient(timeout=timeout, limits=limits, follow_redirects=False, trust_env=False)


def checked_address(address: str) -> str:
    """The address of a replica, without a slash at its end. Raises: ConfigError.

    >>> checked_address("http://127.0.0.1:8000/")
    'http://127.0.0.1:8000'
    """
    try:
        url = httpx.URL(address)
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
        raise ConfigError(f"a replica must be an address such as http://127.0.0.1:8000; got {address!r}")
    return str(url).rstrip("/")


class HttpLink:
    """A way to the replica at an address, which is its name."""

    def __init__(self, address: str, client: httpx.AsyncClient) -> None:
        """Args: client: `new_client()`, which its maker closes. Raises: ConfigError."""
        self.name = checked_address(address)
        self.host = httpx.URL(self.name).host
        self._client = client

    async def send(self, call: ReplicaCall) -> ReplicaAnswer:
        """Send a request, and wait for the head of its answer. Raises: ReplicaLostError."""
        headers: Any = list(call.headers)
        request = self._client.build_request(
            call.method, f"{self.name}{call.target}", headers=headers, content=call.body or None
        )
        for name in ("accept", "accept-encoding", "user-agent"):  # which the client adds where there are none
            if not any(given == name.encode() for given, _ in call.headers):
                request.headers.pop(name, None)
        try:
            response = await self._client.send(request, stream=True)
        except httpx.TransportError as error:
            raise _lost(self.name, error) from error
        raw = [(name.lower(), value) for name, value in response.headers.raw]
        return ReplicaAnswer(response.status_code, end_to_end(raw), self._chunks(response))

    async def close(self) -> None:
        """Nothing: the client is shared."""

    async def _chunks(self, response: httpx.Response) -> AsyncGenerator[bytes]:
        try:
            async for chunk in response.aiter_raw():
                yield chunk
        except httpx.TransportError as error:
            raise _lost(self.name, error) from error
        finally:
            await response.aclose()


def _lost(name: str, error: Exception) -> ReplicaLostError:
    return ReplicaLostError(f"{name}: {type(error).__name__}: {error}")
