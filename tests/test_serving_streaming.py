"""Streams of server-sent events: what is sent at once, and what waits for the connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest

from radixkv.serving.streaming import BODY_SEND, EventStream


class Connection:
    """Takes what is sent, if it is open; else that waits until it is."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.is_open = asyncio.Event()
        self.is_open.set()
        self.fails = False

    async def send(self, message: Any) -> None:
        await self.is_open.wait()
        if self.fails:
            self.fails = False
            raise OSError("broken")
        if message["type"] == "http.response.body":
            self.bodies.append(message["body"])

    async def receive(self) -> dict[str, str]:
        await asyncio.Event().wait()  # its client stays
        raise AssertionError


class Source:
    """Gives an event at a time to the stream's task."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.stream: EventStream | None = None

    async def events(self, stream: EventStream) -> AsyncGenerator[bytes]:
        self.stream = stream
        while (data := await self.queue.get()) is not None:
            yield data


def run(use: Callable[[EventStream, Source, Connection], Any], *, has_short_way: bool = True) -> list[bytes]:
    """What was sent of a stream in whose first event's wake `use` ran."""

    async def main() -> list[bytes]:
        source, connection = Source(), Connection()
        stream = EventStream(source.events, keep_alive_s=60, on_error=lambda error: b"error: %s;" % str(error).encode())
        scope = {BODY_SEND: connection.send} if has_short_way else {}
        assert not stream.is_idle, "it has not begun"
        answering = asyncio.create_task(stream(scope, connection.receive, connection.send))
        source.queue.put_nowait(b"first;")
        await turns()
        assert connection.bodies == [b"first;"]
        await use(stream, source, connection)
        source.queue.put_nowait(None)
        await answering
        return connection.bodies

    return asyncio.run(main())


async def turns() -> None:
    """Let the loop do all that it can do now."""
    for _ in range(20):
        await asyncio.sleep(0)


def test_what_is_sent_now_is_there_at_once() -> None:
    async def use(stream: EventStream, source: Source, connection: Connection) -> None:
        assert stream.is_idle
        stream.send_now(b"second;")
        stream.send_now(b"")
        assert connection.bodies == [b"first;", b"second;"]
        source.queue.put_nowait(b"third;")

    assert run(use) == [b"first;", b"second;", b"third;", b""]


def test_a_connection_that_takes_nothing_is_waited_for() -> None:
    async def use(stream: EventStream, source: Source, connection: Connection) -> None:
        connection.is_open.clear()
        stream.send_now(b"second;")
        assert not stream.is_idle
        source.queue.put_nowait(b"third;")
        await turns()
        assert connection.bodies == [b"first;"]
        assert not stream.is_idle
        connection.is_open.set()
        await turns()
        assert connection.bodies == [b"first;", b"second;", b"third;"]
        assert stream.is_idle

    assert run(use) == [b"first;", b"second;", b"third;", b""]


@pytest.mark.parametrize("waits", [False, True])
def test_an_error_of_sending_is_raised(waits: bool) -> None:
    async def use(stream: EventStream, source: Source, connection: Connection) -> None:
        connection.fails = True
        if waits:
            connection.is_open.clear()
            stream.send_now(b"second;")
            connection.is_open.set()
            await turns()
            source.queue.put_nowait(b"third;")
            await turns()
        else:
            with pytest.raises(OSError, match="broken"):
                stream.send_now(b"second;")
        assert not stream.is_idle

    assert run(use) == [b"first;", *([b"error: broken;"] if waits else []), b""]


def test_leaving_ends_what_waits_for_the_connection() -> None:
    async def main() -> None:
        source, connection = Source(), Connection()
        stream = EventStream(source.events, keep_alive_s=60, on_error=lambda error: b"")
        has_left = asyncio.Event()

        async def receive() -> dict[str, str]:
            await has_left.wait()
            return {"type": "http.disconnect"}

        answering = asyncio.create_task(stream({BODY_SEND: connection.send}, receive, connection.send))
        source.queue.put_nowait(b"first;")
        await turns()
        connection.is_open.clear()
        stream.send_now(b"second;")
        has_left.set()
        await answering
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert connection.bodies == [b"first;"]

    asyncio.run(main())


def test_without_the_short_way_nothing_is_sent_at_once() -> None:
    async def use(stream: EventStream, source: Source, connection: Connection) -> None:
        assert not stream.is_idle

    assert run(use, has_short_way=False) == [b"first;", b""]
