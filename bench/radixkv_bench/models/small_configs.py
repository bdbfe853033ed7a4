"""Small configs of every family: generic sizes under whatever names a config class has, and a recipe's fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from radixkv_bench.models.recipes import RECIPES

VOCAB_SIZE = 211
CONTEXT_TOKENS = 512
WINDOW_TOKENS = 9

SIZES: Mapping[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,  # of encoders that have a decoder's head, too
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "encoder_attention_heads"), 4
    ),
    "num_key_value_heads": 2,
    "head_dim": 8,
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("max_position_embeddings", "max_seq_len", "n_positions"), CONTEXT_TOKENS),
    "sliding_window": WINDOW_TOKENS,
    "attention_chunk_size": 16,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
}
LATENT_SIZES: Mapping[str, Any] = {  # of multi-head latent attention, where each head has keys of its own
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
KINDS_OF_LAYERS = ("layer_types", "layers_block_type")
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def small_config(model_type: str) -> PretrainedConfig:
    """A config of the family with sizes of a few dozen, and a layer of each kind that its default has.

    `recipes.RECIPES` says what a family needs besides; a field that a recipe sets to None has the class's own default.
    Raises: whatever the config class makes of it.
    """
    return fill(CONFIG_MAPPING[model_type], RECIPES.get(model_type, {}))


def fill(config_class: type[PretrainedConfig], recipe: Mapping[str, Any]) -> PretrainedConfig:
    """A small config of that class: generic sizes, then the fields of `recipe`; those of parts are recipes, too."""
    known = field_names(config_class)
    sizes = {name: value for name, value in SIZES.items() if name in known}
    if "kv_lora_rank" in known:
        sizes |= {name: value for name, value in LATENT_SIZES.items() if name in known}
    sizes |= _kinds_of_layers(config_class, known, recipe)
    parts = {**_parts(config_class), **{name: recipe[name] for name in config_class.sub_configs if name in recipe}}
    sizes |= {name: value for name, value in recipe.items() if name not in parts}
    sizes |= {name: _part(config_class, name, part) for name, part in parts.items()}
    return config_class(**{name: value for name, value in sizes.items() if name not in recipe or value is not None})


def _parts(config_class: type[PretrainedConfig]) -> dict[str, Mapping[str, Any]]:
    """The parts that the default has, each with nothing but generic sizes; a text model's with its recipe."""
    default = config_class() if config_class.sub_configs else None
    parts = {name: getattr(default, name, None) for name in config_class.sub_configs}
    return {name: RECIPES.get(part.model_type, {}) for name, part in parts.items() if part is not None}


def _part(config_class: type[PretrainedConfig], name: str, recipe: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = fill(type(getattr(config_class(), name)), recipe).to_dict()
    return fields


def field_names(config_class: type[PretrainedConfig]) -> set[str]:
    """What the class can be called with, under either of a field's names."""
    own = {field.name for field in dataclasses.fields(config_class)}
    return own | set(config_class.attribute_map)


def _kinds_of_layers(
    config_class: type[PretrainedConfig], known: Iterable[str], recipe: Mapping[str, Any]
) -> dict[str, Any]:
    """Layers of each kind that the class's default has, in that order, and the first kind once more."""
    for name in KINDS_OF_LAYERS:
        if name in known and name not in recipe and not set(LAYER_COUNTS) & set(recipe):
            kinds = list(dict.fromkeys(getattr(config_class(), name, None) or []))
            if len(kinds) > 1:
                layers = [*kinds, kinds[0]]
                return {name: layers, **{count: len(layers) for count in LAYER_COUNTS if count in known}}
    return {}


def sharpen(model: PreTrainedModel) -> PreTrainedModel:
    """Enlarge random weights in place, so that attention is far from uniform. Returns: the model."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and not name.endswith("A_log"):  # whose exponential is a decay
                parameter.mul_(5.0)
            elif "sinks" in name:
                parameter.normal_()
    return model.eval()
