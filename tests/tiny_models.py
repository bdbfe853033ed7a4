"""Random decoders of every family that is tested, small enough to run in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel

from radixkv_bench.models.small_configs import sharpen, small_config

VOCAB_SIZE = 211

_COMMON: Mapping[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,  # a third shows nothing new, except where the kinds of layers alternate
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def with_common(**fields: Any) -> dict[str, Any]:
    return {**_COMMON, **fields}


_SLIDING_THEN_FULL: Mapping[str, Any] = {
    "num_hidden_layers": 3,
    "sliding_window": 9,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}

FAMILIES: Mapping[str, Callable[[], hf.PretrainedConfig]] = {
    "llama": lambda: hf.LlamaConfig(**with_common()),
    "qwen2": lambda: hf.Qwen2Config(**with_common()),
    "qwen3": lambda: hf.Qwen3Config(**with_common(head_dim=12)),
    "mistral": lambda: hf.MistralConfig(**with_common(sliding_window=9)),
    "gemma2": lambda: hf.Gemma2Config(**with_common(head_dim=8, attn_logit_softcapping=5.0, **_SLIDING_THEN_FULL)),
    "gemma3": lambda: hf.Gemma3TextConfig(**with_common(head_dim=8, **_SLIDING_THEN_FULL)),
    "phi3": lambda: hf.Phi3Config(**with_common(sliding_window=None)),
    "mixtral": lambda: hf.MixtralConfig(**with_common(num_local_experts=4, num_experts_per_tok=2)),
    "gpt_oss": lambda: hf.GptOssConfig(
        **with_common(
            head_dim=8,
            num_local_experts=4,
            num_experts_per_tok=2,
            **_SLIDING_THEN_FULL,
        )
    ),
    "llama4": lambda: hf.Llama4TextConfig(
        **with_common(
            num_hidden_layers=3,
            head_dim=8,
            intermediate_size_mlp=48,
            num_local_experts=4,
            num_experts_per_tok=1,
            attention_chunk_size=16,
            floor_scale=8,  # the temperature changes every 8 tokens, so a wrong position shows
            no_rope_layers=[1, 0, 1],
            layer_types=["chunked_attention", "full_attention", "chunked_attention"],
        )
    ),
}

_LATENT: Mapping[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
_EXPERTS: Mapping[str, Any] = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
_GROUPED_EXPERTS: Mapping[str, Any] = {**_EXPERTS, "n_group": 2, "topk_group": 1}
_YARN: Mapping[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,  # scales the scores
}

LATENT: Mapping[str, Callable[[], hf.PretrainedConfig]] = {  # multi-head latent attention, MLA
    "deepseek_v2": lambda: hf.DeepseekV2Config(**with_common(**_LATENT, **_EXPERTS)),
    "deepseek_v2_lite": lambda: hf.DeepseekV2Config(
        **with_common(**{**_LATENT, "q_lora_rank": None}, **_EXPERTS, rope_parameters=dict(_YARN))
    ),
    "deepseek_v3": lambda: hf.DeepseekV3Config(
        **with_common(**_LATENT, **_GROUPED_EXPERTS, rope_parameters=dict(_YARN))
    ),
    "deepseek_v3_not_interleaved": lambda: hf.DeepseekV3Config(
        **with_common(**_LATENT, **_GROUPED_EXPERTS, rope_interleave=False, attention_bias=True)
    ),
    "glm4_moe_lite": lambda: hf.Glm4MoeLiteConfig(**with_common(**_LATENT, **_GROUPED_EXPERTS)),
    "minicpm3": lambda: hf.MiniCPM3Config(**with_common(**_LATENT)),
    "longcat_flash": lambda: hf.LongcatFlashConfig(
        **{**with_common(**_LATENT), "num_hidden_layers": 4},
        num_layers=2,
        head_dim=8,
        ffn_hidden_size=48,
        expert_ffn_hidden_size=16,
        moe_topk=2,
        n_routed_experts=4,
        zero_expert_num=2,
    ),
    "youtu": lambda: hf.YoutuConfig(**with_common(**_LATENT)),
}

WIDE: Mapping[str, Callable[[], hf.PretrainedConfig]] = {  # heads of 16 components, as codes in blocks need them
    "llama_wide": lambda: hf.LlamaConfig(**with_common(head_dim=16)),
    "gemma3_wide": lambda: hf.Gemma3TextConfig(**with_common(head_dim=16, **_SLIDING_THEN_FULL)),
}

_NAMED_AS_GPT_2: Mapping[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FALCON: Mapping[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_OWN_ATTENTION: Mapping[str, Callable[[], hf.PretrainedConfig]] = {  # modules that compute attention by themselves
    "bloom": lambda: hf.BloomConfig(
        vocab_size=VOCAB_SIZE, hidden_size=48, n_layer=2, n_head=6, bos_token_id=1, eos_token_id=2, pad_token_id=0
    ),
    "falcon": lambda: hf.FalconConfig(**_FALCON),
    "falcon_grouped": lambda: hf.FalconConfig(**_FALCON, new_decoder_architecture=True, num_kv_heads=2),
    "falcon_alibi": lambda: hf.FalconConfig(  # 16 slopes are no powers of two, so what is rounded shows
        **{**_FALCON, "hidden_size": 64, "num_attention_heads": 16},
        alibi=True,
        multi_query=False,
        parallel_attn=False,
        bias=True,
    ),
    "mpt": lambda: hf.MptConfig(
        vocab_size=VOCAB_SIZE, d_model=48, n_layers=2, n_heads=6, max_seq_len=512, attn_config={"clip_qkv": 0.5}
    ),
    "gptj": lambda: hf.GPTJConfig(**_NAMED_AS_GPT_2, rotary_dim=4),
    "codegen": lambda: hf.CodeGenConfig(**_NAMED_AS_GPT_2, rotary_dim=4),
    "gpt_neo": lambda: hf.GPTNeoConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=9,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "gpt_neox_japanese": lambda: hf.GPTNeoXJapaneseConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "gpt": lambda: hf.OpenAIGPTConfig(**_NAMED_AS_GPT_2),
    "xglm": lambda: hf.XGLMConfig(
        vocab_size=VOCAB_SIZE,
        d_model=32,
        ffn_dim=48,
        num_layers=2,
        attention_heads=4,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
}
_WITHOUT_KEYWORD: Mapping[str, Callable[[], hf.PretrainedConfig]] = {  # models that drop what is passed to `forward`
    "stablelm": lambda: hf.StableLmConfig(**with_common(qk_layernorm=True)),
    "nemotron": lambda: hf.NemotronConfig(**with_common()),
}
OLDER: Mapping[str, Callable[[], hf.PretrainedConfig]] = {**_OWN_ATTENTION, **_WITHOUT_KEYWORD}

REFUSED: Mapping[str, Callable[[], hf.PretrainedConfig]] = {
    **{model_type: partial(small_config, model_type) for model_type in ("mamba2", "deepseek_v32", "t5")},
    "phimoe": lambda: hf.PhimoeConfig(**with_common(sliding_window=40, num_local_experts=4)),
}


def make_model(config: hf.PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random model in float32. Weights are larger than at initialisation, so that attention is far from uniform."""
    torch.manual_seed(seed)
    auto = hf.AutoModelForSeq2SeqLM if config.is_encoder_decoder else hf.AutoModelForCausalLM
    model: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
    return sharpen(model)


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A random model of `family`."""
    return make_model({**FAMILIES, **LATENT, **WIDE, **OLDER, **REFUSED}[family](), seed)


@cache
def served_model(family: str) -> PreTrainedModel:
    """`tiny_model(family)`, one for all tests of a process that do nothing to it but run it in engines."""
    return tiny_model(family)
