"""Eviction, copy-on-write, retraction, failures and leaks over every kind of pool that an engine can have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from prompts import random_prompts
from radixkv import Engine, EngineConfig, SamplingParams
from radixkv.engine.step_input import StepInput
from radixkv.memory.kv_pool import KVPool
from radixkv.memory.latent_pool import LatentKVPool
from radixkv.memory.quantized_pool import QuantizedKVPool
from radixkv.memory.split_pool import SplitKVPool
from runners import Around, tampered_engine
from stress_cases import some_of
from tiny_models import served_model, tiny_model

NEW_TOKENS = 9
PARAMS = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)

# family, settings and the kind of pool that they make
KINDS: dict[str, tuple[str, dict[str, Any], type[Any]]] = {
    "values": ("llama", {}, KVPool),
    "values in small pages": ("llama", {"page_size": 4}, KVPool),
    "a page a token": ("llama", {"page_size": 1}, KVPool),
    **{
        f"{code} in pages of {page_size}": (
            "llama",
            {
                "kv_cache_dtype": code,
                "page_size": page_size,
                **({} if page_size == 16 else {"attention_backend": "torch"}),
            },
            QuantizedKVPool,
        )
        for code in ("int8", "int4", "fp8_e4m3", "fp8_e5m2")
        for page_size in (16, 4)
    },
    "fp4 in pages of 16": ("llama_wide", {"kv_cache_dtype": "fp4", "page_size": 16}, QuantizedKVPool),
    "latents": ("deepseek_v3", {"page_size": 4}, LatentKVPool),
    "windows": ("gemma3", {"page_size": 4, "window_cache_tokens": 48}, SplitKVPool),
    "windows of codes": ("gemma3", {"kv_cache_dtype": "int8", "window_cache_tokens": 96}, SplitKVPool),
    "windows alone": ("mistral", {"page_size": 4}, SplitKVPool),
    "sinks": ("llama", {"page_size": 4, "window": 20, "sinks": 4}, SplitKVPool),
    "sinks of codes": ("llama", {"kv_cache_dtype": "int8", "window": 20, "sinks": 4}, SplitKVPool),
}
EXACT = [name for name, (_, settings, _) in KINDS.items() if "kv_cache_dtype" not in settings]
MORE = {
    "values",
    "int8 in pages of 4",
    "int8 in pages of 16",  # as "sinks of codes"
    "int4 in pages of 16",
    "fp8_e4m3 in pages of 4",
    "fp8_e5m2 in pages of 16",
    "windows alone",
}  # under `stress`
EVERY_KIND = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.stress] if kind in MORE else []) for kind in KINDS]
)


def make_engine(kind: str, *, around: Around | None = None, **settings: Any) -> Engine:
    family, own, pool = KINDS[kind]
    config = EngineConfig(**{"page_size": 16, "kv_cache_tokens": 112, "max_batch_tokens": 40, **own, **settings})
    model = tiny_model(family) if "window" in own else served_model(family)
    engine = Engine(model, config=config) if around is None else tampered_engine(model, around, config)
    assert isinstance(engine.pool, pool)
    if not isinstance(engine.pool, SplitKVPool):
        assert engine.stats().kv_bytes_per_token == engine.pool.bytes_per_token
    return engine


def check_empty(engine: Engine) -> None:
    engine.check_invariants()
    engine.reset_cache()
    engine.check_invariants()
    stats = engine.stats().cache
    assert (stats.free_pages, stats.num_leases) == (stats.num_pages, 0)
    assert stats.free_window_pages == stats.window_pages


@EVERY_KIND
def test_a_pool_too_small_for_all_serves_all_and_loses_nothing(kind: str) -> None:
    prompts = random_prompts(9, [30, 41, 37, 25, 44], shared=21)
    engine = make_engine(kind)
    step = engine.step

    def checked_step() -> None:
        step()
        engine.check_invariants()

    engine.step = checked_step  # type: ignore[method-assign]
    for _ in range(2):
        outputs = engine.generate(prompts, PARAMS)
        assert [len(output.token_ids) for output in outputs] == [NEW_TOKENS] * len(prompts)
    stats = engine.stats()
    assert stats.cache.hit_tokens > 0
    assert stats.cache.copied_tokens > 0 or engine.config.page_size == 1
    assert stats.cache.evicted_tokens + stats.cache.window_pages_taken_back > 0
    check_empty(engine)


@pytest.mark.parametrize("kind", some_of(EXACT, {"values", "a page a token", "latents", "windows", "sinks"}))
def test_tokens_are_those_of_a_pool_with_room(kind: str) -> None:
    prompts = random_prompts(9, [30, 41, 37, 25, 44], shared=21)
    roomy = make_engine(kind, kv_cache_tokens=2048, **({"window_cache_tokens": 1024} if kind == "windows" else {}))
    expected = [roomy.generate(prompt, PARAMS)[0].token_ids for prompt in prompts]
    engine = make_engine(kind)
    for _ in range(2):
        assert [output.token_ids for output in engine.generate(prompts, PARAMS)] == expected
    check_empty(engine)


@EVERY_KIND
def test_a_failing_request_fails_alone(kind: str) -> None:
    def failing(step: StepInput, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        if 1 in step.request_ids:
            raise RuntimeError("this prompt is bad")
        return compute()

    engine = make_engine(kind, around=failing, kv_cache_tokens=512)
    good = random_prompts(3, [30, 22], shared=10)
    outputs = engine.generate([good[0], [13, *good[1]], good[1]], PARAMS)
    assert [output.finish_reason for output in outputs] == ["length", "error", "length"]
    check_empty(engine)


@EVERY_KIND
def test_aborted_and_dropped_streams_hold_nothing(kind: str) -> None:
    engine = make_engine(kind, kv_cache_tokens=512)
    ids = random_prompts(3, [30], shared=0)[0]
    streams = [engine.stream(ids, PARAMS) for _ in range(3)]
    first_pieces = [next(stream) for stream in streams]
    assert engine.abort(first_pieces[1].request_id)
    streams[0].close()
    del streams
    engine.step()
    assert engine.stats().running == 0
    check_empty(engine)
