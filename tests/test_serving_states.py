"""What a server tells of the states of recurrent layers: all of it where a model has some, and nothing where not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import pytest

from http_server import SMALL, Running, running
from live_stream import live
from prompts import random_ids
from radixkv import AsyncEngine, Engine, EngineConfig, SamplingParams
from radixkv.cluster import gathered
from radixkv.memory.state_sizing import states_from_config
from radixkv.serving.metrics import Metrics
from recurrent_models import recurrent_model

NUM_STATES = 12
CONFIG = EngineConfig(kv_cache_tokens=512, page_size=16, state_slots=NUM_STATES, attention_backend="torch")


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(AsyncEngine(recurrent_model("qwen3_next"), None, CONFIG)) as server:
        body = {"prompt": random_ids(1, 40), "max_tokens": 2}
        assert server.http().post("/v1/completions", json=body).status_code == 200
        yield server


def state_bytes() -> int:
    return sum(state.num_bytes("float32") for state in states_from_config(recurrent_model("qwen3_next").config))


def test_stats_count_states_and_their_bytes() -> None:
    with Engine(recurrent_model("qwen3_next"), None, CONFIG) as engine:
        engine.generate([random_ids(1, 40)], SamplingParams(max_tokens=2))
        stats = engine.stats()
    assert (stats.bytes_per_state, stats.state_pool_bytes) == (state_bytes(), NUM_STATES * state_bytes())
    assert 0 < stats.cache.evictable_states == NUM_STATES - stats.cache.free_states
    with Engine.from_pretrained("demo", **SMALL) as plain:
        assert (plain.stats().bytes_per_state, plain.stats().state_pool_bytes) == (0, 0)


def test_a_server_tells_how_many_states_there_are_and_what_they_hold(server: Running) -> None:
    assert server.http().get("/server_info").json()["state_slots"] == NUM_STATES
    states = server.http().get("/v1/cache/stats").json()["states"]
    cache = server.stats().cache
    assert states == {
        "total": NUM_STATES,
        "free": cache.free_states,
        "evictable": cache.evictable_states,
        "leased": 0,
        "taken_back": 0,
        "bytes": NUM_STATES * state_bytes(),
    }
    assert cache.evictable_states > 0
    with live(server) as reader:
        assert reader.read()["states"] == states


def test_metrics_count_states() -> None:
    with Engine(recurrent_model("qwen3_next"), None, CONFIG) as engine:
        stats = engine.stats()
    counted = stats.cache._replace(free_states=2, evictable_states=7, states_taken_back=5)
    text = Metrics("model").render(stats._replace(cache=counted)).decode()
    for line in (
        'radixkv_states{state="free"} 2.0',
        'radixkv_states{state="evictable"} 7.0',
        'radixkv_states{state="leased"} 3.0',
        "radixkv_states_taken_back_total 5.0",
        f"radixkv_state_pool_bytes {float(NUM_STATES * state_bytes())}",
    ):
        assert line in text.splitlines()


def test_explain_says_that_no_state_is_kept_there(server: Running) -> None:
    """KV of the whole prompt is cached, and a state after all of it; none after its first tokens."""
    asked = server.http().post("/v1/cache/explain", json={"prompt": random_ids(1, 40)[:20]}).json()
    assert (asked["reason"], asked["cached_tokens"]) == ("state", 0)
    assert "20 more are, but no state of the recurrent layers is kept" in asked["message"]
    assert 'radixkv_prompts_total{reason="never seen"}' in server.http().get("/metrics").text


@pytest.mark.parametrize("states", [{"total": 12, "free": 3, "bytes": 48}, None])
def test_a_router_adds_the_states_of_its_replicas(
    monkeypatch: pytest.MonkeyPatch, states: dict[str, int] | None
) -> None:
    numbers = {"pages": 8, "page_size": 16}
    told: dict[str, object] = {
        **dict.fromkeys(gathered.SUMMED, 1),
        "pool": numbers,
        "cached_tokens": {},
        "requests": {},
    }
    body = json.dumps(told if states is None else {**told, "states": states}).encode()

    async def gather(*_: object) -> gathered.Gathered:
        return gathered.Gathered({"a": body, "b": body}, {})

    monkeypatch.setattr(gathered, "gather", gather)
    total = json.loads(bytes(asyncio.run(gathered.stats(None, None)).body))  # type: ignore[arg-type]
    assert total["pool"] == {"pages": 16, "page_size": 16}
    assert total.get("states") == (None if states is None else {"total": 24, "free": 6, "bytes": 96})


def test_nothing_is_told_where_no_layer_keeps_a_state() -> None:
    with running(AsyncEngine.from_pretrained("demo", **SMALL)) as server:
        assert "state_slots" not in server.http().get("/server_info").json()
        assert "states" not in server.http().get("/v1/cache/stats").json()
        assert "radixkv_state" not in server.http().get("/metrics").text
        with live(server) as reader:
            assert "states" not in reader.read()
