"""Engines with a store of pages below the pool: the same tokens as the model alone, computed once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from oracles import GreedyOracle
from page_stores import MemoryStore
from prompts import random_ids
from radixkv import Engine, EngineConfig, RequestOutput, SamplingParams
from radixkv.cache.insight.explanation import BelowPool
from radixkv.engine.assembly import assemble
from radixkv.errors import ConfigError
from radixkv.memory.page_bytes import PageBytes
from runners import checked
from tiny_models import served_model

MakeEngine = Callable[..., Engine]
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)


@pytest.fixture
def store(make_engine: MakeEngine) -> MemoryStore:
    """A store for pages of `make_engine`'s engines."""
    return store_for(make_engine())


def store_for(engine: Engine, name: str = "disk") -> MemoryStore:
    return MemoryStore(engine.config.page_size, PageBytes(engine.pool).payload_bytes, name)  # type: ignore[arg-type]


def with_stores(make_engine: MakeEngine, *stores: MemoryStore, **settings: Any) -> Engine:
    return checked(make_engine(parts={"stores": stores}, **{"warm_start_share": 0, **settings}))


def written(engine: Engine) -> None:
    """Wait until all that was handed down is in the store."""
    assert engine.flush_tiers(30)


def continuations(outputs: list[RequestOutput], oracle: GreedyOracle) -> None:
    for output in outputs:
        assert output.error is None
        assert output.token_ids == oracle.continuation(output.prompt_token_ids, PARAMS.max_tokens)


@pytest.mark.parametrize(
    ("page_size", "length"),
    [
        *((1, 41), (4, 16), (16, 1), (16, 41)),
        *(pytest.param(*pair, marks=pytest.mark.stress) for pair in ((1, 1), (1, 16), (4, 1), (4, 41), (16, 16))),
    ],
)
def test_after_a_restart_only_what_needs_logits_is_computed(
    make_engine: MakeEngine, oracle: GreedyOracle, page_size: int, length: int
) -> None:
    prompt = random_ids(1, length)
    first = make_engine(page_size=page_size)
    store = store_for(first)
    engine = with_stores(make_engine, store, page_size=page_size)
    (cold,) = engine.generate(prompt, PARAMS)
    assert cold.cached_tokens == 0
    engine.close()
    again = with_stores(make_engine, store, page_size=page_size)
    (warm,) = again.generate(prompt, PARAMS)
    continuations([cold, warm], oracle)
    assert warm.cached_tokens == length - 1
    assert dict(warm.cached_by) == ({"pool": 0, "disk": length - 1} if length > 1 else {"pool": 0})
    stats = again.stats()
    assert stats.computed_tokens == 1 + PARAMS.max_tokens - 1
    assert stats.tiers[0].loaded_tokens == length - 1
    assert store.num_closed == 1


def test_what_was_generated_is_found_after_a_restart(
    make_engine: MakeEngine, oracle: GreedyOracle, store: MemoryStore
) -> None:
    engine = with_stores(make_engine, store)
    (turn,) = engine.generate(random_ids(1, 18), PARAMS)
    engine.close()
    again = with_stores(make_engine, store)
    prompt = [*turn.prompt_token_ids, *turn.token_ids, 5, 7]
    (output,) = again.generate(prompt, PARAMS)
    continuations([output], oracle)
    assert output.cached_tokens == 18 + PARAMS.max_tokens - 1, "the last token of an output is not computed"


def test_a_page_of_which_a_part_is_stored_gives_that_part(
    make_engine: MakeEngine, oracle: GreedyOracle, store: MemoryStore
) -> None:
    head = random_ids(1, 10)
    with_stores(make_engine, store).generate(head + random_ids(2, 9), PARAMS)
    engine = with_stores(make_engine, store)
    (output,) = engine.generate(head + random_ids(3, 9), PARAMS)
    continuations([output], oracle)
    assert output.cached_tokens == 10


def test_a_pool_much_smaller_than_what_is_used_loads_what_it_had_to_evict(
    make_engine: MakeEngine, oracle: GreedyOracle, store: MemoryStore
) -> None:
    engine = with_stores(make_engine, store, kv_cache_tokens=64)
    prompts = [random_ids(seed, 30) for seed in range(8)]
    cold = [engine.generate(prompt, PARAMS)[0] for prompt in prompts]
    written(engine)
    warm = [engine.generate(prompt, PARAMS)[0] for prompt in prompts]
    continuations(cold + warm, oracle)
    assert [output.cached_tokens for output in warm] == [29] * 8
    assert engine.stats().tiers[0].loaded_tokens >= 7 * 29 - 64


def test_requests_that_wait_for_the_same_prefix_load_it_once(
    make_engine: MakeEngine, oracle: GreedyOracle, store: MemoryStore
) -> None:
    head = random_ids(1, 40)
    with_stores(make_engine, store).generate(head, PARAMS)
    engine = with_stores(make_engine, store)
    outputs = engine.generate([head + random_ids(seed, 3) for seed in range(2, 6)], PARAMS)
    continuations(outputs, oracle)
    assert all(output.cached_tokens >= 40 for output in outputs)
    stats = engine.stats()
    assert stats.tiers[0].loads == 1
    assert stats.tiers[0].loaded_tokens == 40
    assert sum(output.cached_by["disk"] for output in outputs if "disk" in output.cached_by) == 40


def test_the_choices_of_a_request_load_its_prompt_once(make_engine: MakeEngine, store: MemoryStore) -> None:
    prompt = random_ids(1, 40)
    with_stores(make_engine, store).generate(prompt, PARAMS)
    engine = with_stores(make_engine, store)
    (output,) = engine.generate(prompt, SamplingParams(max_tokens=4, n=3, temperature=1.0, ignore_eos=True))
    assert len(output.choices) == 3
    assert output.usage.cached_tokens == 39
    assert engine.stats().tiers[0].loads == 1


def test_nothing_of_one_namespace_is_loaded_for_another(
    make_engine: MakeEngine, oracle: GreedyOracle, store: MemoryStore
) -> None:
    prompt = random_ids(1, 30)
    with_stores(make_engine, store).generate(prompt, PARAMS, extra_key="a")
    engine = with_stores(make_engine, store)
    for keys in ({}, {"extra_key": "b"}, {"cache_salt": "a"}, {"extra_key": "a", "cache_salt": ""}):
        (output,) = engine.generate(prompt, PARAMS, **keys)
        continuations([output], oracle)
        assert output.cached_tokens == 0, keys
    assert engine.generate(prompt, PARAMS, extra_key="a")[0].cached_by["disk"] == 29


def test_log_probabilities_of_a_prompt_need_all_of_it_computed(
    make_engine: MakeEngine, oracle: GreedyOracle, store: MemoryStore
) -> None:
    prompt = random_ids(1, 30)
    with_stores(make_engine, store).generate(prompt, PARAMS)
    engine = with_stores(make_engine, store)
    params = SamplingParams(max_tokens=6, ignore_eos=True, prompt_logprobs=1)
    (output,) = engine.generate(prompt, params)
    continuations([output], oracle)
    assert output.prompt_logprobs is not None
    assert (len(output.prompt_logprobs), output.cached_tokens, engine.stats().tiers[0].loads) == (30, 0, 0)


def test_the_second_use_writes_where_the_first_does_not(
    make_engine: MakeEngine, oracle: GreedyOracle, store: MemoryStore
) -> None:
    engine = with_stores(make_engine, store, tier_writes="selective")
    once, twice = random_ids(1, 30), random_ids(2, 30)
    engine.generate([once, twice], PARAMS)
    written(engine)
    assert not store.pages
    engine.generate(twice, PARAMS)
    engine.close()
    again = with_stores(make_engine, store, tier_writes="selective")
    outputs = [again.generate(prompt, PARAMS)[0] for prompt in (once, twice)]
    continuations(outputs, oracle)
    assert [output.cached_tokens for output in outputs] == [0, 28]


def test_what_is_evicted_is_written_then_and_the_rest_at_the_end(
    make_engine: MakeEngine, oracle: GreedyOracle, store: MemoryStore
) -> None:
    engine = with_stores(make_engine, store, tier_writes="back", kv_cache_tokens=64)
    prompts = [random_ids(seed, 30) for seed in range(3)]
    engine.generate(prompts[0], PARAMS)
    written(engine)
    assert not store.pages
    for prompt in prompts[1:]:
        engine.generate(prompt, PARAMS)
    written(engine)
    assert store.pages
    (output,) = engine.generate(prompts[0], PARAMS)
    assert output.cached_tokens == 29
    engine.close()
    again = with_stores(make_engine, store, tier_writes="back", kv_cache_tokens=64)
    outputs = [again.generate(prompt, PARAMS)[0] for prompt in prompts]
    continuations([output, *outputs], oracle)
    assert [output.cached_tokens for output in outputs] == [29] * 3


def test_facts_of_a_page_follow_its_uses(make_engine: MakeEngine, store: MemoryStore) -> None:
    engine = with_stores(make_engine, store)
    prompt = random_ids(1, 8)
    engine.generate(prompt, PARAMS, extra_key="tenant", priority=3, keep_for_s=1000)
    written(engine)
    engine.generate(prompt, PARAMS, extra_key="tenant")
    engine.generate(prompt, PARAMS, extra_key="tenant")
    written(engine)
    facts = {facts for (_, tokens), (_, facts) in store.pages.items() if len(tokens) == 16}
    first = max(facts, key=lambda facts: facts.hits)
    assert (first.hits, first.priority, first.namespace) == (2, 3, ("tenant", None))
    assert first.kept_until_s is not None
    assert 990 < first.kept_until_s - first.used_s <= 1000


def test_a_session_goes_on_after_its_pages_were_evicted(demo_engine: Engine) -> None:
    parts = assemble(demo_engine.model, demo_engine.tokenizer, EngineConfig(kv_cache_tokens=512))
    store = MemoryStore(16, PageBytes(parts.pool).payload_bytes)  # type: ignore[arg-type]
    with checked(Engine.from_parts(replace(parts, stores=(store,)))) as engine:
        with engine.session(system="Answer in verse.") as chat:
            chat.send("Who goes there?", SamplingParams(max_tokens=8))
            written(engine)
            engine.reset_cache()
            reply = chat.send("Speak again.", SamplingParams(max_tokens=8))
        assert reply.cached_by["disk"] > 16
        assert reply.cached_by["pool"] == 0


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"kv_cache_dtype": "int8", "page_size": 16}),
        ("llama", {"kv_cache_dtype": "int4", "page_size": 4, "attention_backend": "torch"}),
        ("llama_wide", {"kv_cache_dtype": "fp4", "page_size": 16}),
        ("llama", {"page_size": 16, "attention_backend": "torch"}),
        ("deepseek_v3", {"page_size": 4}),
    ],
)
def test_every_kind_of_pool_comes_back_as_it_was(family: str, settings: dict[str, Any]) -> None:
    config = EngineConfig(kv_cache_tokens=256, warm_start_share=0, **settings)
    prompt = random_ids(1, 37)
    answers = []
    store: MemoryStore | None = None
    for _ in range(2):
        parts = assemble(served_model(family), None, config)
        payload_bytes = PageBytes(parts.pool).payload_bytes  # type: ignore[arg-type]
        store = store or MemoryStore(config.page_size, payload_bytes)
        with checked(Engine.from_parts(replace(parts, stores=(store,)))) as engine:
            (output,) = engine.generate(prompt, SamplingParams(max_tokens=6, ignore_eos=True, logprobs=1))
            assert engine.stats().cache.num_leases == 0
        answers.append(output)
    cold, warm = answers
    assert (cold.cached_tokens, warm.cached_tokens) == (0, 36)
    assert warm.token_ids == cold.token_ids


def test_a_store_of_other_pages_is_refused(make_engine: MakeEngine) -> None:
    with pytest.raises(ConfigError, match=r"must hold 4 tokens in 1024 bytes.* they hold 8 in 64"):
        make_engine(parts={"stores": (MemoryStore(8, 64),)})


def test_an_explanation_tells_what_lies_below_the_pool(make_engine: MakeEngine, store: MemoryStore) -> None:
    engine = with_stores(make_engine, store)
    prompt = random_ids(1, 30)
    assert engine.explain(prompt).below == ()
    engine.generate(prompt, PARAMS, extra_key="a")
    written(engine)
    assert engine.explain(prompt, extra_key="a").below == (), "it is in the pool"
    engine.reset_cache()
    explanation = engine.explain(prompt, extra_key="a")
    assert explanation.below == (("disk", 30, "loaded"),)
    assert str(explanation).endswith("; 30 are on disk, to be loaded")
    assert engine.explain(prompt).below == ()
    assert str(BelowPool("disk", 30, "slower than computing")) == "30 are on disk, not loaded: slower than computing"
