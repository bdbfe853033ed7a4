"""What single families need besides generic sizes: fields of their configs, by model type.

To add one, name the fields that the family's config class would otherwise make too large, or refuse. A field set to
None keeps the class's own default; the recipe of a part (`text_config`) is a mapping of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Recipe = Mapping[str, Any]


def layers_of(*kinds: str) -> dict[str, Any]:
    """The fields of layers of these kinds, in that order."""
    return {"num_hidden_layers": len(kinds), "layer_types": list(kinds)}


SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"

_MAMBA: Recipe = {
    "mamba_n_heads": 4,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
_DELTA: Recipe = {  # gated delta rule
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_INDEXER: Recipe = {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 8}
_SHARED_KV: Recipe = {  # two layers that keep nothing, one of each kind
    **layers_of(SLIDING, FULL, SLIDING, SLIDING, FULL),
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 211,
    "hidden_size_per_layer_input": 8,
}
_GEMMA4: Recipe = {**_SHARED_KV, "global_head_dim": 16}

RECIPES: Mapping[str, Recipe] = {
    "bailing_hybrid": {"linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "bamba": {**_MAMBA, "num_hidden_layers": 3, "attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        **layers_of(SLIDING, FULL, SLIDING),
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in (SLIDING, FULL)},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v32": _INDEXER,
    "deepseek_v4": {**_INDEXER, "num_key_value_heads": 1, "q_lora_rank": 20, "o_lora_rank": 8, "o_groups": 2},
    "dots3_note_text": {
        **_INDEXER,
        **layers_of(FULL, SLIDING, FULL),
        "head_dim": 20,
        "swa_head_dim": 20,
        "swa_qk_nope_head_dim": 12,
        "swa_v_head_dim": 10,
        "swa_kv_lora_rank": 16,
        "swa_q_lora_rank": 20,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
    },
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64, "mamba_d_head": 16},
    "gemma3n_text": {**_SHARED_KV, "laurel_rank": 8, "altup_num_inputs": 2},
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": {"global_head_dim": 16},
    "glm_moe_dsa": _INDEXER,
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 9},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {**_MAMBA, **layers_of("mamba", "attention", "mamba"), "shared_intermediate_size": 48},
    "jamba": {"num_hidden_layers": 3, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4},
    "laguna": layers_of(SLIDING, FULL, SLIDING),
    "lfm2": layers_of("conv", FULL, "conv"),
    "lfm2_moe": {**layers_of("conv", FULL, "conv"), "num_dense_layers": 1},
    "llama4_text": {"floor_scale": 8},  # the temperature changes every 8 tokens, so a wrong position shows
    "longcat_flash": {
        "num_hidden_layers": None,
        "num_layers": 2,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 16,
        "moe_topk": 2,
        "zero_expert_num": 2,
    },
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1},
    "mellum": layers_of(SLIDING, FULL, SLIDING),
    "moshi": {"audio_vocab_size": 64},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8},
    "olmo_hybrid": {"linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "qwen2": {**layers_of(SLIDING, FULL, SLIDING), "use_sliding_window": True},
    "qwen3": {**layers_of(SLIDING, FULL, SLIDING), "use_sliding_window": True},
    "qwen3_5_moe_text": _DELTA,
    "qwen3_5_text": _DELTA,
    "qwen3_next": _DELTA,
    "qwen4_exp_text": {
        **_DELTA,
        "hc_lowrank": 8,
        "ngram_vocab_size_base": 500,
        "split_ngram_parts": 1,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": 9, "lru_width": 32},
    "reformer": {
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [16, 32],
        "attention_head_size": 8,
        "feed_forward_size": 48,
        "attn_layers": ["local", "lsh"],
        "num_buckets": 4,
    },
    "roc_bert": {"pronunciation_vocab_size": 50, "shape_vocab_size": 50},
    "smollm3": {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1], "layer_types": [FULL] * 3},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "mamba_d_state": 8,
        "n_mamba_heads": 4,
        "mamba_ngroups": 1,
        "adapter_rank": 4,
        "chunk_size": 8,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
