"""A store on another machine, which does not find at once: requests ask and wait, steps do not."""

# ruff: noqa: F811 — fixtures are imported from tier_cores, and named again as parameters

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from oracles import GreedyOracle, oracle_of
from page_stores import Hanging, MemoryStore, failing
from prompts import random_ids
from radixkv import Engine, EngineConfig, SamplingParams
from radixkv_bench.common.redis_server import NO_SERVER, SERVER, running_redis
from tier_cores import PARAMS, PROMPT, Clock, Core, clock, make_core, store  # noqa: F401
from tiny_models import served_model

MakeCore = Callable[..., Core]


@pytest.fixture
def shared(store: MemoryStore) -> MemoryStore:
    store.name, store.finds_at_once = "shared", False
    return store


def test_an_engine_loads_what_another_one_computed(
    make_core: MakeCore,
    shared: MemoryStore,
    oracle: GreedyOracle,
) -> None:
    one, other = make_core(shared), make_core(shared)
    assert one.generate(PROMPT).cached_tokens == 0
    assert one.core.flush_tiers(30)
    output = other.generate(PROMPT)
    assert output.token_ids == oracle.continuation(PROMPT, 4)
    assert output.cached_by == {"pool": 0, "shared": 29}
    longer = [*PROMPT[:22], *random_ids(3, 20)]
    assert other.generate(longer).cached_tokens == 22
    assert other.core.flush_tiers(30)
    assert one.generate(longer).cached_by == {"pool": 22, "shared": 19}


def test_what_the_disk_lacks_the_server_is_asked_for(
    make_core: MakeCore, shared: MemoryStore, clock: Clock, oracle: GreedyOracle
) -> None:
    disk = MemoryStore(shared.page_size, shared.payload_bytes, "disk")
    long = [*PROMPT, *random_ids(5, 20)]
    for holder, prompt in ((disk, PROMPT), (shared, long)):
        core = make_core(holder)
        core.generate(prompt)
        assert core.core.flush_tiers(30)
    core = make_core(disk, shared)
    core.generate(random_ids(9, 30))
    assert core.core.flush_tiers(30)
    output = core.generate(long)
    assert output.token_ids == oracle.continuation(long, 4)
    assert output.cached_by == {"pool": 0, "disk": 30, "shared": 19}
    loads = [tier.loads for tier in core.core.stats().tiers]
    assert loads == [1, 1]
    core.core.reset_cache()
    assert core.core.flush_tiers(30)
    assert core.generate(long).cached_by == {"pool": 0, "disk": 49}, "and what it gave is on disk, too, from then on"


def test_what_the_server_has_is_not_handed_down_again(make_core: MakeCore, shared: MemoryStore) -> None:
    one, other = make_core(shared), make_core(shared)
    for core, written in ((one, 9), (one, 0), (other, 2), (other, 0)):  # `other` asked for the prompt
        before = core.core.stats().tiers[0].written_pages
        core.generate(PROMPT)
        assert core.core.flush_tiers(30)
        assert core.core.stats().tiers[0].written_pages - before <= written
        core.core.reset_cache()
    shared.pages.clear()
    one.generate(PROMPT)
    assert one.core.flush_tiers(30)
    assert len(shared.pages) >= 7, "what is found to be gone is written again"


def test_a_server_that_does_not_answer_holds_up_the_request_alone_and_not_for_long(
    make_core: MakeCore,
    shared: MemoryStore,
    clock: Clock,
    oracle: GreedyOracle,
) -> None:
    shared.before_find = hanging = Hanging()
    core = make_core(shared)
    asks = core.add(PROMPT)
    core.step_until_it_waits()
    assert hanging.entered.wait(30)
    shared.before_find = lambda: None
    clock.now_s += 0.1
    other = random_ids(2, 9)
    runs = core.add(other)
    core.step_until_it_waits()
    assert core.outputs[runs].token_ids == oracle.continuation(other, 4)
    assert core.core.stats().loading == 1
    clock.now_s += 0.4
    core.run()
    assert core.outputs[asks].token_ids == oracle.continuation(PROMPT, 4)
    stats = core.core.stats().tiers[0]
    assert (stats.given_up, stats.loads, stats.unavailable) == (1, 0, 1), (
        "it is not asked again while it does not answer"
    )
    assert core.generate(random_ids(4, 9)).cached_tokens == 0
    assert core.core.stats().tiers[0].unavailable == 2
    hanging.go_on.set()


def test_a_request_that_is_aborted_while_it_asks_gives_everything_back(
    make_core: MakeCore,
    shared: MemoryStore,
) -> None:
    shared.before_find = hanging = Hanging()
    core = make_core(shared)
    request_id = core.add(PROMPT)
    core.step_until_it_waits()
    core.core.abort(request_id)
    core.core.check_invariants()
    assert core.core.stats().cache.leased_pages == 0
    hanging.go_on.set()


def test_a_server_that_fails_costs_hits_alone(
    make_core: MakeCore,
    shared: MemoryStore,
    oracle: GreedyOracle,
) -> None:
    shared.before_find = shared.before_read = shared.before_write = failing
    core = make_core(shared)
    for seed in range(3):
        prompt = random_ids(seed, 20)
        assert core.generate(prompt).token_ids == oracle.continuation(prompt, 4)
    assert core.core.flush_tiers(30)
    stats = core.core.stats().tiers[0]
    assert stats.read_errors == 1
    assert stats.write_errors == 1


@pytest.mark.skipif(SERVER is None, reason=NO_SERVER)
def test_two_engines_on_one_server_compute_a_prompt_once(tmp_path: Path) -> None:
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    prompt = random_ids(1, 100)
    with running_redis(tmp_path) as server:
        config = EngineConfig(page_size=4, kv_cache_tokens=256, shared_cache=server.url)
        with Engine(served_model("llama"), None, config) as one, Engine(served_model("llama"), None, config) as other:
            one.generate(prompt, params)
            assert one.flush_tiers(30)
            (output,) = other.generate(prompt, params)
            assert output.token_ids == oracle_of("llama").continuation(prompt, 4)
            assert output.cached_by == {"pool": 0, "shared": 99}
            assert other.stats().computed_tokens == 4
            server.stop()
            (output,) = other.generate(random_ids(2, 50), params)
            assert output.token_ids == oracle_of("llama").continuation(random_ids(2, 50), 4)
