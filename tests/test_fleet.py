"""A router's fleet and what its clients get, with replicas that answer as a test says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Any

import pytest

from radixkv.cache.page_keys import root_key
from radixkv.cluster.callers import Callers
from radixkv.cluster.fleet import Asked, Fleet
from radixkv.cluster.known_prompts import PromptReader
from radixkv.cluster.replica_link import ReplicaAnswer, ReplicaCall, ReplicaLostError
from radixkv.cluster.route_app import RouteApp
from radixkv.cluster.route_server import Readers
from radixkv.cluster.router.cost import CostRouter
from radixkv.cluster.serve_call import AnswerHead
from radixkv.cluster.serve_replica import answer_of
from radixkv.cluster.stored_responses import holder_of
from radixkv.errors import NoReplicaError

INFO: dict[str, Any] = {
    "model_path": "demo",
    "page_size": 4,
    "vocab_size": 512,
    "has_tenants": False,
    "started_at": 1,
    "kv_events": None,
    "caller": {"namespace": None},
}
Found = ReplicaAnswer | Exception
LOST = ReplicaLostError("the test says so")
KEEP_ALIVE = b": keep-alive\n\n"


def says(status: int, body: object = None) -> ReplicaAnswer:
    """An answer with JSON, or with bytes that are none."""
    return _answer(status, b"application/json", [body if isinstance(body, bytes) else json.dumps(body).encode()])


def streams(*events: bytes | Exception) -> ReplicaAnswer:
    return _answer(200, b"text/event-stream", events)


def _answer(status: int, kind: bytes, parts: Iterable[bytes | Exception]) -> ReplicaAnswer:
    async def chunks() -> AsyncGenerator[bytes]:
        for part in parts:
            if isinstance(part, Exception):
                raise part
            yield part

    return ReplicaAnswer(status, [(b"content-type", kind)], chunks())


class ScriptedLink:
    """The way to a replica that answers as `answers` says, which a test may change."""

    host = "127.0.0.1"

    def __init__(self, name: str, answers: Callable[[ReplicaCall], Found]) -> None:
        self.name, self.answers = name, answers
        self.calls: list[ReplicaCall] = []

    async def send(self, call: ReplicaCall) -> ReplicaAnswer:
        self.calls.append(call)
        found = self.answers(call)
        if isinstance(found, Exception):
            raise found
        return found

    async def close(self) -> None: ...


def replica(*others: Found, ready: int = 200, info: Callable[[], Found] = lambda: says(200, INFO)) -> Any:
    """What a replica answers: to what is no look at it, one of `others` after another."""
    left = iter(others)

    def answers(call: ReplicaCall) -> Found:
        if call.target == "/ready":
            return says(ready)
        return info() if call.target == "/server_info" else next(left)

    return answers


def fleet_of(*links: ScriptedLink) -> Fleet:
    """A fleet that has looked at each of its replicas."""
    found = Fleet(CostRouter(), clock=lambda: 0.0)
    for link in links:
        found.join(link)
    asyncio.run(found.check_all())
    return found


def chosen(fleet: Fleet) -> str | None:
    """Where a request would go now; None if nowhere."""
    try:
        return fleet.would_choose(Asked("", (), None)).replica
    except NoReplicaError:
        return None


def state_of(fleet: Fleet, name: str = "a") -> tuple[str, str]:
    return fleet.members[name].state, fleet.members[name].trouble


# ------------------------------------------------------------------------------------------------- how a replica is


@pytest.mark.parametrize(
    ("answers", "state", "trouble"),
    [
        pytest.param(replica(), "up", "", id="fine"),
        pytest.param(replica(ready=503), "draining", "it finishes what it has", id="drains"),
        pytest.param(lambda call: LOST, "down", "the test says so", id="lost"),
        pytest.param(replica(info=lambda: says(401)), "refused", "it needs a key; give the router one", id="no key"),
        pytest.param(replica(info=lambda: says(404)), "refused", "answers with status 404; is it a", id="other server"),
        pytest.param(replica(info=lambda: says(200, {})), "refused", "does not say its page_size in", id="no facts"),
        pytest.param(replica(info=lambda: says(200, [1])), "down", "is no JSON object; is this a", id="no object"),
        pytest.param(replica(info=lambda: says(200, b"<p>")), "down", "is no JSON object; is this a", id="no JSON"),
    ],
)
def test_what_it_answers_decides_whether_a_replica_is_used(answers: Any, state: str, trouble: str) -> None:
    fleet = fleet_of(ScriptedLink("a", answers))
    found, why = state_of(fleet)
    assert found == state
    assert trouble in why
    assert chosen(fleet) == ("a" if state == "up" else None)


def test_a_replica_that_does_not_answer_in_time_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    class SilentLink(ScriptedLink):
        async def send(self, call: ReplicaCall) -> ReplicaAnswer:
            await asyncio.Event().wait()
            raise AssertionError("nobody sets it")

    monkeypatch.setattr("radixkv.cluster.fleet.CHECK_TIMEOUT_S", 0.0)
    assert state_of(fleet_of(SilentLink("a", replica()))) == ("down", "no answer in 0 s")


def test_a_replica_that_comes_back_as_something_else_gets_no_requests() -> None:
    link = ScriptedLink("a", replica())
    fleet = fleet_of(link, ScriptedLink("b", replica()))
    link.answers = replica(ready=404, info=lambda: says(200, {**INFO, "page_size": 8}))
    asyncio.run(fleet.check("a"))
    found, why = state_of(fleet)
    assert found == "refused"
    assert "all replicas must have the same page_size; a has 8, and others have 4" in why
    assert chosen(fleet) == "b"


def test_a_replica_that_drained_is_used_again_when_it_is_ready() -> None:
    for first in (200, 503):  # it was up, or drained when it was first seen
        link = ScriptedLink("a", replica(ready=first))
        fleet = fleet_of(link)
        link.answers = replica(ready=503)
        asyncio.run(fleet.check("a"))
        assert (state_of(fleet)[0], chosen(fleet)) == ("draining", None)
        link.answers = replica()
        asyncio.run(fleet.check("a"))
        assert (state_of(fleet), chosen(fleet)) == (("up", ""), "a")


def test_a_replica_that_leaves_while_it_is_looked_at_stays_away() -> None:
    link = ScriptedLink("a", replica())
    fleet = fleet_of(link)

    def leaves() -> Found:
        fleet.leave("a")
        return says(200, INFO)

    link.answers = replica(ready=404, info=leaves)
    asyncio.run(fleet.check("a"))
    asyncio.run(fleet.check("a"))  # it is nobody's
    assert (fleet.members, chosen(fleet)) == ({}, None)
    with pytest.raises(ReplicaLostError, match="a has left"):
        fleet.link("a")


def test_what_any_replica_can_answer_goes_to_each_in_turn() -> None:
    links = [ScriptedLink(name, replica()) for name in "abc"]
    fleet = fleet_of(*links)
    fleet.drains("c")
    assert [fleet.next_but(()) for _ in range(4)] == ["a", "b", "a", "b"]
    assert {fleet.next_but({"a"}) for _ in range(3)} == {"b"}
    with pytest.raises(NoReplicaError) as error:
        fleet.next_but({"a", "b"})
    assert (error.value.known, error.value.draining) == (3, 1)


def test_a_fault_in_one_look_is_not_the_last_look(caplog: pytest.LogCaptureFixture) -> None:
    fleet = fleet_of(ScriptedLink("a", replica()))

    async def main() -> None:
        loop, again = asyncio.get_running_loop(), asyncio.Event()
        failures = [OSError("no tokenizer now")]

        def prepare() -> None:
            if failures:
                raise failures.pop()
            loop.call_soon_threadsafe(again.set)

        task = asyncio.create_task(fleet.keep_checking(0.0, prepare))
        await again.wait()
        task.cancel()

    asyncio.run(main())
    assert "the replicas could not be looked at" in caplog.text
    assert "no tokenizer now" in caplog.text


def test_a_replica_whose_events_cannot_be_followed_is_used_without(caplog: pytest.LogCaptureFixture) -> None:
    sources = {"endpoint": "tcp://127.0.0.1:1"}  # no address for replays
    fleet = fleet_of(ScriptedLink("a", replica(info=lambda: says(200, {**INFO, "kv_events": sources}))))
    try:
        assert chosen(fleet) == "a"
        assert "the events of a are not followed: 'replay_endpoint'" in caplog.text
        assert fleet.rows()[0]["events_are_current"] is None
    finally:
        fleet.close()


# ------------------------------------------------------------------------------------------------- what replicas know


def tenants(namespace: str) -> Callable[[], Found]:
    return lambda: says(200, {**INFO, "has_tenants": True, "caller": {"namespace": namespace}})


def test_the_namespace_of_a_key_is_asked_for_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    link, now = ScriptedLink("a", replica(info=tenants("red"))), [0.0]
    callers = Callers(fleet_of(link), lambda: now[0])

    def key_of(key: bytes) -> tuple[bytes | None, int]:
        """The root key, and how many times a replica was asked for it."""
        link.calls.clear()
        return asyncio.run(callers.namespace_key([(b"authorization", key)], "salt")), len(link.calls)

    red = root_key("red", "salt")
    assert [key_of(b"1"), key_of(b"1")] == [(red, 1), (red, 0)]
    now[0] = 61.0
    assert key_of(b"1") == (red, 1)
    monkeypatch.setattr("radixkv.cluster.callers.MAX_CALLERS", 2)
    assert [key_of(key)[1] for key in (b"2", b"1", b"3")] == [1, 0, 1], "the one that was asked for last is kept"
    assert [key_of(key)[1] for key in (b"1", b"3", b"2")] == [0, 0, 1]
    link.answers = replica(info=lambda: says(401))
    assert key_of(b"4") == (None, 1)


def test_a_lost_replica_is_not_asked_whose_key_it_is() -> None:
    links = [ScriptedLink(name, replica(info=tenants("red"))) for name in "ab"]
    fleet = fleet_of(*links)
    links[0].answers = lambda call: LOST
    keys = Callers(fleet)
    assert asyncio.run(keys.namespace_key([], None)) == root_key("red", None)
    assert state_of(fleet)[0] == "down"
    links[1].answers = lambda call: LOST
    assert asyncio.run(keys.namespace_key([(b"x-api-key", b"1")], None)) is None
    assert asyncio.run(Callers(fleet_of()).namespace_key([], None)) is None, "no replica has answered yet"


def test_a_stored_response_is_looked_for_where_replicas_answer() -> None:
    fleet = fleet_of(
        ScriptedLink("a", replica(LOST)),
        ScriptedLink("b", replica(says(404))),
        ScriptedLink("c", replica(says(200), says(404))),
    )
    assert asyncio.run(holder_of(fleet, "resp_1", ())) == "c"
    fleet.leave("a")
    fleet.leave("b")
    assert asyncio.run(holder_of(fleet, "resp_1", ())) is None


def test_without_the_models_tokenizer_requests_are_routed_by_load(caplog: pytest.LogCaptureFixture) -> None:
    fleet = Fleet(CostRouter())
    readers = Readers(fleet)
    assert readers() is None, "no replica has answered yet"
    fleet = fleet_of(ScriptedLink("a", replica(info=lambda: says(200, {**INFO, "model_path": "/no/such/model"}))))
    readers = Readers(fleet)
    assert readers() is None
    assert readers() is None
    assert caplog.text.count("requests are routed by load alone: ") == 1


def test_why_a_prompt_is_not_known_is_told() -> None:
    reader = PromptReader(None, 512)  # of a model without a tokenizer

    def read(body: object) -> Any:
        return asyncio.run(reader.read("/v1/completions", json.dumps(body).encode()))

    assert [ids.tolist() for ids in read({"prompt": [3, 4]}).prompts] == [[3, 4]]
    assert (read({"prompt": [[3], [512]]}).prompts, read({"prompt": "a"}).prompts) == (None, None)
    assert read({"prompt": "a"}).why_not.startswith("its prompt cannot be made: ")
    assert "512" in read({"prompt": [[3], [512]]}).why_not
    assert read({"max_tokens": "many"}).why_not == "the body is not as this path takes it"


# ------------------------------------------------------------------------------------------------- what clients get


def ask(fleet: Fleet, method: str, target: str, body: object = None) -> tuple[int, dict[bytes, bytes], str]:
    """The status, headers and body of a router's answer."""

    async def main() -> tuple[int, dict[bytes, bytes], str]:
        content = b"" if body is None else json.dumps(body).encode()
        pieces: list[Any] = [piece async for piece in answer_of(app, ReplicaCall(method, target, [], content))]
        assert isinstance(pieces[0], AnswerHead)
        return pieces[0].status, dict(pieces[0].headers), b"".join(pieces[1:]).decode()

    app = RouteApp(fleet, lambda: None)
    return asyncio.run(main())


def complete(fleet: Fleet) -> tuple[int, dict[bytes, bytes], str]:
    return ask(fleet, "POST", "/v1/completions", {"prompt": "a", "stream": True})


def test_what_all_replicas_say_as_they_turn_a_request_away_is_what_the_client_hears() -> None:
    full = {"error": {"message": "it is full"}}
    links = [ScriptedLink(name, replica(says(503, full))) for name in "ab"]
    fleet = fleet_of(*links)
    status, headers, body = complete(fleet)
    assert (status, json.loads(body)) == (503, full)
    assert b"x-radixkv-replica" not in headers
    assert [state_of(fleet, name)[0] for name in "ab"] == ["draining", "draining"]


def test_after_comments_an_error_is_an_event() -> None:
    """Keep-alive comments went out before the replica was lost: the answer has a head, and can get no status."""
    cases = {
        "no replica is left": ([streams(KEEP_ALIVE, LOST), LOST], 503, "no_replica"),
        "the next one refuses": ([streams(KEEP_ALIVE, LOST), says(400, {"error": {}})], 400, None),
    }
    for case, (found, code, word) in cases.items():
        answers = replica(*found)
        status, _, body = complete(fleet_of(ScriptedLink("a", answers), ScriptedLink("b", answers)))
        assert (status, body[: len(KEEP_ALIVE)]) == (200, KEEP_ALIVE.decode()), case
        error = json.loads(body[len(KEEP_ALIVE) :].removeprefix("data: "))["error"]
        assert error["code"] == word, case
        assert error["type"] == ("server_error" if code == 503 else "invalid_request_error"), case


def test_a_stream_without_events_has_a_head_and_ends() -> None:
    status, headers, body = complete(fleet_of(ScriptedLink("a", replica(streams()))))
    assert (status, headers[b"x-radixkv-replica"], body) == (200, b"a", "")
    assert b"by load alone: the router has no tokenizer for this model" in headers[b"x-radixkv-route"]


def test_what_one_replica_alone_can_answer_is_lost_with_it() -> None:
    fleet = fleet_of(ScriptedLink("a", replica(LOST)), ScriptedLink("b", replica()))
    status, headers, body = ask(fleet, "GET", "/replicas/0/v1/models")
    assert (status, headers[b"retry-after"]) == (503, b"1")
    assert json.loads(body)["error"]["code"] == "no_replica"
    assert [state_of(fleet, name)[0] for name in "ab"] == ["down", "up"]


def test_a_router_without_replicas_explains_nothing() -> None:
    status, _, body = ask(fleet_of(), "POST", "/route/explain", {"prompt": "a"})
    assert (status, json.loads(body)["error"]["code"]) == (503, "no_replica")


def test_a_replica_that_is_lost_as_all_are_asked_is_missing_from_the_answer() -> None:
    fleet = fleet_of(
        ScriptedLink("a", replica(LOST)), ScriptedLink("b", replica(says(200, {"freed_tokens": 8, "kept_tokens": 1})))
    )
    _, _, body = ask(fleet, "POST", "/v1/cache/flush")
    found = json.loads(body)
    assert (found["freed_tokens"], found["missing"]) == (8, {"a": "the test says so"})
    assert state_of(fleet)[0] == "down"


@pytest.mark.parametrize(
    ("body", "message"),
    [({"error": {"message": "not yours"}}, "not yours"), (b"<p>", "the replicas refuse this")],
)
def test_a_refusal_of_all_replicas_is_the_routers(body: object, message: str) -> None:
    status, _, answer = ask(fleet_of(ScriptedLink("a", replica(says(403, body)))), "GET", "/v1/cache/stats")
    assert (status, json.loads(answer)["error"]["message"]) == (403, message)
