"""Layers that read the KV of an earlier layer: the pool has one copy, and the tokens are the unmodified model's."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from oracles import GreedyOracle
from prompts import random_prompts
from radixkv import Engine, EngineConfig, SamplingParams
from radixkv.attention.backend import AttentionNeeds, AttentionParams, LayerAttention
from radixkv.attention.sharing_backend import owning, pool_layers
from radixkv.memory.kv_pool import KVPool
from radixkv.memory.kv_shape import LayerKV
from radixkv.memory.page_bytes import PageBytes
from radixkv.memory.sizing import kv_shape_from_config
from radixkv.memory.split_pool import SplitKVPool
from radixkv.models.kept_states import KeptStates
from radixkv.models.probe import plug_in_paged_attention
from radixkv_bench.models.small_configs import small_config
from tiny_models import make_model

FAMILIES = ("gemma3n_text", "gemma4_text")
READS = [None, None, None, 2, 1]  # a sliding layer, and one of full attention
NEW_TOKENS = 4
GREEDY = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)


def small_model(family: str) -> PreTrainedModel:
    return make_model(small_config(family))


@cache
def oracle_of(family: str) -> GreedyOracle:
    return GreedyOracle(small_model(family))


def expected_of(family: str, prompts: list[list[int]]) -> list[list[int]]:
    return [oracle_of(family).continuation(prompt, NEW_TOKENS) for prompt in prompts]


def engine_of(model: PreTrainedModel, **settings: Any) -> Engine:
    return Engine(model, config=EngineConfig(**{"page_size": 4, "kv_cache_tokens": 512, **settings}))


def engine_of_copies(family: str, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Engine:
    """An engine each of whose layers keeps a copy of its own."""
    with monkeypatch.context() as patch:
        patch.setattr(KeptStates, "keep", lambda self, layer, attention, k, v: attention)
        return engine_of(small_model(family), **settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_probe_finds_which_layer_reads_which(family: str) -> None:
    layers = plug_in_paged_attention(small_model(family))
    assert [layer.reads for layer in layers] == READS


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *((family, {"attention_backend": "numba"}) for family in FAMILIES),
        ("gemma4_text", {"attention_backend": "torch"}),
        pytest.param("gemma4_text", {"attention_backend": "reference"}, marks=pytest.mark.stress),
        ("gemma3n_text", {"window_cache_tokens": 512}),  # one pool, in which all layers keep every page
    ],
    ids=str,
)
def test_same_tokens_cold_warm_batched_and_in_chunks(family: str, settings: dict[str, Any]) -> None:
    model = small_model(family)
    prompts = random_prompts(1, [37, 33, 50], shared=24)
    expected = expected_of(family, prompts)
    engine = engine_of(model, **settings)
    cold = [engine.generate(prompt, GREEDY)[0] for prompt in prompts]
    warm = [engine.generate(prompt, GREEDY)[0] for prompt in prompts]
    engine.reset_cache()
    batched = engine.generate(prompts, GREEDY)
    chunked = engine_of(model, max_batch_tokens=10, **settings).generate(prompts, GREEDY)
    for outputs in (cold, warm, batched, chunked):
        assert [output.token_ids for output in outputs] == expected
    assert [output.cached_tokens for output in cold] == [0, 24, 24]
    assert [output.cached_tokens for output in warm] == [36, 32, 49]
    engine.check_invariants()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pool_has_the_bytes_of_the_layers_that_keep_kv(family: str) -> None:
    engine = engine_of(small_model(family), window_cache_tokens=512)
    of_layers = [layer.kv.values_per_token * 4 for layer in plug_in_paged_attention(engine.model)]
    assert engine.kv_bytes_per_token == sum(of_layers[:3]) < sum(of_layers)
    assert engine.pool.num_bytes == 512 * sum(of_layers[:3])


def test_pools_of_windows_have_the_layers_of_their_kind_alone() -> None:
    pool = engine_of(small_model("gemma3n_text")).pool
    assert isinstance(pool, SplitKVPool)
    assert pool.full is not None
    assert (len(pool.full.layers), len(pool.window.layers)) == (1, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_size_of_a_config_is_the_engines_own(family: str) -> None:
    config = small_config(family)
    engine = engine_of(small_model(family))
    assert kv_shape_from_config(config).bytes_per_token("float32") == engine.kv_bytes_per_token


def test_codes_are_read_by_all_layers_as_if_each_had_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = random_prompts(2, [45, 60], shared=32)
    settings = {"kv_cache_dtype": "int8", "page_size": 16, "attention_backend": "torch"}
    shared = engine_of(small_model("gemma4_text"), **settings)
    copies = engine_of_copies("gemma4_text", monkeypatch, **settings)
    assert shared.kv_bytes_per_token < copies.kv_bytes_per_token
    for _ in ("cold", "warm"):
        for prompt in prompts:
            assert shared.generate(prompt, GREEDY)[0].token_ids == copies.generate(prompt, GREEDY)[0].token_ids


def test_a_window_over_all_layers_reads_the_shared_kv_too(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = random_prompts(3, [60], shared=0)[0]
    settings = {"window": 16, "sinks": 4, "attention_backend": "torch"}
    shared = engine_of(small_model("gemma3n_text"), **settings)
    copies = engine_of_copies("gemma3n_text", monkeypatch, **settings)
    assert shared.generate(prompt, GREEDY)[0].token_ids == copies.generate(prompt, GREEDY)[0].token_ids


@pytest.mark.stress
def test_the_gpus_kernels_read_the_shared_kv() -> None:
    """In Triton's interpreter, where there is no GPU."""
    prompt = random_prompts(5, [13], shared=0)[0]
    (output,) = engine_of(small_model("gemma4_text"), attention_backend="triton").generate(prompt, GREEDY)
    assert output.token_ids == expected_of("gemma4_text", [prompt])[0]


def test_pages_on_disk_hold_one_copy(tmp_path: Path) -> None:
    prompt = random_prompts(4, [49], shared=0)[0]
    settings = {"disk_cache": str(tmp_path), "window_cache_tokens": 512, "warm_start_share": 1.0}
    with engine_of(small_model("gemma3n_text"), **settings) as engine:
        assert isinstance(engine.pool, KVPool)
        assert PageBytes(engine.pool).payload_bytes == 4 * engine.kv_bytes_per_token
        engine.generate(prompt, GREEDY)
    with engine_of(small_model("gemma3n_text"), **settings) as engine:
        while not engine.is_warm:
            engine.step_tiers(1.0)
        (output,) = engine.generate(prompt, GREEDY)
    assert output.cached_tokens == 48
    assert output.token_ids == expected_of("gemma3n_text", [prompt])[0]


# -- which layers share ------------------------------------------------------------------------------------------------


def attention(window: int | None = None, sinks: torch.Tensor | None = None, heads: int = 4) -> LayerAttention:
    return LayerAttention(LayerKV(2, 8, 8), heads, AttentionParams(0.5, sliding_window=window, sinks=sinks))


def states() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(5, 2, 8), torch.ones(5, 2, 8)


def test_equal_values_alone_are_not_the_same_kv() -> None:
    kept = KeptStates()
    assert [kept.keep(layer, attention(), *states()).reads for layer in range(3)] == [None] * 3


def test_the_same_tensors_are_read_from_the_first_layer_that_kept_them() -> None:
    kept, (k, v) = KeptStates(), states()
    assert [kept.keep(layer, attention(), k, v).reads for layer in range(3)] == [None, 0, 0]


def test_tensors_that_were_written_to_meanwhile_are_others() -> None:
    kept, (k, v) = KeptStates(), states()
    kept.keep(0, attention(), k, v)
    k[3] = 7.0
    assert kept.keep(1, attention(), k, v).reads is None


@pytest.mark.parametrize(
    "other",
    [attention(window=9), attention(sinks=torch.zeros(4)), attention(heads=2)],
    ids=["window", "sinks", "heads"],
)
def test_a_layer_that_attends_otherwise_keeps_a_copy(other: LayerAttention) -> None:
    kept, (k, v) = KeptStates(), states()
    kept.keep(0, attention(), k, v)
    assert kept.keep(1, other, k, v).reads is None


def test_other_values_with_the_same_keys_are_not_shared() -> None:
    kept, (k, v) = KeptStates(), states()
    kept.keep(0, attention(), k, v)
    assert kept.keep(1, attention(), k, v.clone()).reads is None


def test_layers_of_the_pool_are_numbered_without_those_that_read() -> None:
    layers = [
        attention(),
        attention(9),
        LayerAttention(LayerKV(2, 8, 8), 4, AttentionParams(0.5), reads=0),
        attention(),
    ]
    assert pool_layers(layers) == [0, 1, 0, 2]
    needs = AttentionNeeds(tuple(layers), 4, torch.float32, torch.device("cpu"))
    assert owning(needs).layers == (layers[0], layers[1], layers[3])
