"""How a router speaks with one replica, whatever carries the bytes."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias

Headers: TypeAlias = Sequence[tuple[bytes, bytes]]

HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
"""Headers that are for one connection alone (RFC 9110, section 7.6.1)."""


class ReplicaLostError(Exception):
    """The replica cannot be reached, or its answer broke off."""


@dataclass(frozen=True, slots=True)
class ReplicaCall:
    """A request to a replica.

    Attributes:
        target: path and query, as they came.
        headers: in lower case, as they came, without those of the connection.
    """

    method: str
    target: str
    headers: Headers = ()
    body: bytes = b""

    def with_body(self, body: bytes) -> ReplicaCall:
        """The same request with another body."""
        headers = [(name, value) for name, value in self.headers if name != b"content-length"]
        return replace(self, headers=[*headers, (b"content-length", b"%d" % len(body))], body=body)


@dataclass(frozen=True, slots=True)
class ReplicaAnswer:
    """An answer whose body is still coming. Closing `chunks` ends the request at the replica.

    Reading `chunks` raises ReplicaLostError if the answer breaks off.
    """

    status: int
    headers: Headers
    chunks: AsyncGenerator[bytes] = field(repr=False)

    @property
    def is_event_stream(self) -> bool:
        """Whether the body is a stream of server-sent events."""
        return any(name == b"content-type" and b"text/event-stream" in value for name, value in self.headers)

    async def read(self) -> bytes:
        """The whole body. Raises: ReplicaLostError."""
        async with aclosing(self.chunks) as chunks:
            return b"".join([chunk async for chunk in chunks])


class ReplicaLink(Protocol):
    """A way to one replica."""

    @property
    def name(self) -> str:
        """Of the replica; no two have the same."""
        ...

    @property
    def host(self) -> str:
        """Where it runs."""
        ...

    async def send(self, call: ReplicaCall) -> ReplicaAnswer:
        """Send a request, and wait for the head of its answer. Raises: ReplicaLostError."""
        ...

    async def close(self) -> None:
        """Let go of what the link holds."""
        ...


def end_to_end(headers: Headers) -> list[tuple[bytes, bytes]]:
    """`headers` without those that are for one connection."""
    named = {word.strip().lower() for name, value in headers if name == b"connection" for word in value.split(b",")}
    return [(name, value) for name, value in headers if name not in HOP_BY_HOP and name not in named]


def json_of(body: bytes) -> dict[str, Any]:
    """The object in an answer's body. Raises: ReplicaLostError if there is none: the answer is no replica's."""
    try:
        found = json.loads(body)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ReplicaLostError("the answer is no JSON object; is this a radixkv server?")
    return found
