"""A router in front of servers, all in threads of the test's process; its links can break where a test says."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2 as httpx

from http_server import SMALL, Running, new_http
from radixkv import AsyncEngine
from radixkv.cluster.events_in import is_comment, whole_events
from radixkv.cluster.replica_link import ReplicaAnswer, ReplicaCall, ReplicaLink, ReplicaLostError
from radixkv.cluster.route_server import RouteServer

EVENTS: dict[str, Any] = {**SMALL, "kv_events": "tcp://127.0.0.1:0"}
GENERATES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")


def new_engine(**settings: Any) -> AsyncEngine:
    return AsyncEngine.from_pretrained("demo", **{**EVENTS, **settings})


@dataclass
class Loss:
    """The next `times` requests that generate lose their replica after `events` of their answer.

    0 loses it before the head. An answer that is no stream counts as one event.
    """

    events: int = 0
    times: int = 0


class BreakingLink:
    """A link that loses its replica as its `loss` says, which it may share with others."""

    def __init__(self, link: ReplicaLink) -> None:
        self.link = link
        self.name, self.host = link.name, link.host
        self.loss = Loss()
        self.calls: list[ReplicaCall] = []
        self.streams: list[bytes] = []

    def breaks(self, events: int, times: int = 1) -> None:
        self.loss = Loss(events, times)

    async def send(self, call: ReplicaCall) -> ReplicaAnswer:
        if not call.target.startswith(GENERATES) or call.method != "POST":
            return await self.link.send(call)
        self.calls.append(call)
        loss = self.loss
        is_broken = loss.times > 0
        loss.times -= is_broken
        if is_broken and loss.events == 0:
            raise ReplicaLostError("the test says so")
        answer = await self.link.send(call)
        chunks = self._breaking(answer.chunks, loss.events) if is_broken else self._noting(answer.chunks)
        return ReplicaAnswer(answer.status, answer.headers, chunks)

    async def close(self) -> None:
        await self.link.close()

    async def _noting(self, chunks: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
        number = len(self.streams)
        self.streams.append(b"")
        async with aclosing(chunks):
            async for chunk in chunks:
                self.streams[number] += chunk
                yield chunk

    async def _breaking(self, chunks: AsyncGenerator[bytes], left: int) -> AsyncGenerator[bytes]:
        async with aclosing(chunks), aclosing(whole_events(chunks)) as events:
            async for event in events:
                left -= not is_comment(event)
                if left < 0 or not event.endswith(b"\n\n"):
                    break
                yield event
        raise ReplicaLostError("the test says so")


class Routed:
    """A router that runs, and its links."""

    def __init__(self, server: RouteServer, links: Sequence[BreakingLink]) -> None:
        self.server, self.links = server, links
        self.address = server.address

    def http(self, key: str | None = None) -> httpx.Client:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return new_http(self.address, headers=headers)

    def state_of(self, number: int) -> str:
        return self.server.fleet.members[self.links[number].name].state

    def wait_until(self, holds: Callable[[], bool]) -> None:
        with self.http() as client:
            while not holds():
                client.get("/health")

    def break_all(self, events: int, times: int) -> None:
        """At each replica the first `times` requests that generate lose it."""
        for link in self.links:
            link.breaks(events, times)

    def break_next(self, events: int) -> None:
        """The next request that generates loses its replica, wherever it goes; where it goes on it loses none."""
        loss = Loss(events, 1)
        for link in self.links:
            link.loss = loss


@contextmanager
def routed(replicas: Sequence[Running | str], **options: Any) -> Iterator[Routed]:
    """A router for servers, or for addresses."""
    started = threading.Event()
    addresses = [replica if isinstance(replica, str) else replica.address for replica in replicas]
    server = RouteServer(
        addresses, **{"port": 0, "check_every_s": 0.05, "on_start": lambda address: started.set(), **options}
    )
    links = []
    for member in server.fleet.members.values():
        member.link = BreakingLink(member.link)
        links.append(member.link)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert started.wait(60), "the router does not start"
        yield Routed(server, links)
    finally:
        server.should_exit = True
        thread.join()
