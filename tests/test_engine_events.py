"""`kv_events`: an engine that says what it caches, and a server that says where."""

from __future__ import annotations

import gc
import threading
from typing import Any

import httpx2 as httpx
import pytest

from http_server import SMALL as SERVED
from http_server import running
from radixkv import AsyncEngine, Engine, SamplingParams
from radixkv.cache.page_keys import prompt_keys, root_key
from radixkv.cluster.index.replica_index import ReplicaIndex
from radixkv.cluster.subscriber.subscriber import KVEventSubscriber
from radixkv.config import EngineConfig
from radixkv.errors import ConfigError
from radixkv.publish.wire import name_of

LOCAL = "tcp://127.0.0.1:0"
SMALL: dict[str, Any] = {**SERVED, "kv_cache_tokens": 1024, "page_size": 4, "fused_layers": False}
TIMEOUT_S = 30.0


def publishing() -> list[threading.Thread]:
    """The threads of publishers."""
    return [thread for thread in threading.enumerate() if thread.name == "radixkv-events"]


def test_an_index_knows_what_an_engine_has_computed() -> None:
    with (
        Engine.from_pretrained("demo", kv_events=LOCAL, **SMALL) as engine,
        KVEventSubscriber(ReplicaIndex(4), probe_s=0.05, answer_s=0.2) as subscriber,
    ):
        sources = engine.event_sources
        assert sources is not None
        assert sources.page_size == 4
        subscriber.add_replica("one", sources.endpoint, sources.replay_endpoint, sources.topic)
        prompt = [int(token) for token in engine.encode("ROMEO: But soft, what light")]
        (output,) = engine.generate([prompt], SamplingParams(max_tokens=5, temperature=0), cache_salt="secret")
        sequence = [*prompt, *output.token_ids][:-1]  # the last token was not computed
        namespace_key = root_key(None, "secret")

        def is_known(_: object) -> bool:
            with subscriber.lock:
                return subscriber.index.lookup(sequence, namespace_key) == {"one": len(sequence)}

        assert subscriber.wait_for(is_known, TIMEOUT_S)
        assert engine.cache.peek(sequence, cache_salt="secret") == len(sequence)
        with subscriber.lock:
            keys = prompt_keys(sequence, 4, cache_salt="secret")
            assert subscriber.index.pages_of("one") == {name_of(key) for key in keys}
            assert subscriber.index.lookup(sequence, root_key(None, None)) == {}
        engine.reset_cache()
        assert subscriber.wait_for(lambda _: not subscriber.index.pages_of("one"), TIMEOUT_S)


def test_without_the_setting_nobody_listens() -> None:
    with Engine.from_pretrained("demo", **SMALL) as engine:
        assert engine.event_sources is None
        assert publishing() == []


def test_an_engine_that_is_dropped_ends_its_publisher() -> None:
    engine = Engine.from_pretrained("demo", kv_events=LOCAL, **SMALL)
    assert len(publishing()) == 1
    del engine
    gc.collect()
    assert publishing() == []


def test_a_taken_address_is_refused() -> None:
    with Engine.from_pretrained("demo", kv_events=LOCAL, **SMALL) as engine:
        assert engine.event_sources is not None
        with pytest.raises(ConfigError, match="endpoint must be an address that is free"):
            Engine.from_pretrained("demo", kv_events=engine.event_sources.endpoint, **SMALL)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_events": "5557"}, "kv_events must be an address as tcp://"),
        ({"kv_events": LOCAL, "kv_events_replay": "x"}, "kv_events_replay must be an address as tcp://"),
        ({"kv_events_replay": LOCAL}, "need kv_events"),
        ({"kv_events_topic": "x"}, "need kv_events"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**settings)


def test_a_server_says_where_its_events_come_from() -> None:
    engine = AsyncEngine.from_pretrained("demo", kv_events=LOCAL, kv_events_topic="kv@here", **SERVED)
    with running(engine) as server:
        info = server.http().get("/server_info").json()
        sources = server.engine.event_sources
        assert sources is not None
        assert info["kv_events"] == {"publisher": "zmq", **sources._asdict()}
        assert info["kv_events"]["endpoint"].startswith("tcp://127.0.0.1:")
        assert info["kv_events"]["topic"] == "kv@here"
        assert info["page_size"] == sources.page_size == server.engine.config.page_size


def test_a_server_without_events_says_so() -> None:
    with running() as server:
        answer: httpx.Response = server.http().get("/server_info")
        assert answer.json()["kv_events"] is None
        assert answer.json()["model"] == server.service.model_name
