"""What each layer of a model is, read off its config: attention, recurrent, both, or neither."""

from __future__ import annotations

from itertools import cycle, islice

from radixkv.errors import UnsupportedModelError
from radixkv.memory.config_fields import Fields, integer, look_up, missing_error, model_name

MOST_LAYERS = 10_000

_KV_TYPES = frozenset(
    {"attention", "full_attention", "sliding_attention", "chunked_attention", "hybrid", "hybrid_sliding"}
)
_NO_KV_TYPES = frozenset({"linear_attention", "mamba", "conv", "recurrent", "cross_attention", "mlp", "moe"})
_STATE_TYPES = frozenset({"linear_attention", "mamba", "conv", "recurrent", "hybrid", "hybrid_sliding"})
_RECURRENT_FIELDS = ("mamba_", "ssm_", "conv_L_cache", "linear_num_")
_PATTERN_LETTERS = {"*": "attention", "M": "mamba", "-": "mlp", "E": "moe"}  # Nemotron-H


def holds_kv(fields: Fields, layer_type: str) -> bool:
    """Whether a layer of that type keeps something per token. Raises: UnsupportedModelError for unknown types."""
    if layer_type in _KV_TYPES or (layer_type == "indexed_attention" and fields.get("index_head_dim") is not None):
        return True
    if layer_type in _NO_KV_TYPES:
        return False
    raise UnsupportedModelError(
        f"{model_name(fields)} has layers of type {layer_type!r}, whose KV is not known here; known are "
        f"{', '.join(sorted(_KV_TYPES | _NO_KV_TYPES))}"
    )


def keeps_state(fields: Fields, layer_type: str) -> bool:
    """Whether a layer of that type keeps a state of the tokens before, of one size however many they are."""
    return layer_type in _STATE_TYPES or _is_parallel_hybrid(fields)


def layer_types_from_fields(fields: Fields) -> list[str]:
    """The type of each layer, first layer first; "attention" where the config does not tell them apart."""
    stated = _stated_layer_types(fields)
    num_layers = _num_layers(fields)
    if num_layers is None and stated is None:
        names = ["num_hidden_layers", "num_attention_heads", "hidden_size"]
        raise missing_error(fields, [name for name in names if look_up(fields, name) is None])
    if stated is None:
        assert num_layers is not None
        stated = _computed_layer_types(fields, num_layers)
    if num_layers is not None and len(stated) != num_layers:
        raise UnsupportedModelError(
            f"{model_name(fields)} has {num_layers} layers, but lists the types of {len(stated)}"
        )
    for index in fields.get("cross_attention_layers") or ():
        stated[index] = "cross_attention"
    return stated


def _num_layers(fields: Fields) -> int | None:
    """Layers that could hold KV; a LongCat-Flash layer has two attentions."""
    num_layers = integer(fields, "num_hidden_layers")
    if num_layers is not None and num_layers > MOST_LAYERS:
        raise UnsupportedModelError(
            f"{model_name(fields)} is said to have {num_layers} layers; more than {MOST_LAYERS:,} must be a mistake"
        )
    return num_layers * 2 if num_layers and fields.get("model_type") == "longcat_flash" else num_layers


def _stated_layer_types(fields: Fields) -> list[str] | None:
    """Layer types that the config lists one by one."""
    for name in ("layer_types", "layers_block_type"):
        if fields.get(name):
            return list(fields[name])
    if pattern := fields.get("hybrid_override_pattern"):
        return [_PATTERN_LETTERS.get(letter, letter) for letter in pattern]
    if pattern := fields.get("attn_type_list"):  # MiniMax-01
        return ["full_attention" if is_full else "linear_attention" for is_full in pattern]
    if blocks := fields.get("block_configs"):  # DeciLM, Nemotron-NAS
        return ["mlp" if _is_without_attention(block["attention"]) else "attention" for block in blocks]
    if pattern := fields.get("hybrid_layer_pattern"):  # MiMo
        return ["sliding_attention" if is_sliding else "full_attention" for is_sliding in pattern]
    return None


def _is_without_attention(attention: Fields) -> bool:
    return bool(attention.get("no_op") or attention.get("replace_with_linear"))


def _computed_layer_types(fields: Fields, num_layers: int) -> list[str]:
    """Layer types that follow from a rule, or are all the same."""
    if pattern := fields.get("block_types"):  # RecurrentGemma
        return list(islice(cycle(pattern), num_layers))
    attention = _attention_layers(fields, num_layers)
    if (
        attention is None
        and any(name.startswith(_RECURRENT_FIELDS) for name in fields)
        and not _is_parallel_hybrid(fields)
    ):
        raise missing_error(fields, ["layer_types (which layers have attention)"])
    return ["attention" if attention is None or i in attention else "linear_attention" for i in range(num_layers)]


def _is_parallel_hybrid(fields: Fields) -> bool:
    """Whether each layer holds attention and Mamba side by side."""
    return fields.get("model_type") == "falcon_h1"


def _attention_layers(fields: Fields, num_layers: int) -> set[int] | None:
    """Indices of the layers with attention, where the config states a rule for them."""
    for name in ("attn_layer_indices", "full_attn_idxs"):  # Bamba, LFM2
        if fields.get(name):
            return set(fields[name])
    if period := integer(fields, "attn_layer_period"):  # Jamba
        offset = integer(fields, "attn_layer_offset", minimum=0) or 0
        return {i for i in range(num_layers) if i % period == offset}
    if interval := integer(fields, "full_attention_interval"):  # Qwen3-Next
        return {i for i in range(num_layers) if (i + 1) % interval == 0}
    if (size := integer(fields, "layer_group_size")) is not None:  # Ling, Ring: the last layer of each group
        whole = num_layers if fields.get("model_type") == "bailing_hybrid" else num_layers // size * size
        return {i for i in range(num_layers) if (i + 1) % size == 0 or i >= whole}
    if linear := fields.get("linear_attn_config"):  # Kimi Linear counts from 1
        return {i - 1 for i in linear.get("full_attn_layers", ())}
    return None
