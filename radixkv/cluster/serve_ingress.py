"""The ingress under Ray Serve: the router's application, in front of a handle to the replicas.

The proxies of Ray Serve choose a replica before they have read a request's body, so a request router of the ingress
itself cannot know the prompt. Hence the ingress is a deployment of its own, which reads bodies and chooses.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from starlette.types import Receive, Scope, Send

from radixkv.cluster.fleet import Fleet
from radixkv.cluster.replica_link import Headers, ReplicaCall
from radixkv.cluster.roster import ROSTER
from radixkv.cluster.route_app import RouteApp
from radixkv.cluster.route_server import CHECK_EVERY_S, Readers
from radixkv.cluster.router.cost import CostRouter
from radixkv.cluster.serve_call import AddressedCall
from radixkv.cluster.serve_link import ServeLink

logger = logging.getLogger(__name__)


class ServeIngress:
    """Keeps the fleet in step with the replicas that Serve runs, and answers requests."""

    def __init__(self, handle: Any, key: str | None, max_body_bytes: int, is_local: bool) -> None:
        """Args: handle: of the replicas' deployment. key: what the replicas know the router by, if they need one.
        is_local: as `RouteApp`.
        """
        self._handle = handle.options(stream=True)
        headers: Headers = [] if key is None else [(b"authorization", f"Bearer {key}".encode())]
        self._fleet = Fleet(CostRouter(), headers=headers)
        self._readers = Readers(self._fleet)
        self._app = RouteApp(self._fleet, self._readers, max_body_bytes=max_body_bytes, is_local=is_local)
        self._tasks: list[asyncio.Task[None]] = []
        self._changed = asyncio.Event()

    def __serve_build_asgi_app__(self) -> Any:  # Ray's name
        async def serve(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "lifespan":
                await self._live(receive, send)
            else:
                await self._app(scope, receive, send)

        return serve

    async def _live(self, receive: Receive, send: Send) -> None:
        """From the first message to the last one: as long as Serve keeps the ingress."""
        await receive()
        loop = asyncio.get_running_loop()
        ROSTER.follow(lambda: loop.call_soon_threadsafe(self._changed.set))
        await self._say_hello()
        await self._follow_roster()
        await asyncio.to_thread(self._readers)
        self._tasks = [
            asyncio.create_task(self._keep_following()),
            asyncio.create_task(self._fleet.keep_checking(CHECK_EVERY_S, self._readers)),
        ]
        await send({"type": "lifespan.startup.complete"})
        await receive()
        for task in self._tasks:
            task.cancel()
        await asyncio.to_thread(self._fleet.close)
        await send({"type": "lifespan.shutdown.complete"})

    async def _say_hello(self) -> None:
        """Call any replica: this makes Serve's request router, which then tells of all. Waits for the first one."""
        call = AddressedCall(None, ReplicaCall("GET", "/ready"))
        async for _ in self._handle.answer.remote(call):
            pass

    async def _follow_roster(self) -> None:
        names = ROSTER.names
        for name in self._fleet.members.keys() - names:
            self._fleet.leave(name)
        new = sorted(names - self._fleet.members.keys())
        for name in new:
            self._fleet.join(ServeLink(name, self._handle))
        await asyncio.gather(*[self._fleet.check(name) for name in new])

    async def _keep_following(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            try:
                await self._follow_roster()
            except Exception:  # the next change is followed again
                logger.exception("a change of the replicas could not be followed")
