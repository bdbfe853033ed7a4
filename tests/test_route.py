"""The router in front of servers: nothing of an answer changes, and a lost replica is made up for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

import anthropic
import httpx2 as httpx
import openai
import pytest

from http_server import Running, new_anthropic, new_openai, running
from live_stream import LiveReader
from radixkv.errors import ConfigError, MissingPackageError
from routed_servers import Routed, new_engine, routed
from stress_cases import some_of

PROMPT = "First Citizen: Before we proceed any further, hear me speak. All: Speak, speak. "
CHAT = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 12, "temperature": 0}
FACES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True},
    "/v1/chat/completions": {**CHAT, "stream_options": {"include_usage": True}},
    "/v1/responses": {"input": PROMPT, "max_output_tokens": 12, "temperature": 0},
    "/v1/messages": CHAT,
}


@pytest.fixture(scope="module")
def replicas() -> Iterator[list[Running]]:
    with ExitStack() as servers:
        yield [servers.enter_context(running(new_engine())) for _ in range(2)]


@pytest.fixture(scope="module")
def both(replicas: list[Running]) -> Iterator[Routed]:
    with routed(replicas) as router:
        yield router


@pytest.fixture(autouse=True)
def _as_new(request: pytest.FixtureRequest) -> None:
    """Both replicas up, and nothing about to break."""
    if "both" in request.fixturenames:
        router: Routed = request.getfixturevalue("both")
        for link in router.links:
            link.breaks(0, 0)
            link.calls.clear()
            link.streams.clear()
        router.wait_until(lambda: all(router.state_of(number) == "up" for number in range(2)))


def text_of(events: str) -> str:
    """The text that a stream of any interface brings."""
    text = ""
    for line in events.splitlines():
        if line.startswith("data: {"):
            data = json.loads(line[6:])
            if data.get("type") == "response.output_text.delta":
                text += data["delta"]
            elif data.get("type") == "content_block_delta":
                text += data["delta"]["text"]
            elif data.get("choices"):
                choice = data["choices"][0]
                text += choice.get("text") or (choice.get("delta") or {}).get("content") or ""
    return text


def ask(router: Routed, path: str, **fields: Any) -> httpx.Response:
    with router.http() as client:
        return client.post(path, json={**FACES[path], **fields})


@pytest.mark.parametrize("path", FACES)
def test_streams_and_answers_pass_byte_for_byte(both: Routed, path: str) -> None:
    for stream in (True, False):
        answer = ask(both, path, stream=stream)
        assert answer.status_code == 200
        (sent,) = [stream for link in both.links for stream in link.streams]
        assert answer.content == sent
        assert answer.headers["x-radixkv-replica"] in {link.name for link in both.links}
        assert "tokens of the prompt are cached there" in answer.headers["x-radixkv-route"]
        (call,) = [call for link in both.links for call in link.calls]
        assert json.loads(call.body) == {**FACES[path], "stream": stream}
        for link in both.links:
            link.calls.clear()
            link.streams.clear()


def test_the_second_request_goes_where_the_first_one_went(both: Routed) -> None:
    body = {"prompt": f"{PROMPT * 3} Is it so?", "max_tokens": 2, "temperature": 0}
    with both.http() as client:
        first = client.post("/v1/completions", json=body)
        explained = client.post("/route/explain", json=body).json()
        second = client.post("/v1/completions", json=body)
    assert first.headers["x-radixkv-replica"] == second.headers["x-radixkv-replica"] == explained["replica"]
    usage = second.json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1
    assert explained["cached_tokens"] == usage["prompt_tokens"] - 1
    assert {cost["replica"] for cost in explained["costs"]} == {link.name for link in both.links}


def test_what_a_replica_forgets_is_not_expected_of_it(both: Routed, replicas: list[Running]) -> None:
    body = {"prompt": f"{PROMPT} Once only.", "max_tokens": 2, "temperature": 0}
    with both.http() as client:
        client.post("/v1/completions", json=body)
        flushed = client.post("/v1/cache/flush").json()
        assert flushed["freed_tokens"] == sum(one["freed_tokens"] for one in flushed["replicas"].values()) > 0
        while client.post("/route/explain", json=body).json()["cached_tokens"]:  # until the event has come
            pass


@pytest.mark.parametrize(
    ("path", "stream"),
    [
        pytest.param(path, stream, marks=[] if stream == (number % 2 == 0) else [pytest.mark.stress])
        for number, path in enumerate(FACES)
        for stream in (False, True)
    ],
)
def test_one_that_is_lost_before_its_first_token_is_made_up_for(both: Routed, path: str, stream: bool) -> None:
    whole = ask(both, path, stream=stream)
    first = next(link for link in both.links if link.streams)
    first.breaks(0)
    again = ask(both, path, stream=stream)
    assert again.status_code == 200
    assert again.headers["x-radixkv-replica"] != first.name
    if stream:
        assert text_of(again.text) == text_of(whole.text) != ""
    else:
        texts = [json.dumps(answer.json().get("choices") or answer.json().get("content")) for answer in (whole, again)]
        assert texts[0] == texts[1]


def test_an_answer_that_breaks_off_before_its_end_is_asked_for_anew(both: Routed) -> None:
    whole = ask(both, "/v1/completions")
    next(link for link in both.links if link.streams).breaks(1)
    assert ask(both, "/v1/completions").json()["choices"] == whole.json()["choices"]


def test_without_any_replica_left_the_client_is_told_to_try_again(both: Routed) -> None:
    both.break_all(0, 1)
    answer = ask(both, "/v1/messages")
    assert answer.status_code == 503
    assert answer.json()["error"]["type"] == "overloaded_error"
    assert answer.headers["retry-after"] == "1"


def test_one_that_is_lost_later_ends_the_stream_with_an_error_of_its_interface(both: Routed) -> None:
    both.break_all(5, 1)
    events = ask(both, "/v1/responses", stream=True).text
    last = json.loads(events.strip().splitlines()[-1][6:])
    assert (last["type"], last["code"], last["sequence_number"]) == ("error", "replica_lost", 5)
    both.wait_until(lambda: all(both.state_of(number) == "up" for number in range(2)))
    both.break_all(2, 1)
    with new_openai(both.address) as client, pytest.raises(openai.APIError, match="was lost"):
        list(client.completions.create(model="demo", prompt=PROMPT, max_tokens=9, stream=True))
    both.wait_until(lambda: all(both.state_of(number) == "up" for number in range(2)))
    both.break_all(3, 1)
    body: dict[str, Any] = {"model": "demo", "max_tokens": 9, "messages": [{"role": "user", "content": "Speak."}]}
    with new_anthropic(both.address) as speaker, pytest.raises(anthropic.APIStatusError, match="was lost"):
        list(speaker.messages.create(**body, stream=True))


@pytest.mark.parametrize("path", some_of(FACES, {"/v1/responses", "/v1/messages"}))
def test_a_stream_goes_on_at_another_replica_if_the_client_asked_for_it(both: Routed, path: str) -> None:
    short = {name: 6 for name in ("max_tokens", "max_output_tokens") if name in FACES[path]}
    whole = ask(both, path, stream=True, radixkv_continue=True, **short)
    text = text_of(whole.text)
    assert "radixkv-ids" not in whole.text
    for events in range(1, whole.text.count("data: ")):
        both.wait_until(lambda: all(both.state_of(number) == "up" for number in range(2)))
        for link in both.links:
            link.calls.clear()
        both.break_next(events)
        answer = ask(both, path, stream=True, radixkv_continue=True, **short)
        assert [len(link.calls) for link in both.links] == [1, 1], "it was lost, and went on at the other one"
        assert text_of(answer.text) == text, events
        assert answer.text.count("[DONE]") == whole.text.count("[DONE]")
        names = re.findall(r'"(?:chatcmpl-|cmpl-|resp_|msg_)[0-9a-f]{24}"', answer.text)
        assert len(set(names)) == len(set(re.findall(r'"(?:chatcmpl-|cmpl-|resp_|msg_)[0-9a-f]{24}"', whole.text)))
        kinds = [re.findall(r"^event: (.*)$", content, re.MULTILINE) for content in (answer.text, whole.text)]
        assert list(dict.fromkeys(kinds[0])) == list(dict.fromkeys(kinds[1]))
        numbers = [int(number) for number in re.findall(r'"sequence_number":(\d+)', answer.text)]
        assert numbers == list(range(len(numbers)))


def test_a_stream_without_token_ids_does_not_go_on(both: Routed) -> None:
    both.break_all(2, 1)
    fields = {"stream": True, "radixkv_continue": True, "n": 2}
    events = ask(both, "/v1/completions", **fields).text
    assert '"code":"replica_lost"' in events


def test_stored_responses_are_found_where_they_are(both: Routed) -> None:
    with both.http() as client:
        stored = client.post("/v1/responses", json=FACES["/v1/responses"])
        name = stored.json()["id"]
        body = {"input": "And then?", "previous_response_id": name, "max_output_tokens": 2}
        for _ in range(3):
            later = client.post("/v1/responses", json=body)
            assert later.status_code == 200
            assert later.headers["x-radixkv-replica"] == stored.headers["x-radixkv-replica"]
        assert client.get(f"/v1/responses/{name}").json() == stored.json()
        assert client.delete(f"/v1/responses/{name}").json()["deleted"]
        assert client.get(f"/v1/responses/{name}").status_code == 404
        assert client.post("/v1/responses", json=body).json()["error"]["code"] == "response_not_found"


def test_what_tells_of_a_server_tells_of_all(both: Routed) -> None:
    with both.http() as client:
        stats = client.get("/v1/cache/stats").json()
        assert stats["query_tokens"] == sum(one["query_tokens"] for one in stats["replicas"].values()) > 0
        assert stats["pool"]["pages"] == 512
        metrics = client.get("/metrics").text
        for link in both.links:
            assert f'vllm:prompt_tokens_total{{replica="{link.name}",' in metrics
            assert f'radixkv_route_replica_up{{replica="{link.name}"}} 1.0' in metrics
        assert "radixkv_route_retries_total" in metrics
        info = client.get("/server_info").json()
        assert [row["state"] for row in info["replicas"]] == ["up", "up"]
        assert [row["events_are_current"] for row in info["replicas"]] == [True, True]
        assert client.get("/v1/models").json()["data"][0]["id"] == "demo"
        assert client.post("/tokenize", json={"prompt": "a"}).json()["count"] > 0
        assert client.get("/nowhere").status_code == 404
        assert "<title>radixkv</title>" in client.get("/replicas/1/").text
        assert client.get("/replicas/7/").status_code == 404
        assert client.get("/health").json()["status"] == "ok"
        body = {"prompt": "Warm.", "keep_for_s": 1}
        assert client.post("/v1/cache/prewarm", json=body).json()["prompt_tokens"] > 0
        assert client.post("/v1/cache/explain", json={"prompt": "Warm."}).json()["cached_tokens"] > 0


def test_the_page_shows_the_replicas_side_by_side(both: Routed) -> None:
    folder = files("radixkv.cluster") / "page"
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert '"radixkv.cluster" = ["page/*"]' in project
    with both.http() as client:
        page = client.get("/")
        loaded = re.findall(r'(?:src|href)="([^"]+)"', page.text)
        assert {"live/page.css", "route/replicas.css", "route/replicas.js"} <= set(loaded)
        for path in ("", *loaded, "live/feed.js"):
            answer = client.get(f"/{path}")
            assert answer.status_code == 200, path
            assert "x-radixkv-replica" not in answer.headers, "the router has it itself, and needs no replica for it"
            policy = answer.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'; ")
            assert "frame-src 'self'" in policy
            assert "frame-ancestors 'self'" in policy
        for file in folder.iterdir():
            text = file.read_text(encoding="utf-8")
            assert not re.search(r"https?:|//[a-z]+\.", text), file
            assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son[a-z]+=\"|innerHTML", text), file
        for number in range(2):  # what is shown in a frame
            live = client.get(f"/replicas/{number}/")
            assert "frame-ancestors 'self'" in live.headers["content-security-policy"]
            for path in re.findall(r'(?:src|href)="([^"]+)"', live.text):
                assert not path.startswith("/"), "it is found below the frame's address"
                assert client.get(f"/replicas/{number}/{path}").status_code == 200
            with client.stream("GET", f"/replicas/{number}/v1/cache/live") as feed:
                assert next(feed.iter_lines()).startswith("event: ")
                assert feed.headers["x-radixkv-replica"] == both.links[number].name
        client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 1})
        found = client.get("/route/replicas").json()
    assert found["model"] == "demo"
    rows = found["replicas"]
    assert [(row["number"], row["replica"], row["state"]) for row in rows] == [
        (number, link.name, "up") for number, link in enumerate(both.links)
    ]
    assert all(row["queued_s"] == 0 and row["trouble"] is None for row in rows)
    assert all(0 <= row["hit_rate"] <= 1 and row["requests"]["running"] == 0 for row in rows)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_texts_are_shown_only_by_a_router_that_listens_on_loopback(replicas: list[Running], host: str) -> None:
    with routed(replicas[:1], host=host) as router, router.http() as client:
        client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 1})
        for path in ("/v1/cache/live", "/replicas/0/v1/cache/live", "/replicas/0/v1/cache/%256Cive"):
            with client.stream("GET", path, headers={"Host": "localhost"}) as feed:
                reader = LiveReader(feed.iter_lines())
                while not reader.state.get("tree", {}).get("tokens"):
                    reader.read()
            assert bool(reader.texts()) == (host == "127.0.0.1"), path


def test_errors_of_a_replica_are_its_own(both: Routed) -> None:
    with both.http() as client:
        answer = client.post("/v1/chat/completions", json={"messages": []})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
        assert "by load alone" in answer.headers["x-radixkv-route"]
        assert client.post("/v1/completions", content=b"{").status_code == 400
        large = client.post("/v1/completions", content=b" " * (17 << 20))
        assert (large.status_code, large.json()["error"]["code"]) == (413, "request_too_large")


def test_a_client_that_leaves_ends_its_request_at_the_replica(both: Routed, replicas: list[Running]) -> None:
    body = {"prompt": "ROMEO:", "max_tokens": 3000, "ignore_eos": True, "stream": True}
    with both.http() as client, client.stream("POST", "/v1/completions", json=body) as answer:
        assert next(answer.iter_lines())
    for replica in replicas:
        replica.wait_until(lambda stats: stats.running == 0)
        replica.check_idle()


def test_tenants_keep_their_namespaces(tmp_path: Path) -> None:
    keys = {name: sha256(name.encode()).hexdigest() for name in ("red", "blue", "root")}
    tables = [f'[[key]]\nname = "{name}"\nsha256 = "{digest}"\n' for name, digest in keys.items()]
    file = tmp_path / "keys.toml"
    file.write_text("".join(tables) + "admin = true\n")
    with ExitStack() as stack:
        servers = [stack.enter_context(running(new_engine(), api_keys=str(file))) for _ in range(2)]
        router = stack.enter_context(routed(servers, key="root"))
        red, blue, nobody, root = (stack.enter_context(router.http(key)) for key in ("red", "blue", None, "root"))
        body = {"prompt": PROMPT * 2, "max_tokens": 1}
        held = {}
        assert red.post("/v1/completions", json=body).status_code == 200
        for name, client, salt in (("red", red, None), ("blue", blue, None), ("salted", red, "s")):
            asked = body if salt is None else {**body, "cache_salt": salt}
            held[name] = client.post("/route/explain", json=asked).json()["cached_tokens"]
        assert held["red"] > 0
        assert (held["blue"], held["salted"]) == (0, 0)
        assert nobody.post("/v1/completions", json=body).status_code == 401
        assert nobody.get("/metrics").status_code == 401
        assert red.get("/v1/cache/stats").status_code == 403
        assert root.get("/v1/cache/stats").status_code == 200
        assert [client.get("/").status_code for client in (nobody, red, root)] == [200, 200, 200]
        assert [client.get("/route/replicas").status_code for client in (nobody, red, root)] == [401, 403, 200]


def test_a_replica_that_drains_gets_nothing_new_and_one_that_comes_back_does() -> None:
    with ExitStack() as stack:
        steady = stack.enter_context(running(new_engine()))
        leaving = stack.enter_context(running(new_engine()))
        router = stack.enter_context(routed([steady, leaving, "http://127.0.0.1:9"]))
        assert [router.state_of(number) for number in range(3)] == ["up", "up", "down"]
        leaving.service.admission.drain()
        with router.http() as client:
            for number in range(4):
                answer = client.post("/v1/completions", json={"prompt": f"{number}", "max_tokens": 1})
                assert answer.status_code == 200
                assert answer.headers["x-radixkv-replica"] == steady.address
        router.wait_until(lambda: router.state_of(1) == "draining")
        with router.http() as client:
            rows = client.get("/route/replicas").json()["replicas"]
        assert [row["queued_s"] for row in rows] == [0, None, None]
        assert rows[2]["hit_rate"] is rows[2]["requests"] is None
        assert rows[2]["trouble"]


def test_a_replica_with_other_pages_is_not_used() -> None:
    with running(new_engine()) as one, running(new_engine(page_size=8)) as other, routed([one, other]) as router:
        assert sorted([router.state_of(0), router.state_of(1)]) == ["refused", "up"]
        with router.http() as client:
            rows = client.get("/server_info").json()["replicas"]
        assert any("must have the same page_size" in (row["trouble"] or "") for row in rows)


def test_wrong_addresses_and_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from radixkv.cluster.http_link import checked_address
    from radixkv.cluster.requirements import check_ray_version, check_route_installed
    from radixkv.cluster.route_server import RouteServer

    for address in ("127.0.0.1:8000", "ftp://a", "", "http://a/?b", "http://[::1", "http://a:b"):
        with pytest.raises(ConfigError, match="a replica must be an address such as"):
            checked_address(address)
    with pytest.raises(ConfigError, match="at least one --replica"):
        RouteServer([])
    with pytest.raises(ConfigError, match=r"works with ray 2\.60\.\*; got 2\.7\.0"):
        check_ray_version("2.7.0")
    monkeypatch.setattr("radixkv.cluster.requirements.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"pip install 'radixkv\[route\]'"):
        check_route_installed()
