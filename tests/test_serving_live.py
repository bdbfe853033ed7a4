"""The live page's server side: its files, its feed, and who is told what."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

import pytest

from http_server import Running, new_demo_engine, new_http, running
from live_stream import LiveReader, live
from radixkv import SamplingParams
from radixkv.serving.live_feed import MAX_WATCHERS, LiveFeed
from radixkv.serving.live_page import PAGE_PATHS
from radixkv.serving.live_view import EngineViewer

PROMPT = "ROMEO:\nBut, soft! what light through yonder window breaks?"
ASK = {"model": "demo", "prompt": PROMPT, "max_tokens": 4, "temperature": 0.0}
KEYS = ("red", "blue", "boss")
FEW = SamplingParams(max_tokens=2)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as server:
        yield server


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    tables = [f"[[key]]\nname = '{name}'\nsha256 = '{sha256(f'key-{name}'.encode()).hexdigest()}'\n" for name in KEYS]
    file.write_text("".join(tables) + "admin = true\n")  # of the last one
    with running(new_demo_engine(), api_keys=str(file)) as server:
        yield server


@pytest.fixture(autouse=True)
def _empty(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    for name in ("server", "keyed"):
        if name in request.fixturenames:
            asyncio.run(request.getfixturevalue(name).engine.reset_cache())


def await_text(reader: LiveReader, text: str) -> None:
    """Read until `text` is cached: what comes first may be a second old."""
    while not any(text in each for each in reader.texts()):
        reader.read()


def test_the_page_comes_without_a_key_and_may_load_nothing_from_elsewhere(keyed: Running) -> None:
    http = keyed.http()
    for path in PAGE_PATHS:
        answer = http.get(path)
        assert answer.status_code == 200, path
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'self'" in policy
    assert http.get("/").headers["content-type"] == "text/html; charset=utf-8"
    assert http.get("/live/page.js").headers["content-type"].startswith("text/javascript")
    assert http.get("/live/nothing.js").status_code == 401


def test_each_file_of_the_page_is_served_and_ships_with_the_package() -> None:
    folder = files("radixkv.serving") / "page"
    names = {file.name for file in folder.iterdir()}
    assert {f"/live/{name}" for name in names - {"index.html"}} | {"/"} == PAGE_PATHS
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert '"radixkv.serving" = ["page/*"]' in project
    for name in names:
        text = (folder / name).read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//[a-z]+\.", text), name
        assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son[a-z]+=\"|innerHTML", text), name


def test_the_feed_needs_an_administrators_key(keyed: Running) -> None:
    assert keyed.http().get("/v1/cache/live").status_code == 401
    assert keyed.http().get("/v1/cache/live", params={"key": "key-boss"}).status_code == 401, "never in the URL"
    answer = keyed.http("key-red").get("/v1/cache/live")
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "admin_key_required"
    with live(keyed, "key-boss") as reader:
        assert reader.read()["pool"]["page_size"] == 16


def test_the_feed_tells_what_is_cached(server: Running) -> None:
    prompt = "Told: a prompt that nobody else has, of more than a page, and then of some more tokens"
    output, _ = (server.openai().completions.create(**{**ASK, "prompt": prompt}) for _ in range(2))
    with live(server) as reader:
        await_text(reader, "Told: a prompt")
        state = reader.state
        (root,) = [row for row in reader.nodes.values() if row[1] is None]
        assert root[8] == "shared"
        nodes = [row for row in reader.nodes.values() if row[1] is not None]
        first = next(row for row in nodes if row[1] == root[0])
        assert prompt.startswith(first[8].rstrip())
        assert first[3] >= 1, "the second request found it"
        assert abs(state["now"] - first[4]) < 600
        assert not any(row[5] or row[7] for row in nodes)
        assert sum(row[2] for row in nodes) == state["tree"]["tokens"] > output.usage.prompt_tokens - 16
        assert state["tree"]["is_whole"]
        assert state["model"] == "demo"
        pool = state["pool"]
        assert pool["free_pages"] + pool["pinned_pages"] + pool["evictable_pages"] + pool["leased_pages"] == 256
        assert [point["factor"] for point in state["what_if"]] == [0.125, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4]
        assert state["requests"]["running"] == 0
        assert state["requests"]["tokens_per_step"] is None, "an engine without drafts"
        miss = next(miss for miss in state["misses"] if miss["prompt_tokens"] == output.usage.prompt_tokens)
        assert miss["reason"] in ("never seen", "evicted")


def test_changes_alone_are_sent(server: Running) -> None:
    server.openai().completions.create(**{**ASK, "prompt": "Unchanged: this is known, and remains what it is, I hope"})
    with live(server) as reader:
        await_text(reader, "Unchanged: this")
        before, read_before = dict(reader.nodes), len(reader.raw)
        server.openai().completions.create(**{**ASK, "prompt": "Something that is quite another matter, I should say"})
        await_text(reader, "another matter")
        news = reader.raw[read_before:]
        assert set(before) < set(reader.nodes)
        assert "Unchanged: this" not in news, "what stays the same is not sent again"
        asyncio.run(server.engine.reset_cache())
        while reader.nodes:
            reader.read()
        assert reader.state["tree"]["tokens"] == 0


def test_a_running_request_pins_its_prefix_and_is_listed(server: Running) -> None:
    stream = server.openai().completions.create(**{**ASK, "max_tokens": 3000}, stream=True)
    next(iter(stream))
    with live(server) as reader:
        while not any(row[5] for row in reader.nodes.values() if row[1] is not None):
            state = reader.read()
        (listed,) = state["requests"]["first"]
        assert (listed["namespace"], listed["is_running"]) == ("shared", True)
        stream.close()
        while reader.read()["requests"]["running"]:
            pass
        assert not any(row[5] for row in reader.nodes.values())
    server.wait_until(lambda stats: stats.running == 0)


def test_no_text_of_another_tenant_is_sent(keyed: Running) -> None:
    for name, text in (
        ("red", "My private letter to the bank"),
        ("blue", "What I owe"),
        ("boss", "The boss speaks so"),
    ):
        for ending in (" about money matters of all kinds", " about something else entirely"):
            keyed.openai(f"key-{name}").completions.create(**{**ASK, "prompt": text + ending})
    keyed.openai("key-boss").completions.create(**ASK, extra_body={"cache_salt": "a secret of its own"})
    with live(keyed, "key-boss") as reader:
        await_text(reader, "The boss speaks")
        while len(reader.roots()) < 4 or len(reader.state["misses"]) < 7:
            reader.read()
    assert reader.roots() == ["blue", "boss", "boss (salted)", "red"]
    assert any("The boss speaks" in text for text in reader.texts())
    assert not re.search(r"letter|owe|soft|secret|light", reader.raw)
    for miss in reader.state["misses"]:
        if miss["namespace"] in ("red", "blue", "boss (salted)"):
            assert miss["asked_text"] is miss["cached_text"] is None
    assert any(miss["asked_text"] for miss in reader.state["misses"] if miss["namespace"] == "boss")


@pytest.mark.parametrize("host", ["rebound.example.com", "127.0.0.1.example.com:80", "10.1.2.3:8000", ""])
def test_without_keys_texts_are_for_this_machine_alone(server: Running, host: str) -> None:
    server.openai().completions.create(**ASK)
    with live(server, Host=host) as reader:
        reader.read()
        while len(reader.nodes) < 2:
            reader.read()
        assert reader.texts() == []
        assert "soft" not in reader.raw
        assert reader.roots() == ["shared"]


def test_no_more_pages_than_allowed_are_fed(server: Running) -> None:
    with new_http(server.address) as http:
        streams = [http.stream("GET", "/v1/cache/live") for _ in range(MAX_WATCHERS)]
        try:
            for stream in streams:
                assert stream.__enter__().status_code == 200
            refused = http.get("/v1/cache/live")
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "too_many_pages"
        finally:
            for stream in streams:
                stream.__exit__(None, None, None)
    while server.service.live.num_watchers:
        server.stats()
    with live(server) as reader:
        reader.read()


def test_a_server_that_ends_does_not_wait_for_pages() -> None:
    with running() as server:
        answer = server.http().send(server.http().build_request("GET", "/v1/cache/live"), stream=True)
        lines = answer.iter_lines()
        LiveReader(lines).read()
        server.server.drain()
        assert not [line for line in lines if "error" in line], "the stream ends, and says nothing"


def test_nothing_is_looked_at_while_nobody_watches_and_a_watcher_of_an_idle_engine_sees_it() -> None:
    async def main() -> None:
        async with new_demo_engine() as engine:
            feed = LiveFeed(engine, "demo", min_interval_s=0.001)
            for _ in range(2):  # the second one comes when all is known already
                events = feed.events(lambda namespace: True)
                assert (await anext(events)).startswith(b"event: state")
                await events.aclose()
            assert feed.num_watchers == 0
            events, others = (feed.events(lambda namespace: True) for _ in range(2))
            await anext(events)
            assert (await anext(others)).startswith(b"event: state"), "though nothing has changed since the first"
            waiting = asyncio.ensure_future(anext(events))
            await engine.generate(["ROMEO: a prompt of more than a page, so that it is kept"], FEW)
            assert (await waiting).startswith(b"event: nodes")
            feed.close()
            await events.aclose()
            assert [event async for event in others if b"ROMEO" in event] == []

    asyncio.run(main())


def test_a_look_at_an_engine_that_does_nothing_takes_its_tree_as_it_was() -> None:
    async def main() -> None:
        async with new_demo_engine() as engine:
            await engine.generate(["ROMEO: a prompt of more than a page, so that it is kept"], FEW)
            viewer = EngineViewer()
            first, second = [await engine.observe(viewer.look) for _ in range(2)]
            assert first is not None
            assert second is not None
            assert first.tree is second.tree
            await engine.generate(["JULIET: a prompt of more than a page, so that it is kept, too"], FEW)
            third = await engine.observe(viewer.look)
            assert third is not None
            assert set(second.tree.ids) < set(third.tree.ids), "nodes keep their numbers"

    asyncio.run(main())
