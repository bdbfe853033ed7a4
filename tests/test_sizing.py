"""KV sizes: published reference figures, every attention kind, and the caches of real models as the oracle."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radixkv.errors import ConfigError, UnsupportedModelError
from radixkv.memory.kv_shape import DTYPE_BITS, NO_KV, KVShape, LayerKV, dtype_bits, kv_budget_bytes
from radixkv.memory.savings import alternatives
from radixkv.memory.sizing import kv_shape_from_config, layers_from_config

KIB, MIB, GIB = 2**10, 2**20, 2**30


def dense(layers: int, heads: int, hidden: int, **more: Any) -> dict[str, Any]:
    return {"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": hidden, **more}


LLAMA_2_7B = dense(32, 32, 4096, model_type="llama")
LLAMA_3_8B = dense(32, 32, 4096, model_type="llama", num_key_value_heads=8)
LLAMA_3_70B = dense(80, 64, 8192, model_type="llama", num_key_value_heads=8)
QWEN_2_5_05B = dense(24, 14, 896, model_type="qwen2", num_key_value_heads=2)
DEEPSEEK_V3 = dense(
    61,
    128,
    7168,
    model_type="deepseek_v3",
    num_key_value_heads=128,
    kv_lora_rank=512,
    qk_rope_head_dim=64,
    qk_nope_head_dim=128,
    v_head_dim=128,
)


# ------------------------------------------------------------------------------------- reference figures


@pytest.mark.parametrize(
    ("config", "bytes_per_token"),
    [
        (LLAMA_3_8B, 128 * KIB),
        (LLAMA_2_7B, 512 * KIB),
        (LLAMA_3_70B, 320 * KIB),
        (QWEN_2_5_05B, 12 * KIB),
        (DEEPSEEK_V3, 61 * (512 + 64) * 2),  # 68.6 KiB
        (dense(28, 16, 1024, num_key_value_heads=8, head_dim=128), 112 * KIB),  # Qwen3-0.6B
        (dense(24, 64, 2880, num_key_value_heads=8, head_dim=64), 48 * KIB),  # gpt-oss-20b
    ],
)
def test_bytes_per_token_of_known_models(config: dict[str, Any], bytes_per_token: int) -> None:
    shape = kv_shape_from_config(config)
    assert shape.bytes_per_token("bfloat16") == bytes_per_token
    assert shape.bytes_per_token("float32") == 2 * bytes_per_token
    assert shape.bytes_per_token("fp8_e4m3") == bytes_per_token // 2
    vectors = sum(layer.num_kv_heads * (2 if layer.v_head_dim else 1) for layer in shape.layers)
    assert shape.bytes_per_token("int8") == bytes_per_token // 2 + 2 * vectors, "a scale each"
    assert shape.bytes_per_token("int4") == bytes_per_token // 4 + 4 * vectors, "a scale and a zero each"


def test_bytes_of_known_sequences_and_batches() -> None:
    assert kv_shape_from_config(LLAMA_3_8B).bytes_per_sequence(4096, "bfloat16") == 512 * MIB
    llama_2 = kv_shape_from_config(LLAMA_2_7B)
    assert llama_2.bytes_per_sequence(1024, "float16") == GIB // 2
    assert llama_2.bytes_per_batch(64, 1024, "float16") == 32 * GIB


def test_largest_batch_of_a_known_machine() -> None:
    shape = kv_shape_from_config(LLAMA_3_8B)
    assert shape.max_batch(80 * GIB, 2048, "bfloat16", weights_bytes=16 * GIB, reserve_fraction=0.1) == 230
    assert shape.max_tokens(80 * GIB, "bfloat16", weights_bytes=16 * GIB) == 64 * GIB // (128 * KIB)
    assert shape.max_batch(16 * GIB, 2048, "bfloat16", weights_bytes=17 * GIB) == 0


def test_known_figures_that_are_wrong() -> None:
    """Those that count K alone, or something else; docs/sizing.md has the arithmetic."""
    assert kv_shape_from_config(LLAMA_3_70B).bytes_per_token("bfloat16") == 2 * 160 * KIB
    assert kv_shape_from_config(DEEPSEEK_V3).bytes_per_token("bfloat16") == 70_272 > 2 * 32 * KIB
    circulating = dense(32, 32, 32 * 128)
    assert kv_shape_from_config(circulating).bytes_per_sequence(2048, "float16") == 2 * 512 * MIB


# --------------------------------------------------------------------------------------- attention kinds


def layers_of(config: dict[str, Any]) -> tuple[LayerKV, ...]:
    return kv_shape_from_config(config).layers


@pytest.mark.parametrize(
    ("config", "layer"),
    [
        pytest.param(dense(3, 4, 64), LayerKV(4, 16, 16), id="multi-head"),
        pytest.param(dense(3, 4, 64, num_key_value_heads=None, head_dim=None), LayerKV(4, 16, 16), id="nulls"),
        pytest.param(dense(3, 4, 64, num_key_value_heads=2), LayerKV(2, 16, 16), id="grouped-query"),
        pytest.param(dense(3, 4, 64, multi_query=True, num_kv_heads=4), LayerKV(1, 16, 16), id="multi-query"),
        pytest.param(
            dense(3, 4, 64, multi_query=True, new_decoder_architecture=True, num_kv_heads=2),
            LayerKV(2, 16, 16),
            id="falcon-40b",
        ),
        pytest.param(
            dense(3, 4, 64, multi_query_attention=True, multi_query_group_num=2), LayerKV(2, 16, 16), id="chatglm"
        ),
        pytest.param(dense(3, 4, 64, head_dim=32), LayerKV(4, 32, 32), id="explicit-head-dim"),
        pytest.param(dense(3, 4, 64, head_dim=32, v_head_dim=8), LayerKV(4, 32, 8), id="v-head-dim"),
        pytest.param({"n_layer": 3, "n_head": 4, "n_embd": 64}, LayerKV(4, 16, 16), id="gpt2-names"),
        pytest.param(
            {"n_layers": 3, "n_heads": 4, "d_model": 64, "attn_config": {"kv_n_heads": 2}},
            LayerKV(2, 16, 16),
            id="dbrx",
        ),
        pytest.param(dense(3, 4, 64, kv_lora_rank=24, qk_rope_head_dim=8), LayerKV(1, 32, 0), id="latent"),
    ],
)
def test_uniform_layers(config: dict[str, Any], layer: LayerKV) -> None:
    assert layers_of(config) == (layer,) * 3


@pytest.mark.parametrize(
    ("config", "kv_heads"),
    [
        pytest.param({"dim": 64, "n_layers": 2, "head_dim": 8, "n_heads": 8, "n_kv_heads": 2}, [2, 2], id="mistral"),
        pytest.param(dense(4, 8, 64, num_key_value_heads=2, use_cla=True, cla_share_factor=2), [2, 0, 2, 0], id="cla"),
        pytest.param(dense(2, 8, 64, num_key_value_heads=2, use_cla=False, cla_share_factor=2), [2, 2], id="cla-off"),
        pytest.param(dense(4, 8, 64, num_key_value_heads=2, layer_group_size=2), [0, 2, 0, 2], id="ling"),
        pytest.param(dense(5, 8, 64, num_key_value_heads=2, layer_group_size=2), [0, 2, 0, 2, 2], id="ling-uneven"),
        pytest.param(dense(2, 40, 320, n_shared_head=8), [5, 5], id="plamo"),
        pytest.param(dense(2, 9, 72, n_shared_head=8), [2, 2], id="plamo-uneven"),
        pytest.param(dense(2, 8, 64, attn_config={"attn_type": "multiquery_attention"}), [1, 1], id="mpt-multiquery"),
        pytest.param(dense(2, 8, 64, attn_config={"multiquery": True}), [1, 1], id="mpt-flag"),
        pytest.param(
            dense(2, 8, 64, attn_config={"attn_type": "grouped_query_attention", "kv_n_heads": 4}),
            [4, 4],
            id="mpt-grouped",
        ),
        pytest.param(dense(2, 8, 64, attn_config={"attn_type": "multihead_attention"}), [8, 8], id="mpt"),
    ],
)
def test_heads_and_layers_that_share_are_counted_once(config: dict[str, Any], kv_heads: list[int]) -> None:
    assert [layer.num_kv_heads for layer in layers_of(config)] == kv_heads


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kv_share_factor", 2),
        ("num_shared_kv_layers", 4),
        ("cross_layer_attention_groups", 2),
        ("kv_cache_sharing", True),
        ("n_query_groups", 4),
        ("mqa", True),
        ("heads_per_group", 8),
        ("layer_sharing", [0, 0, 1, 1]),
        ("reuse_kv_every", 2),
        ("attn_config", {"kv_group_size": 4}),
    ],
)
def test_a_setting_about_sharing_that_is_not_known_is_named(name: str, value: Any) -> None:
    unknown = f"attn_config.{next(iter(value))}" if isinstance(value, dict) else name
    with pytest.raises(UnsupportedModelError, match=f"the meaning of {unknown} for keys and values is not known"):
        kv_shape_from_config(dense(4, 8, 64, **{name: value}))


def test_settings_about_something_else_are_passed_over() -> None:
    harmless = {
        "n_shared_experts": 2,
        "moe_layer_interval": 2,
        "layer_norm_eps": 1e-5,
        "num_nextn_predict_layers": 1,
        "query_pre_attn_scalar": 256,
        "q_lora_rank": 1536,
        "kv_share_factor": None,
        "heads_per_group": False,
    }
    assert layers_of(dense(2, 8, 64, **harmless)) == layers_of(dense(2, 8, 64))


def test_the_keys_of_an_indexer_are_counted() -> None:
    deepseek_v32 = kv_shape_from_config({**DEEPSEEK_V3, "index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048})
    assert deepseek_v32.bytes_per_token("bfloat16") == 61 * (512 + 64 + 128) * 2
    assert deepseek_v32.bytes_per_token("int8") == 61 * (512 + 64 + 2 + 128 + 2)
    latent = dense(6, 4, 64, kv_lora_rank=24, qk_rope_head_dim=8, index_head_dim=16)
    every_other = {"index_topk_freq": 2, "index_skip_topk_offset": 1}
    for stated in (every_other, {"index_topk_pattern": "FSFSFS"}, {"indexer_types": ["full", "shared"] * 3}):
        values = [layer.values_per_token for layer in layers_of({**latent, **stated})]
        assert values == [48, 32, 48, 32, 48, 32]


def test_a_latent_layer_keeps_one_copy_for_all_heads() -> None:
    (layer,) = set(layers_of(DEEPSEEK_V3))
    assert layer.is_latent
    assert layer.values_per_token == 512 + 64
    assert not LayerKV(2, 16, 16).is_latent
    assert not NO_KV.is_latent


def test_nested_text_config_and_config_objects() -> None:
    nested = {"model_type": "vlm", "hidden_size": 7, "text_config": LLAMA_3_8B, "vision_config": dense(2, 2, 8)}
    assert layers_of(nested) == layers_of(LLAMA_3_8B)
    assert layers_of({"thinker_config": nested}) == layers_of(LLAMA_3_8B)
    assert kv_shape_from_config(SimpleNamespace(to_dict=lambda: nested)) == kv_shape_from_config(LLAMA_3_8B)
    assert layers_of({**LLAMA_3_8B, "text_config": {}}) == layers_of(LLAMA_3_8B)


def test_a_nested_config_may_have_left_out_the_default_of_its_class() -> None:
    nested = {"text_config": dense(2, 8, 64, model_type="mistral")}
    with pytest.raises(UnsupportedModelError, match="missing num_key_value_heads"):
        kv_shape_from_config(nested)
    assert kv_shape_from_config(SimpleNamespace(to_dict=lambda: nested)).layers == (LayerKV(8, 8, 8),) * 2


def test_heads_that_differ_by_layer() -> None:
    config = {"num_transformer_layers": 3, "num_query_heads": [4, 8, 8], "num_kv_heads": [1, 2, 4], "head_dim": 16}
    assert layers_of(config) == (LayerKV(1, 16, 16), LayerKV(2, 16, 16), LayerKV(4, 16, 16))
    per_layer = dense(3, 8, 64, num_key_value_heads=4, per_layer_config={"01": {"head_dim": 32}})
    assert layers_of(per_layer) == (LayerKV(4, 8, 8), LayerKV(4, 32, 32), LayerKV(4, 8, 8))
    blocks = [{"attention": {"n_heads_in_group": 4}}, {"attention": {"no_op": True}}]
    assert layers_of(dense(2, 8, 64, block_configs=blocks)) == (LayerKV(2, 8, 8), NO_KV)


def test_global_layers_of_another_shape() -> None:
    config = dense(
        6,
        16,
        2816,
        model_type="gemma4_text",
        num_key_value_heads=8,
        head_dim=256,
        global_head_dim=512,
        num_global_key_value_heads=2,
        attention_k_eq_v=True,
        layer_types=["sliding_attention"] * 5 + ["full_attention"],
    )
    assert layers_of(config) == (LayerKV(8, 256, 256),) * 5 + (LayerKV(2, 512, 512),)
    ungated = {**config, "attention_k_eq_v": False}
    assert layers_of(ungated)[-1] == LayerKV(8, 512, 512)


def test_sliding_layers_of_another_shape() -> None:
    config = dense(
        2,
        8,
        64,
        num_key_value_heads=2,
        head_dim=24,
        v_head_dim=16,
        swa_num_key_value_heads=4,
        swa_head_dim=12,
        swa_v_head_dim=8,
        hybrid_layer_pattern=[0, 1],
    )
    assert layers_of(config) == (LayerKV(2, 24, 16), LayerKV(4, 12, 8))


def test_the_last_layers_may_read_the_kv_of_earlier_ones() -> None:
    shape = kv_shape_from_config(dense(5, 4, 64, num_kv_shared_layers=2))
    assert shape.layers == (LayerKV(4, 16, 16),) * 3 + (NO_KV,) * 2
    assert (shape.num_layers, shape.num_kv_layers) == (5, 3)
    assert shape.groups() == [(LayerKV(4, 16, 16), 3), (NO_KV, 2)]


@pytest.mark.parametrize(
    "layout",
    [
        {"layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"]},
        {"layer_types": ["mamba", "attention", "mamba", "attention"]},
        {"layers_block_type": ["mamba", "hybrid", "moe", "attention"]},
        {"block_types": ["recurrent", "attention"]},
        {"hybrid_override_pattern": "M*-*"},
        {"attn_type_list": [0, 1, 0, 1]},
        {"attn_layer_indices": [1, 3], "mamba_d_state": 16},
        {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 16},
        {"full_attention_interval": 2, "linear_num_key_heads": 2},
        {"linear_attn_config": {"full_attn_layers": [2, 4], "kda_layers": [1, 3]}},
        {"cross_attention_layers": [0, 2]},
    ],
    ids=lambda layout: next(iter(layout)),
)
def test_hybrid_layers_without_kv(layout: dict[str, Any]) -> None:
    assert [layer.holds_kv for layer in layers_of(dense(4, 4, 64, **layout))] == [False, True, False, True]


def test_a_window_does_not_shrink_what_is_kept() -> None:
    windowed = dense(4, 4, 64, sliding_window=8, layer_types=["sliding_attention", "chunked_attention"] * 2)
    assert layers_of(windowed) == layers_of(dense(4, 4, 64))


# ------------------------------------------------------------------------------------ windows and query heads


def windows_of(config: dict[str, Any]) -> list[int | None]:
    return [layer.window for layer in layers_from_config(config)]


@pytest.mark.parametrize(
    ("more", "windows"),
    [
        ({"layer_types": ["sliding_attention", "full_attention"] * 2}, [8, None, 8, None]),
        ({"layer_types": ["chunked_attention", "full_attention"] * 2, "attention_chunk_size": 5}, [5, None, 5, None]),
        ({"layer_types": ["sliding_attention", "linear_attention"] * 2}, [8, None, 8, None]),
        ({"hybrid_layer_pattern": [0, 1, 1, 0], "sliding_window": None, "sliding_window_size": 6}, [None, 6, 6, None]),
        ({"model_type": "mistral"}, [8] * 4),
        ({"model_type": "mistral", "sliding_window": None}, [None] * 4),
        ({"model_type": "gemma2", "head_dim": 16}, [8, None, 8, None]),
        ({"sliding_window_pattern": 4}, [8, 8, 8, None]),
        ({"use_sliding_window": True, "max_window_layers": 3}, [None, None, None, 8]),
        ({"use_sliding_window": False, "max_window_layers": 3}, [None] * 4),
        ({"max_window_layers": 0}, [None] * 4),
        ({"model_type": "novel"}, [None] * 4),
        ({"layer_types": ["sliding_attention"] * 4, "sliding_window": "wide"}, [None] * 4),
        ({"layer_types": ["sliding_attention"] * 4, "num_kv_shared_layers": 2}, [8, 8, None, None]),
    ],
)
def test_windows(more: dict[str, Any], windows: list[int | None]) -> None:
    assert windows_of(dense(4, 4, 64, **{"sliding_window": 8, **more})) == windows


@pytest.mark.parametrize(
    "model_type", ["gemma2", "gemma3_text", "cohere2", "mistral", "mixtral", "phi3", "starcoder2", "qwen2"]
)
def test_windows_are_those_of_the_models_own_cache(model_type: str) -> None:
    from transformers import CONFIG_MAPPING, DynamicCache

    qwen = {"use_sliding_window": True, "max_window_layers": 3} if model_type == "qwen2" else {}
    config = CONFIG_MAPPING[model_type](num_hidden_layers=7, sliding_window=12, **qwen)
    own = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
    as_published = {name: value for name, value in config.to_dict().items() if name != "layer_types"}
    assert windows_of(as_published) == own


def full_heads_of(config: dict[str, Any]) -> list[LayerKV | None]:
    return [layer.full_heads for layer in layers_from_config(config)]


def test_what_query_heads_would_keep() -> None:
    assert full_heads_of(LLAMA_3_8B) == [LayerKV(32, 128, 128)] * 32
    assert full_heads_of(DEEPSEEK_V3) == [LayerKV(128, 128 + 64, 128)] * 61
    per_layer = {"num_transformer_layers": 2, "num_query_heads": [4, 8], "num_kv_heads": [1, 2], "head_dim": 16}
    assert full_heads_of(per_layer) == [LayerKV(4, 16, 16), LayerKV(8, 16, 16)]
    assert full_heads_of({"num_hidden_layers": 1, "num_key_value_heads": 2, "head_dim": 16}) == [None]
    assert full_heads_of(dense(1, 4, 64, kv_lora_rank=24, qk_rope_head_dim=8)) == [None]
    assert full_heads_of(dense(2, 4, 64, num_kv_shared_layers=1)) == [LayerKV(4, 16, 16), NO_KV]


def test_alternatives_of_a_hybrid() -> None:
    layers = layers_from_config(
        dense(
            3,
            4,
            64,
            num_key_value_heads=2,
            layer_types=["sliding_attention", "mamba", "full_attention"],
            sliding_window=10,
        )
    )
    found = {other.name: other for other in alternatives(layers, "bfloat16", 100)}
    assert found["multi-head"].bytes_per_token == 2 * (4 * 32 * 2)
    assert found["multi-query"].bytes_per_token == 2 * (1 * 32 * 2)
    assert found["window"].bytes_per_sequence == 2 * 32 * 2 * 10 + 2 * 32 * 2 * 100
    assert found["int4"].bytes_per_sequence == 100 * 2 * (2 * (8 + 4 + 8 + 4))
    assert [other.name for other in alternatives(layers, "bfloat16", None)] == [
        name for name in found if name != "window"
    ]


def test_scales_by_hand() -> None:
    odd = LayerKV(3, 5, 4)
    found = [odd.bytes_per_token(dtype) for dtype in ("float32", "fp8", "int8", "int4", "fp4")]
    assert found == [3 * 9 * 4, 3 * 9, 3 * (9 + 2 + 2), 3 * (3 + 4 + 2 + 4), 3 * (3 + 1 + 2 + 1)]
    assert LayerKV(2, 80, 64).bytes_per_token("fp4") == 2 * (40 + 5 + 32 + 4)
    assert LayerKV(1, 576, 0).bytes_per_token("int8") == 576 + 2
    assert NO_KV.bytes_per_token("int4") == 0


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "missing num_hidden_layers .*n_layer.* and num_attention_heads .* and hidden_size"),
        ({"num_hidden_layers": 2, "model_type": "novel"}, "'novel'.*missing num_attention_heads .* and hidden_size"),
        ({"num_hidden_layers": 2, "num_attention_heads": 4}, "missing hidden_size"),
        ({"num_hidden_layers": 2, "num_key_value_heads": 4, "hidden_size": 64}, "missing num_attention_heads"),
        (dense(2, 4, 64, kv_lora_rank=16), "missing qk_rope_head_dim"),
        (dense(2, 4, 64, model_type="gemma2"), "missing head_dim"),
        (dense(2, 4, 64, mamba_d_state=16), "missing layer_types"),
        (dense(2, 4, 64, multi_query_attention=True), "missing multi_query_group_num"),
        (dense(2, 3, 64), "no head_dim, and hidden_size 64 is no multiple of 3"),
        (dense(0, 4, 64), "num_hidden_layers of this config must be an integer of at least 1, not 0"),
        (dense(2, 4, 64, num_key_value_heads=-1), "num_key_value_heads .* not -1"),
        (dense(2, 4, 64, num_key_value_heads="8"), "num_key_value_heads .* not '8'"),
        (dense(2, 4, 64, num_key_value_heads=True), "num_key_value_heads .* not True"),
        (dense(2, 4, 64, head_dim=64.0), "head_dim .* not 64.0"),
        (dense(2, 4, 64, num_key_value_heads=[1, 2, 3]), "lists 3 values for 2 layers"),
        (dense(2, 4, 64, layer_types=["full_attention"]), "2 layers, but lists the types of 1"),
        (dense(1, 4, 64, layer_types=["telepathy"]), "'telepathy'"),
        (dense(1, 4, 64, layer_types=7), "malformed"),
        (dense(1, 4, 64, layer_types=[[]]), "malformed"),
        (dense(1, 4, 64, block_configs=[{}]), "malformed"),
        (dense(1, 4, 64, per_layer_config={"one": {}}), "malformed"),
        (dense(1, 4, 64, layer_types=["mamba"]), "none of the 1 layers keeps"),
        (dense(2, 4, 64, num_kv_shared_layers=2), "none of the 2 layers keeps"),
        (dense(2, 4, 64, is_encoder_decoder=True), "encoder-decoder"),
        (dense(2, 4, 64, index_head_dim=128), "index_head_dim"),
        (dense(2, 4, 64, kv_lora_rank=8, qk_rope_head_dim=4, index_head_dim=8, index_kpool=16), "index_head_dim"),
        (dense(2, 4, 64, layer_types=["indexed_attention"] * 2), "'indexed_attention'"),
        (dense(2, 4, 64, attn_config={"attn_type": "grouped_query_attention"}), "missing attn_config.kv_n_heads"),
        (dense(2, 4, 64, n_shared_head=0), "n_shared_head .* at least 1, not 0"),
        ({"model_type": "mamba2", "num_hidden_layers": 2, "num_heads": 8, "head_dim": 64}, "no attention"),
    ],
)
def test_configs_that_cannot_be_read_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        kv_shape_from_config(config)


@pytest.mark.parametrize("dtype", ["float64", "fp16", "", "BFLOAT16"])
def test_unknown_dtypes_are_refused_with_the_known_ones(dtype: str) -> None:
    with pytest.raises(ConfigError, match="float32, bfloat16, float16, fp8, fp8_e4m3, fp8_e5m2, int8, int4, fp4"):
        kv_shape_from_config(LLAMA_3_8B).bytes_per_token(dtype)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("memory_bytes", {"memory_bytes": -1}),
        ("memory_bytes", {"memory_bytes": 1.5}),
        ("weights_bytes", {"weights_bytes": -1}),
        ("reserve_fraction", {"reserve_fraction": 1.0}),
        ("reserve_fraction", {"reserve_fraction": -0.1}),
        ("reserve_fraction", {"reserve_fraction": float("nan")}),
        ("seq_tokens", {"seq_tokens": 0}),
        ("seq_tokens", {"seq_tokens": True}),
    ],
)
def test_arguments_out_of_range_are_named(name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=name):
        kv_shape_from_config(LLAMA_3_8B).max_batch(
            **{"memory_bytes": GIB, "seq_tokens": 1, "dtype": "int8", **arguments}
        )
    with pytest.raises(ConfigError, match="batch"):
        kv_shape_from_config(LLAMA_3_8B).bytes_per_batch(0, 1, "int8")


# ------------------------------------------------------------------------------------------- the formula

layers = st.builds(LayerKV, st.integers(1, 128), st.integers(1, 576), st.integers(0, 512)) | st.just(NO_KV)
shapes = st.lists(layers, min_size=1, max_size=12).filter(lambda ls: any(ls_.holds_kv for ls_ in ls))
dtypes = st.sampled_from(sorted(DTYPE_BITS))
counts = st.integers(1, 10**6)
unhurried = settings(deadline=None)


@unhurried
@given(st.lists(layers, max_size=12), dtypes)
def test_the_formula_counts_every_number_once(some: list[LayerKV], dtype: str) -> None:
    shape = KVShape((*some, LayerKV(1, 1, 1)))
    total_bits = 0
    for layer in shape.layers:
        for _ in range(layer.num_kv_heads):
            for dim in (layer.k_head_dim, layer.v_head_dim):
                if dim:
                    bits = dim * dtype_bits(dtype)
                    total_bits += bits + (-bits % 8)  # a vector starts at a whole byte
                    total_bits += {"int8": 16, "int4": 32}.get(dtype, 0)  # its scale, and zero
                    total_bits += 8 * sum(dtype == "fp4" for _ in range(0, dim, 16))  # those of its blocks
    assert shape.bytes_per_token(dtype) * 8 == total_bits


@unhurried
@given(shapes, shapes, counts, counts, dtypes)
def test_bytes_add_up_over_tokens_sequences_and_layers(
    first: list[LayerKV], second: list[LayerKV], a: int, b: int, dtype: str
) -> None:
    one, other, both = (KVShape(tuple(part)) for part in (first, second, [*first, *second]))
    assert one.bytes_per_sequence(a + b, dtype) == one.bytes_per_sequence(a, dtype) + one.bytes_per_sequence(b, dtype)
    assert one.bytes_per_batch(a, b, dtype) == one.bytes_per_batch(b, a, dtype) == a * one.bytes_per_sequence(b, dtype)
    assert both.bytes_per_token(dtype) == one.bytes_per_token(dtype) + other.bytes_per_token(dtype)


@unhurried
@given(st.integers(1, 6), st.integers(1, 64), st.integers(1, 8), st.integers(1, 32), st.integers(1, 64))
def test_grouped_queries_save_exactly_the_group(
    num_layers: int, num_kv_heads: int, group: int, head_dim: int, seq_tokens: int
) -> None:
    num_heads = num_kv_heads * group
    grouped = dense(num_layers, num_heads, num_heads * head_dim, num_key_value_heads=num_kv_heads)
    full = dense(num_layers, num_heads, num_heads * head_dim)
    grouped_bytes = kv_shape_from_config(grouped).bytes_per_sequence(seq_tokens, "float16")
    assert grouped_bytes == 2 * num_layers * num_kv_heads * head_dim * 2 * seq_tokens
    assert kv_shape_from_config(full).bytes_per_sequence(seq_tokens, "float16") == group * grouped_bytes


@unhurried
@given(shapes, counts, dtypes, st.integers(0, 10**12), st.integers(0, 10**12), st.integers(0, 999))
def test_the_largest_batch_fits_and_one_more_does_not(
    some: list[LayerKV], seq_tokens: int, dtype: str, memory: int, weights: int, reserve_permille: int
) -> None:
    shape, reserve = KVShape(tuple(some)), reserve_permille / 1000
    batch = shape.max_batch(memory, seq_tokens, dtype, weights_bytes=weights, reserve_fraction=reserve)
    budget = max(0, memory - weights) * (1000 - reserve_permille) // 1000
    assert kv_budget_bytes(memory, weights, reserve) == budget
    assert batch * shape.bytes_per_sequence(seq_tokens, dtype) <= budget
    assert (batch + 1) * shape.bytes_per_sequence(seq_tokens, dtype) > budget


@unhurried
@given(shapes, counts, dtypes, st.lists(st.integers(0, 10**12), min_size=2, max_size=6))
def test_more_memory_never_holds_less_and_more_tokens_never_cost_less(
    some: list[LayerKV], seq_tokens: int, dtype: str, amounts: list[int]
) -> None:
    shape, amounts = KVShape(tuple(some)), sorted(amounts)
    for less, more in pairwise(amounts):
        assert shape.max_batch(less, seq_tokens, dtype) <= shape.max_batch(more, seq_tokens, dtype)
        assert shape.max_batch(more, seq_tokens + 1, dtype) <= shape.max_batch(more, seq_tokens, dtype)
        assert shape.max_batch(10**12, seq_tokens, dtype, more) <= shape.max_batch(10**12, seq_tokens, dtype, less)
    wider = KVShape((*shape.layers, LayerKV(1, 8, 8)))
    assert wider.bytes_per_token(dtype) > shape.bytes_per_token(dtype)


# ---------------------------------------------------------------------------------- models as the oracle

TINY = {"vocab_size": 32, "num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 32}
_INDEXED = {
    **TINY,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "first_k_dense_replace": 4,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 8,
}
MODELS: dict[str, dict[str, Any]] = {
    "mpt": {"vocab_size": 32, "n_layers": 2, "n_heads": 4, "d_model": 32},
    "llama": {**TINY, "num_key_value_heads": 2},
    "qwen3": {**TINY, "num_key_value_heads": 2, "head_dim": 24},
    "gpt2": {"vocab_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 32},
    "gpt_bigcode": {"vocab_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 32, "multi_query": True},
    "falcon": {**TINY, "multi_query": True},
    "deepseek_v2": {
        **TINY,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
        "first_k_dense_replace": 4,
    },
    "gemma4_text": {
        **TINY,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "vocab_size_per_layer_input": 32,
        "hidden_size_per_layer_input": 8,
    },
    "qwen3_next": {
        **TINY,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "decoder_sparse_step": 0,
        "mlp_only_layers": [0, 1, 2, 3],
    },
}


def values_per_token_in(cache: Any) -> list[int]:
    """Numbers that each layer of a Hugging Face cache keeps for one token."""
    kept = []
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        kept.append(0 if keys is None or values is None else (keys[..., 0, :].numel() + values[..., 0, :].numel()))
    return kept


@pytest.mark.parametrize("model_type", MODELS)
def test_the_shape_is_what_the_model_itself_caches(model_type: str) -> None:
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[model_type](**MODELS[model_type])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        cache = model(input_ids=torch.arange(5)[None], use_cache=True).past_key_values
    expected = [layer.values_per_token for layer in kv_shape_from_config(config).layers]
    kept = values_per_token_in(cache)
    assert kept + [0] * (len(expected) - len(kept)) == expected  # no entry for trailing layers that share KV
    assert sum(expected) > 0


def test_odd_fields_are_named() -> None:
    with pytest.raises(UnsupportedModelError, match="is said to have 30000000 layers; more than 10,000 must be"):
        kv_shape_from_config(dense(30_000_000, 8, 64))
    assert kv_shape_from_config(dense(2, 8, 64, model_type=["llama"])).num_layers == 2


@pytest.mark.parametrize("model_type", ["deepseek_v32", "glm_moe_dsa"])
def test_the_keys_of_an_indexer_are_those_that_the_model_itself_caches(model_type: str) -> None:
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    more = {"indexer_types": ["full", "shared", "full", "shared"]} if model_type == "glm_moe_dsa" else {}
    config = CONFIG_MAPPING[model_type](**_INDEXED, **more)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        cache = model(input_ids=torch.arange(5)[None], use_cache=True).past_key_values
    own = [0 if layer.indexer_keys is None else layer.indexer_keys.shape[-1] for layer in cache.layers]
    found = [layer.values_per_token - (16 + 8) for layer in kv_shape_from_config(config).layers]
    assert found == own
    assert 16 in own
