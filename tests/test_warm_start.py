"""A pool that starts empty is filled with what the store holds, the hottest first, and in its order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from oracles import GreedyOracle
from page_stores import Hanging, MemoryStore, failing
from prompts import random_ids
from radixkv import AsyncEngine, Engine, EngineConfig, SamplingParams
from radixkv.cache.page_keys import page_keys, root_key
from radixkv.engine.assembly import assemble
from radixkv.memory.page_bytes import PageBytes
from radixkv.tiers.page_store import FoundPage, PageFacts
from radixkv.tiers.warm_start import runs_of
from tiny_models import served_model

ONE = SamplingParams(max_tokens=1, ignore_eos=True)
MakeEngine = Callable[..., Engine]


@pytest.fixture
def make_engine(store: MemoryStore) -> Iterator[MakeEngine]:
    """Makes engines over the store."""
    engines: list[Engine] = []

    def make(**settings: object) -> Engine:
        config = EngineConfig(**{"page_size": 4, "kv_cache_tokens": 256, **settings})  # type: ignore[arg-type]
        engines.append(Engine.from_parts(replace(assemble(served_model("llama"), None, config), stores=(store,))))
        return engines[-1]

    yield make
    for engine in engines:
        engine.check_invariants()
        engine.close()
        assert engine.stats().free_pages == engine.stats().cache.num_pages


@pytest.fixture
def store() -> MemoryStore:
    parts = assemble(served_model("llama"), None, EngineConfig(page_size=4, kv_cache_tokens=64))
    return MemoryStore(4, PageBytes(parts.pool).payload_bytes)  # type: ignore[arg-type]


def fill(engine: Engine) -> None:
    """Let the engine fill its pool until nothing more comes."""
    while not engine.is_warm:
        engine.check_invariants()
        engine.step_tiers(30)


def test_the_pool_holds_what_it_held_before(make_engine: MakeEngine, oracle: GreedyOracle) -> None:
    first = make_engine()
    prompts = [random_ids(seed, length) for seed, length in ((1, 30), (2, 17), (3, 40))]
    for number, prompt in enumerate(prompts):
        first.generate(prompt, ONE, extra_key=f"tenant {number}")
    first.close()
    engine = make_engine()
    fill(engine)
    assert engine.stats().cache.free_pages == 64 - 8 - 5 - 10
    for number, prompt in enumerate(prompts):
        (output,) = engine.generate(prompt, ONE, extra_key=f"tenant {number}")
        assert output.token_ids == oracle.continuation(prompt, 1)
        assert output.cached_by == {"pool": len(prompt) - 1}
        assert engine.generate(prompt, ONE, extra_key="nobody")[0].cached_tokens == 0
    assert engine.stats().tiers[0].loads == 0


def test_it_takes_no_more_than_its_share_and_no_page_that_others_hold(make_engine: MakeEngine) -> None:
    first = make_engine()
    for seed in range(6):
        first.generate(random_ids(seed, 24), ONE)
    first.close()
    engine = make_engine(warm_start_share=0.25)
    fill(engine)
    assert engine.stats().cache.free_pages >= 64 - 16
    assert engine.stats().cache.total_tokens > 0
    small = make_engine(kv_cache_tokens=32, warm_start_share=1.0)
    fill(small)
    assert small.stats().cache.evicted_tokens == 0
    none = make_engine(warm_start_share=0.0)
    assert none.is_warm
    assert none.stats().cache.total_tokens == 0


def test_hits_priority_and_the_rest_of_a_promise_come_back(make_engine: MakeEngine) -> None:
    first = make_engine()
    prompt, other = random_ids(1, 16), random_ids(2, 16)
    for _ in range(4):
        first.generate(prompt, ONE, priority=5, keep_for_s=500)
    first.generate(other, ONE)
    first.close()
    engine = make_engine()
    fill(engine)
    nodes = {node.end: node for _, node in engine.cache.nodes() if not node.is_root and node.priority}
    (node,) = nodes.values()
    assert (node.hits, node.priority) == (3, 5)
    assert 400 < node.keep_until - engine.cache.now_s <= 500


def test_what_was_used_last_is_evicted_last(make_engine: MakeEngine) -> None:
    first = make_engine(kv_cache_tokens=128)
    prompts = [random_ids(seed, 24) for seed in range(4)]
    for prompt in prompts:
        list(first.stream(prompt, ONE))
    first.close()
    engine = make_engine(kv_cache_tokens=128, warm_start_share=1.0)
    fill(engine)
    assert engine.stats().cache.total_tokens == 4 * 24
    engine.generate(random_ids(9, 48), ONE)
    held = [engine.cache.peek(prompt) for prompt in prompts]
    assert held[0] < 24
    assert held[2:] == [24, 24]


@pytest.mark.parametrize("breaks", ["hangs", "fails", "gone", "short"])
def test_a_store_that_fails_meanwhile_leaves_the_pool_as_it_is(
    make_engine: MakeEngine, store: MemoryStore, oracle: GreedyOracle, breaks: str, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = random_ids(1, 30)
    first = make_engine()
    first.generate(prompt, ONE)
    first.close()
    hanging = Hanging()
    if breaks == "hangs":
        store.before_read = hanging
    elif breaks == "fails":
        store.before_read = failing
    else:
        store.change_payloads = lambda payloads: [None if breaks == "gone" else b"short"] * len(payloads)
    engine = make_engine()
    if breaks == "hangs":
        assert hanging.entered.wait(30)
        assert not engine.is_warm
    else:
        fill(engine)
    assert engine.stats().cache.total_tokens == 0
    hanging.go_on.set()
    store.before_read, store.change_payloads = lambda: None, lambda payloads: payloads
    assert engine.generate(prompt, ONE)[0].token_ids == oracle.continuation(prompt, 1)


def test_an_engine_in_a_thread_fills_its_pool_while_nothing_runs(make_engine: MakeEngine, store: MemoryStore) -> None:
    first = make_engine()
    first.generate(random_ids(1, 30), ONE)
    first.close()
    parts = replace(
        assemble(served_model("llama"), None, EngineConfig(page_size=4, kv_cache_tokens=256)), stores=(store,)
    )

    async def main() -> int:
        async with AsyncEngine.from_parts(parts) as engine:
            while not await engine.observe(lambda core: core.is_warm):
                await asyncio.sleep(0)
            return (await engine.stats()).cache.total_tokens

    assert asyncio.run(main()) == 32


def test_pages_without_what_comes_before_them_are_left_out() -> None:
    ids = random_ids(1, 20)
    tokens = np.array(ids, "<i4").tobytes()
    facts = PageFacts(1.0, 2, 0, None, (None, None))
    parents = [root_key(None, None), *page_keys(root_key(None, None), tokens, 4)]
    pages = [(FoundPage(parents[n], tokens[16 * n : 16 * n + 16], 4), facts) for n in range(5)]
    assert [len(run) for _, run, _ in runs_of(pages, 4, 10)] == [5]
    assert [len(run) for _, run, _ in runs_of(pages, 4, 2)] == [2, 2, 1]
    assert [len(run) for _, run, _ in runs_of([*pages[:2], *pages[3:]], 4, 10)] == [2]
    assert not list(runs_of(pages[1:], 4, 10))
    other = facts._replace(namespace=("a", None))
    assert not list(runs_of([(page, other) for page, _ in pages], 4, 10)), "the key says which namespace it is"
    hit = [*pages[:2], *[(page, facts._replace(hits=1)) for page, _ in pages[2:]]]
    assert [len(run) for _, run, _ in runs_of(hit, 4, 10)] == [2, 3]
