"""Random decoders with recurrent layers, small enough to run in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import transformers as hf
from transformers import PreTrainedModel

from tiny_models import VOCAB_SIZE, make_model, with_common

_LINEAR: Mapping[str, Any] = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_LINEAR_THEN_FULL: Mapping[str, Any] = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
_MAMBA2: Mapping[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
_CONVOLUTION: Mapping[str, Any] = {
    "num_hidden_layers": 3,
    "layer_types": ["conv", "full_attention", "conv"],
    "conv_L_cache": 3,
}
_EXPERTS: Mapping[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT: Mapping[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
}

RECURRENT_FAMILIES: Mapping[str, Callable[[], hf.PretrainedConfig]] = {
    "qwen3_next": lambda: hf.Qwen3NextConfig(
        **with_common(head_dim=8, shared_expert_intermediate_size=16, **_EXPERTS, **_LINEAR_THEN_FULL, **_LINEAR)
    ),
    "qwen3_5": lambda: hf.Qwen3_5TextConfig(**with_common(head_dim=8, **_LINEAR_THEN_FULL, **_LINEAR)),
    "lfm2": lambda: hf.Lfm2Config(**with_common(block_auto_adjust_ff_dim=False, **_CONVOLUTION)),
    "lfm2_moe": lambda: hf.Lfm2MoeConfig(**with_common(num_dense_layers=1, **_EXPERTS, **_CONVOLUTION)),
    "lfm3": lambda: hf.Lfm3Config(**with_common(**_CONVOLUTION)),
    "falcon_h1": lambda: hf.FalconH1Config(**with_common(mamba_d_ssm=64, **_MAMBA2)),
    "nemotron_h": lambda: hf.NemotronHConfig(
        **with_common(
            num_hidden_layers=4,
            layers_block_type=["mamba", "attention", "mlp", "mamba"],
            head_dim=8,
            mamba_num_heads=4,
            mamba_head_dim=16,
            ssm_state_size=8,
            n_groups=1,
            conv_kernel=4,
            chunk_size=8,
        )
    ),
    "granitemoehybrid": lambda: hf.GraniteMoeHybridConfig(
        **with_common(
            num_hidden_layers=3,
            layer_types=["mamba", "attention", "mamba"],
            num_local_experts=4,
            num_experts_per_tok=2,
            shared_intermediate_size=32,
            **_MAMBA2,
        )
    ),
    "olmo_hybrid": lambda: hf.OlmoHybridConfig(**with_common(**_LINEAR_THEN_FULL, **_LINEAR)),
    "zamba2": lambda: hf.Zamba2Config(
        **with_common(
            num_hidden_layers=4,
            layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],  # which share one block of attention
            mamba_ngroups=1,
            n_mamba_heads=4,
            mamba_headdim=16,
            mamba_d_state=8,
            chunk_size=8,
            num_mem_blocks=1,
            attention_head_dim=16,
        )
    ),
    "kimi_linear": lambda: hf.KimiLinearConfig(
        **{
            **with_common(linear_head_dim=8, linear_num_heads=4, num_local_experts=4, **_LINEAR_THEN_FULL),
            **_LATENT,
        }
    ),
    "bailing_hybrid": lambda: hf.BailingHybridConfig(
        **{**with_common(num_local_experts=8, n_group=2, topk_group=1, **_LINEAR_THEN_FULL), **_LATENT}
    ),
    "bamba": lambda: hf.BambaConfig(**with_common(num_hidden_layers=3, attn_layer_indices=[1], **_MAMBA2)),
    "jamba": lambda: hf.JambaConfig(  # whose recurrent module starts anew with each chunk
        **with_common(
            num_hidden_layers=3,
            attn_layer_period=3,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=4,
            mamba_d_state=8,
            mamba_d_conv=4,
            mamba_dt_rank=4,
            use_mamba_kernels=False,
        )
    ),
    "zaya": lambda: hf.ZayaConfig(**with_common()),
}

MAMBA_ALONE: Callable[[], hf.PretrainedConfig] = partial(
    hf.MambaConfig, vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2, state_size=8
)
INKLING: Callable[[], hf.PretrainedConfig] = partial(hf.InklingTextConfig, **with_common(num_hidden_layers=4))
"""Refused by engines, though not by transformers' own `generate` with a cache of ours."""


@cache
def recurrent_model(family: str) -> PreTrainedModel:
    """A random model of `family`, one for all tests of a process that do nothing to it but run it in engines."""
    return make_model(RECURRENT_FAMILIES[family]())
