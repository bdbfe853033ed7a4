"""Answers that end as soon as their client leaves, and streams of server-sent events."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator, Mapping
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from radixkv.serving.wire import to_json

T = TypeVar("T")

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
BODY_SEND = "radixkv.body_send"
"""Where a scope has the short way for the body of an answer that has begun: past middleware that awaits its start.

It must be the server's own: `send_now` begins to send outside of a task.
"""


class ClientGoneError(Exception):
    """The client has left, and nobody waits for an answer."""


def event(data: Mapping[str, Any], name: str | None = None) -> bytes:
    """A server-sent event.

    >>> event({"a": 1}), event({}, "ping")
    (b'data: {"a":1}\\n\\n', b'event: ping\\ndata: {}\\n\\n')
    """
    head = b"" if name is None else b"event: %s\n" % name.encode()
    return b"%sdata: %s\n\n" % (head, to_json(data))


class EventForm:
    """Makes events that differ in one text alone, without writing the rest of their JSON anew.

    >>> EventForm(lambda text: {"n": 1, "text": text, "end": None}).event("one \\"two\\"")
    b'data: {"n":1,"text":"one \\\\"two\\\\"","end":null}\\n\\n'
    """

    def __init__(self, data_with: Callable[[str], Mapping[str, Any]]) -> None:
        """Args: data_with: the data of an event with a text, which it holds in one place."""
        mark = f"text-{secrets.token_hex(16)}"
        before, _, after = event(data_with(mark)).partition(to_json(mark))
        self._before, self._after = before, after

    def event(self, text: str) -> bytes:
        """The event with `text`."""
        return b"".join((self._before, to_json(text), self._after))


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled at once if the client leaves. Raises: ClientGoneError."""
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(_wait_until_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        await _end(task, gone)


class EventStream(Response):
    """A stream of server-sent events, which ends as soon as the client leaves.

    An error before the first event is raised, so that it becomes an answer with a status of its own; a later one
    becomes an event. While there is nothing to say, a comment keeps the connection open. An event is made once the
    one before it was taken: a slow client holds up nobody, and is owed no more than what fits its connection's buffer.

    While it `is_idle`, `send_now` sends an event without resuming the stream's task.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: Callable[[EventStream], AsyncGenerator[bytes]],
        *,
        keep_alive_s: float,
        on_error: Callable[[Exception], bytes],
    ) -> None:
        """Args: events: makes the events, for this stream. on_error: the event that tells of an error."""
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events(self)
        self._keep_alive_s = keep_alive_s
        self._on_error = on_error
        self._loop = asyncio.get_running_loop()
        self._last_sent_at = self._loop.time()
        self._has_begun = self._is_sending = False
        self._comment = asyncio.Lock()  # held while one is being sent
        self._has_short_way = False
        self._unsent: asyncio.Task[None] | None = None  # sends the rest of what `send_now` was given

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer. Raises: what the events raise before the first one."""
        self._start = send
        self._send_body: Send = scope.get(BODY_SEND, send)
        self._has_short_way = BODY_SEND in scope
        sender = asyncio.create_task(self._send_all())
        gone = asyncio.create_task(_wait_until_gone(receive))
        keeper = asyncio.create_task(self._keep_alive())
        try:
            await asyncio.wait({sender, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sender.done():
                sender.result()
        finally:
            unsent = () if self._unsent is None else (self._unsent,)
            await _end(sender, gone, keeper, *unsent)
            await self._events.aclose()

    @property
    def is_idle(self) -> bool:
        """Whether it has begun, and nothing is being sent."""
        return self._has_short_way and self._has_begun and not self._is_sending and not self._comment.locked()

    def send_now(self, data: bytes) -> None:
        """Send `data`, if any; only while it `is_idle`. If the connection must be waited for, it stays busy until then.

        Raises: what sending raises; if it had to wait, that is raised where the next event is sent.
        """
        assert not self._is_sending, "events would overtake each other"
        if not data:
            return
        self._is_sending = True
        steps = self._send_body({"type": "http.response.body", "body": data, "more_body": True}).__await__()
        try:
            awaited = next(steps)
        except StopIteration:
            self._was_sent()
        else:
            self._unsent = asyncio.create_task(self._send_rest(_Rest(steps, awaited)))

    async def _send_all(self) -> None:
        try:
            async for data in self._events:
                await self._send(data)
        except Exception as error:
            if not self._has_begun:
                raise
            await self._send(self._on_error(error))
        await self._send(b"", more=False)

    async def _send_rest(self, rest: _Rest) -> None:
        await rest
        self._was_sent()

    def _was_sent(self) -> None:
        self._last_sent_at = self._loop.time()
        self._is_sending = False

    async def _send(self, data: bytes, *, more: bool = True) -> None:
        if self._unsent is not None:
            unsent, self._unsent = self._unsent, None
            await unsent
        if self._comment.locked():
            async with self._comment:  # it goes first
                pass
        self._is_sending = True
        if not self._has_begun:
            await self._begin()
        await self._send_body({"type": "http.response.body", "body": data, "more_body": more})
        if more:
            self._was_sent()  # after the last one nothing may follow

    async def _begin(self) -> None:
        self._has_begun = True
        await self._start({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

    async def _keep_alive(self) -> None:
        """Send a comment after each silence, but none to a client that has not taken what was sent before."""
        while True:
            silent_s = self._loop.time() - self._last_sent_at
            if silent_s < self._keep_alive_s:
                await asyncio.sleep(self._keep_alive_s - silent_s)
            elif self._is_sending:
                await asyncio.sleep(self._keep_alive_s)
            else:
                async with self._comment:
                    if not self._has_begun:
                        await self._begin()
                    await self._send_body({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
                    self._last_sent_at = self._loop.time()


class _Rest:
    """What is left of an awaitable that was begun outside of a task, and now awaits a future."""

    def __init__(self, steps: Generator[Any, Any, None], awaited: Any) -> None:
        self._steps = steps
        self._awaited = awaited

    def __await__(self) -> Generator[Any, Any, None]:
        try:
            yield self._awaited
        except BaseException:
            self._steps.close()
            raise
        yield from self._steps


async def _wait_until_gone(receive: Callable[[], Awaitable[Mapping[str, Any]]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Future[Any]) -> None:
    """Cancel `tasks` and wait until they have ended, whatever they raise."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # so that nobody is told that it was not asked for
