"""A replica under Ray Serve: the application of a server, called by messages and not over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Any
from urllib.parse import unquote

from starlette.types import ASGIApp, Message, Scope

from radixkv.cluster.replica_link import ReplicaCall
from radixkv.cluster.serve_call import AddressedCall, AnswerHead
from radixkv.config import ServerConfig
from radixkv.engine.async_engine import AsyncEngine
from radixkv.serving.app import make_app
from radixkv.serving.service import Service

MAX_PIECES = 64  # of an answer that wait to be taken


class ServeReplica:
    """An engine, and the application that serves it."""

    async def __init__(self, model: str, engine: Mapping[str, Any], server: Mapping[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        """Args: engine, server: settings of `EngineConfig` and `ServerConfig`. Raises: what loading a model does."""
        config, engine = ServerConfig(**server), _with_own_address(engine)
        loaded = await asyncio.to_thread(
            lambda: AsyncEngine.from_pretrained(model, max_waiting=config.max_waiting, **engine)
        )
        self._service = Service(loaded, model, config)
        await self._service.start()
        self._app = make_app(self._service)

    async def answer(self, addressed: AddressedCall) -> AsyncGenerator[AnswerHead | bytes]:
        """The answer to a request: its head, then its body as it comes."""
        async for piece in answer_of(self._app, addressed.call):
            yield piece

    async def check_health(self) -> None:
        """Raises: ApiError if the engine does not live: Serve starts another replica then."""
        await self._service.check_health()

    async def __del__(self) -> None:  # Serve awaits it, once what ran has ended
        await self._service.close()


def _with_own_address(engine: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an engine whose events come from this machine's address, and no other."""
    from ray.util import get_node_ip_address

    address = engine.get("kv_events") or ""
    host = f"tcp://{get_node_ip_address()}:"
    return {**engine, "kv_events": address.replace("tcp://*:", host, 1) or None}


async def answer_of(app: ASGIApp, call: ReplicaCall) -> AsyncGenerator[AnswerHead | bytes]:
    """What an ASGI application answers to a request. Closing it tells the application that the client has left."""
    pieces: asyncio.Queue[AnswerHead | bytes | None] = asyncio.Queue(MAX_PIECES)
    given = [{"type": "http.request", "body": call.body, "more_body": False}]
    left = asyncio.Event()

    async def receive() -> Message:
        if given:
            return given.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            await pieces.put(AnswerHead(message["status"], [(bytes(n), bytes(v)) for n, v in message["headers"]]))
        elif message.get("body"):
            await pieces.put(message["body"])

    async def run() -> None:
        try:
            await app(_scope(call), receive, send)
        finally:
            await pieces.put(None)

    task = asyncio.create_task(run())
    try:
        while (piece := await pieces.get()) is not None:
            yield piece
        await task
    finally:
        left.set()
        while not task.done():  # it may wait for room; the last that it puts in is None
            await pieces.get()
            await asyncio.sleep(0)


def _scope(call: ReplicaCall) -> Scope:
    path, _, query = call.target.partition("?")
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": call.method,
        "scheme": "http",
        "path": unquote(path),
        "raw_path": path.encode("latin-1"),
        "query_string": query.encode("latin-1"),
        "root_path": "",
        "headers": list(call.headers),
        "client": None,
        "server": None,
    }
