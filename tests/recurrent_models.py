"""Random decoders with layers that keep states, small enough to run in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import transformers as hf

from tiny_models import VOCAB_SIZE, with_common

_DELTA: Mapping[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
}
_LINEAR: Mapping[str, Any] = {
    **_DELTA,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_EXPERTS: Mapping[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
_MAMBA: Mapping[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
_CONV: Mapping[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    "conv_L_cache": 3,
}
_LATENT: Mapping[str, Any] = {
    **_DELTA,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "qk_nope_head_dim": 8,
    "num_experts_per_tok": 2,
}

RECURRENT_FAMILIES: Mapping[str, Callable[[], hf.PretrainedConfig]] = {
    "qwen3_next": lambda: hf.Qwen3NextConfig(**with_common(head_dim=8, **_LINEAR, **_EXPERTS)),
    "qwen3_5": lambda: hf.Qwen3_5TextConfig(**with_common(head_dim=8, **_LINEAR)),
    "qwen3_5_moe": lambda: hf.Qwen3_5MoeTextConfig(**with_common(head_dim=8, **_LINEAR, **_EXPERTS)),
    "olmo_hybrid": lambda: hf.OlmoHybridConfig(**with_common(**_LINEAR)),
    "lfm2": lambda: hf.Lfm2Config(**with_common(block_auto_adjust_ff_dim=False, **_CONV)),
    "lfm2_moe": lambda: hf.Lfm2MoeConfig(
        **with_common(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, num_dense_layers=1, **_CONV)
    ),
    "lfm3": lambda: hf.Lfm3Config(**with_common(**_CONV)),
    "falcon_h1": lambda: hf.FalconH1Config(**with_common(mamba_d_ssm=64, **_MAMBA)),
    "bamba": lambda: hf.BambaConfig(**with_common(num_hidden_layers=3, attn_layer_indices=[1], **_MAMBA)),
    "granitemoehybrid": lambda: hf.GraniteMoeHybridConfig(
        **with_common(
            num_hidden_layers=3,
            layer_types=["mamba", "attention", "mamba"],
            num_local_experts=4,
            num_experts_per_tok=2,
            shared_intermediate_size=32,
            **_MAMBA,
        )
    ),
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
    "zamba2": lambda: hf.Zamba2Config(
        **with_common(
            num_hidden_layers=4,
            layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
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
        **with_common(num_local_experts=4, linear_head_dim=8, linear_num_heads=4, **_LATENT)
    ),
    "bailing_hybrid": lambda: hf.BailingHybridConfig(
        **with_common(num_local_experts=8, n_group=2, topk_group=1, **_LATENT)
    ),
    "inkling": lambda: hf.InklingTextConfig(**with_common(num_hidden_layers=4)),
    "zaya": lambda: hf.ZayaConfig(**with_common(num_hidden_layers=4)),
}

JAMBA: Callable[[], hf.PretrainedConfig] = lambda: hf.JambaConfig(  # noqa: E731
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
    )
)
MAMBA: Callable[[], hf.PretrainedConfig] = lambda: hf.MambaConfig(  # noqa: E731
    vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2, state_size=8
)
