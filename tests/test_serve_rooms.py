"""The ingress and the replicas of Ray Serve, put together without Ray: a handle carries the calls, as Serve's does."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from http_server import SMALL
from radixkv.cluster.replica_link import ReplicaAnswer, ReplicaCall, ReplicaLostError
from radixkv.cluster.roster import ROSTER
from radixkv.cluster.serve_app import ClusterSettings
from radixkv.cluster.serve_call import AddressedCall, AnswerHead
from radixkv.cluster.serve_ingress import ServeIngress
from radixkv.cluster.serve_link import ServeLink
from radixkv.cluster.serve_replica import MAX_PIECES, ServeReplica, answer_of
from radixkv.errors import ConfigError
from radixkv.serving.errors import ApiError

Pieces = AsyncGenerator[Any]
HEAD = AnswerHead(200, [(b"content-type", b"text/plain")])
OK: Message = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]}


class ServeResponse:
    """What a handle of Serve returns for a call whose answer comes in pieces."""

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self.is_cancelled = False

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._pieces

    def cancel(self) -> None:
        self.is_cancelled = True


class ServeHandle:
    """Serve's handle of the replicas: it hands each call to the one that it is for, or to any."""

    def __init__(self, answers: Mapping[str, Callable[[AddressedCall], Pieces]]) -> None:
        self.answers = dict(answers)
        self.calls: list[AddressedCall] = []
        self.responses: list[ServeResponse] = []

    def options(self, *, stream: bool) -> ServeHandle:
        assert stream
        return self

    @property
    def answer(self) -> ServeHandle:
        return self

    def remote(self, call: AddressedCall) -> ServeResponse:
        answer = self.answers[call.replica or min(self.answers)]
        self.calls.append(call)
        self.responses.append(ServeResponse(answer(call)))
        return self.responses[-1]


class EndedOnce(ServeReplica):
    """A replica whose end is awaited, and which Python does not end again: Serve takes `__del__` away after it."""

    async def end(self) -> None:
        await super().__del__()

    def __del__(self) -> None: ...  # type: ignore[override]


async def pieces_of(app: ASGIApp, call: ReplicaCall) -> tuple[AnswerHead, bytes]:
    """The head and the body of an application's answer."""
    head, *body = [piece async for piece in answer_of(app, call)]
    assert isinstance(head, AnswerHead)
    return head, b"".join(piece for piece in body if isinstance(piece, bytes))


# ------------------------------------------------------------------------------------------------ answers as messages


def test_an_answer_is_its_head_and_then_its_body_as_it_comes() -> None:
    seen: dict[str, Any] = {}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.update(scope, received=await receive())
        await send(OK)
        for number in range(3 * MAX_PIECES):  # more than may wait
            await send({"type": "http.response.body", "body": b"%d " % number, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    call = ReplicaCall("POST", "/v1/a%20b?c=%20d", [(b"x-one", b"1")], b"asked")
    head, body = asyncio.run(pieces_of(app, call))
    assert head == HEAD
    assert body.split() == [b"%d" % number for number in range(3 * MAX_PIECES)]
    assert (seen["method"], seen["path"], seen["raw_path"]) == ("POST", "/v1/a b", b"/v1/a%20b")
    assert (seen["query_string"], seen["headers"]) == (b"c=%20d", [(b"x-one", b"1")])
    assert seen["received"] == {"type": "http.request", "body": b"asked", "more_body": False}


def test_an_application_is_told_when_its_reader_leaves_though_it_waits_for_room() -> None:
    received: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send(OK)
        for _ in range(2 * MAX_PIECES):  # it cannot put in all of them: nobody reads
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
        received.append(await receive())

    async def main() -> None:
        async with aclosing(answer_of(app, ReplicaCall("GET", "/"))) as pieces:
            assert await anext(pieces) == HEAD

    asyncio.run(main())
    assert received == [{"type": "http.disconnect"}]


def test_what_an_application_raises_ends_its_answer() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(OK)
        raise OSError("it broke")

    with pytest.raises(OSError, match="it broke"):
        asyncio.run(pieces_of(app, ReplicaCall("GET", "/")))


def test_a_link_reads_the_head_and_says_so_if_the_replica_is_lost() -> None:
    async def whole(call: AddressedCall) -> Pieces:
        yield HEAD
        yield call.call.body

    async def nothing(call: AddressedCall) -> Pieces:
        for _ in ():
            yield

    async def broken(call: AddressedCall) -> Pieces:
        yield HEAD
        raise RuntimeError("the actor died")

    handle = ServeHandle({"whole": whole, "nothing": nothing, "broken": broken})

    async def send(name: str) -> ReplicaAnswer:
        return await ServeLink(name, handle).send(ReplicaCall("POST", "/", (), b"a body"))

    async def main() -> None:
        answer = await send("whole")
        assert (answer.status, answer.headers) == (200, HEAD.headers)
        assert await answer.read() == b"a body"
        with pytest.raises(ReplicaLostError, match="nothing gave no answer"):
            await send("nothing")
        with pytest.raises(ReplicaLostError, match="broken: RuntimeError: the actor died"):
            await (await send("broken")).read()
        await (await send("whole")).chunks.aclose()
        await ServeLink("whole", handle).close()

    asyncio.run(main())
    assert [response.is_cancelled for response in handle.responses] == [False, False, True, True], (
        "what is not read to its end is ended at the replica"
    )


# ------------------------------------------------------------------------------------------ an ingress and its replica


@pytest.fixture
def _own_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray, as far as a replica asks it for the address of its machine."""
    ray = SimpleNamespace(util=SimpleNamespace(get_node_ip_address=lambda: "127.0.0.1"))
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.util", ray.util)


@pytest.fixture
def _as_new() -> Iterator[None]:
    yield
    ROSTER.follow(lambda: None)
    ROSTER.set(())


@asynccontextmanager
async def replica_of(**engine: Any) -> AsyncIterator[EndedOnce]:
    """A replica of the demo model, made and ended as by Serve."""
    replica = EndedOnce.__new__(EndedOnce)
    started: Awaitable[None] = replica.__init__("demo", {**SMALL, **engine}, {})  # type: ignore[misc]
    await started
    try:
        yield replica
    finally:
        await replica.end()


@asynccontextmanager
async def living(app: ASGIApp) -> AsyncIterator[None]:
    """An application that has started; at the end it is shut down."""
    told: asyncio.Queue[Message] = asyncio.Queue()
    said: asyncio.Queue[Message] = asyncio.Queue()
    lives: Coroutine[Any, Any, None] = app({"type": "lifespan"}, told.get, said.put)  # type: ignore[assignment]
    task = asyncio.create_task(lives)
    await told.put({"type": "lifespan.startup"})
    assert (await said.get())["type"] == "lifespan.startup.complete"
    try:
        yield
    finally:
        await told.put({"type": "lifespan.shutdown"})
        assert (await said.get())["type"] == "lifespan.shutdown.complete"
        await task


def asked(prompt: str) -> ReplicaCall:
    body = json.dumps({"prompt": prompt, "max_tokens": 3, "temperature": 0}).encode()
    return ReplicaCall("POST", "/v1/completions", [(b"content-type", b"application/json")], body)


@pytest.mark.usefixtures("_own_address", "_as_new")
def test_the_ingress_answers_with_the_replicas_that_serve_runs() -> None:
    async def rows(app: ASGIApp) -> dict[str, str]:
        _, body = await pieces_of(app, ReplicaCall("GET", "/route/replicas"))
        return {row["replica"]: row["state"] for row in json.loads(body)["replicas"]}

    async def main() -> None:
        async with replica_of(kv_events="tcp://*:0") as replica:
            handle = ServeHandle({"a": replica.answer, "b": replica.answer})
            app = ServeIngress(handle, "a-key", 1 << 20, True).__serve_build_asgi_app__()
            ROSTER.set(["a"])
            async with living(app):
                assert await rows(app) == {"a": "up"}
                hello, *others = handle.calls
                assert hello.replica is None, "the first call makes Serve's request router, which tells of the others"
                looked = [one.call for one in others if one.call.target == "/server_info"]
                assert looked
                assert all((b"authorization", b"Bearer a-key") in one.headers for one in looked)
                call = asked("First Citizen: Before we proceed any further, hear me speak.")
                head, body = await pieces_of(app, call)
                _, alone = await pieces_of(app, call)
                headers = dict(head.headers)
                assert (head.status, headers[b"x-radixkv-replica"]) == (200, b"a")
                own = [piece async for piece in replica.answer(AddressedCall("a", call))]
                assert isinstance(own[1], bytes)
                texts = [json.loads(answer)["choices"][0]["text"] for answer in (body, alone, own[1])]
                assert texts[0] == texts[1] == texts[2] != ""
                cached = json.loads(alone)["usage"]["prompt_tokens_details"]["cached_tokens"]
                assert cached == json.loads(alone)["usage"]["prompt_tokens"] - 1

                ROSTER.set(["a", "b"])  # Serve starts another one
                while await rows(app) != {"a": "up", "b": "up"}:
                    pass
                ROSTER.set(["b"])  # and takes the first one away
                while await rows(app) != {"b": "up"}:
                    pass
                head, _ = await pieces_of(app, call)
                assert dict(head.headers)[b"x-radixkv-replica"] == b"b"
            await replica.check_health()
        with pytest.raises(ApiError):
            await replica.check_health()  # so that Serve starts another one

    asyncio.run(main())


@pytest.mark.usefixtures("_own_address")
@pytest.mark.parametrize("events", ["tcp://127.0.0.1:0", None])
def test_a_replica_tells_the_address_of_its_events(events: str | None) -> None:
    async def main() -> Any:
        async with replica_of(kv_events=events) as replica:
            _, body = [piece async for piece in replica.answer(AddressedCall(None, ReplicaCall("GET", "/server_info")))]
            assert isinstance(body, bytes)
            return json.loads(body)["kv_events"]

    found = asyncio.run(main())
    assert found is None if events is None else found["endpoint"].startswith("tcp://127.0.0.1:")


# ------------------------------------------------------------------------------------------------------------ settings


def test_settings_go_to_the_config_that_knows_them_and_texts_are_read() -> None:
    given = {"model": "a/model", "replicas": "2", "page_size": "8", "dtype": "float32", "host": "0.0.0.0"}
    settings = ClusterSettings.of(given)
    assert settings.model == "a/model"
    assert settings.cluster == {"replicas": 2}
    assert settings.engine == {"page_size": 8, "dtype": "float32"}
    assert settings.server == {"host": "0.0.0.0"}
    assert ClusterSettings.of({"max_replicas": 4}).cluster == {"max_replicas": 4}
    with pytest.raises(ConfigError, match="unknown setting 'replica'; the settings are model, replicas, "):
        ClusterSettings.of({"replica": 2})
    with pytest.raises(ConfigError, match="replicas must be an integer"):
        ClusterSettings.of({"replicas": "two"})
