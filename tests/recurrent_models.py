"""Random decoders with recurrent layers, small enough to run in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import transformers as hf

from tiny_models import with_common

_LINEAR: Mapping[str, Any] = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}

RECURRENT_FAMILIES: Mapping[str, Callable[[], hf.PretrainedConfig]] = {
    "qwen3_5": lambda: hf.Qwen3_5TextConfig(
        **{**with_common(**_LINEAR), "num_hidden_layers": 3},
        head_dim=8,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    ),
    "lfm2": lambda: hf.Lfm2Config(
        **{**with_common(), "num_hidden_layers": 3},
        layer_types=["conv", "full_attention", "conv"],
        conv_L_cache=3,
        block_auto_adjust_ff_dim=False,
    ),
    "nemotron_h": lambda: hf.NemotronHConfig(
        **{**with_common(), "num_hidden_layers": 3},
        layers_block_type=["mamba", "attention", "mamba"],
        head_dim=8,
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=1,
        conv_kernel=4,
        chunk_size=8,
    ),
}
