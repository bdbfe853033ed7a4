"""`kv_events`: an engine that says what it caches, and a server that says where."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from http_server import SMALL as SERVED
from http_server import running
from radixkv import AsyncEngine, Engine, SamplingParams
from radixkv.cache.page_keys import prompt_keys, root_key
from radixkv.cluster.index.lower_index import LowerIndex
from radixkv.cluster.index.replica_index import ReplicaIndex
from radixkv.cluster.subscriber.subscriber import KVEventSubscriber
from radixkv.config import EngineConfig
from radixkv.engine.assembly import assemble
from radixkv.engine.core import EngineCore
from radixkv.engine.tier_stores import watches
from radixkv.errors import ConfigError
from radixkv.memory.page_bytes import PageBytes
from radixkv.publish.wire import name_of
from radixkv.tiers.memory_store import HostStore
from radixkv.tiers.shared_store import SharedStore
from store_cases import FINGERPRINT, chain, open_store
from tiny_models import served_model

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


def held_below(subscriber: KVEventSubscriber, medium: str) -> set[int]:
    assert subscriber.lower is not None
    with subscriber.lock:
        return subscriber.lower.pages_of("one", medium)


def test_the_disk_is_told_of_after_eviction_and_restart(tmp_path: Path) -> None:
    settings: dict[str, Any] = {**SMALL, "kv_events": LOCAL, "disk_cache": str(tmp_path), "disk_cache_gb": 0.05}
    settings |= {"kv_cache_tokens": 64, "warm_start_share": 0}
    first, second = list(range(1, 41)), list(range(50, 90))
    keys = [name_of(key) for tokens in (first, second) for key in prompt_keys(tokens, 4)]

    def follow(engine: Engine, expected: set[int]) -> None:
        sources = engine.event_sources
        assert sources is not None
        subscriber.add_replica("one", sources.endpoint, sources.replay_endpoint)
        assert subscriber.wait_for(lambda _: held_below(subscriber, "STORAGE") >= expected, TIMEOUT_S)

    with KVEventSubscriber(ReplicaIndex(4), lower=LowerIndex(4), probe_s=0.05, answer_s=0.2) as subscriber:
        with Engine.from_pretrained("demo", **settings) as engine:
            for prompt in (first, second):
                engine.generate([prompt], SamplingParams(max_tokens=1))
                assert engine.flush_tiers(TIMEOUT_S)
            follow(engine, set(keys))
            in_pool = engine.cache.peek(first)
            assert in_pool < 40
            with subscriber.lock:
                held = subscriber.index.lookup(first, root_key(None, None))
                assert held.get("one", 0) == in_pool
                assert subscriber.lower is not None
                assert subscriber.lower.lookup(first, root_key(None, None), held) == {"one": 40}
            engine.reset_cache()
            assert subscriber.wait_for(lambda _: not subscriber.index.pages_of("one"), TIMEOUT_S)
            assert held_below(subscriber, "STORAGE") >= set(keys)
        with Engine.from_pretrained("demo", **settings) as engine:
            follow(engine, set(keys))
            assert engine.cache.peek(first) == 0


def test_each_tier_of_an_engine_has_its_medium(tmp_path: Path) -> None:
    parts = assemble(served_model("llama"), None, EngineConfig(page_size=4, kv_cache_tokens=64, kv_events=LOCAL))
    payload_bytes = PageBytes(parts.pool).payload_bytes  # type: ignore[arg-type]
    host, disk = HostStore(4, payload_bytes, 2 * payload_bytes), open_store(tmp_path, payload_bytes=payload_bytes)
    shared = SharedStore("redis://127.0.0.1:1", FINGERPRINT, payload_bytes)
    assert set(watches([host, disk, shared])) == {"CPU", "STORAGE"}
    core = EngineCore(replace(parts, stores=(host, disk)))
    host.write(chain([1] * 8, payload_bytes=payload_bytes))
    disk.write(chain([2] * 8, payload_bytes=payload_bytes))
    with KVEventSubscriber(ReplicaIndex(4), lower=LowerIndex(4), probe_s=0.05, answer_s=0.2) as subscriber:
        sources = core.event_sources
        assert sources is not None
        subscriber.add_replica("one", sources.endpoint, sources.replay_endpoint)
        for medium, token in (("CPU", 1), ("STORAGE", 2)):
            keys = {name_of(key) for key in prompt_keys([token] * 8, 4)}
            assert subscriber.wait_for(lambda _, m=medium, k=keys: held_below(subscriber, m) == k, TIMEOUT_S)  # type: ignore[misc]
    core.close()
    shared.close()
    assert publishing() == []


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
