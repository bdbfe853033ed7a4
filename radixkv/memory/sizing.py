"""What a model keeps per token in each layer, read off its Hugging Face config.

`kv_shape_from_config` reads, `KVShape` counts. The fields are those of the config classes in transformers 5.23 and of
the config.json files that model authors publish, which differ in names and in what they leave out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from radixkv.errors import UnsupportedModelError
from radixkv.memory.config_fields import (
    NAMES,
    Fields,
    decoder_fields,
    integer,
    look_up,
    missing_error,
    model_name,
    reading,
    refuse_left_out,
    refuse_uncounted,
    sets_own_head_dim,
)
from radixkv.memory.config_layer_types import holds_kv, layer_types_from_fields
from radixkv.memory.config_unknown import refuse_unknown_sharing
from radixkv.memory.config_windows import window_of_layer
from radixkv.memory.kv_shape import (
    DTYPE_BITS,
    NO_KV,
    IndexedLayerKV,
    KVShape,
    LayerKV,
    dtype_bits,
    kv_budget_bytes,
)

__all__ = [
    "DTYPE_BITS",
    "NO_KV",
    "HasToDict",
    "KVShape",
    "LayerConfig",
    "LayerKV",
    "content_of",
    "dtype_bits",
    "kv_budget_bytes",
    "kv_shape_from_config",
    "layers_from_config",
]


class HasToDict(Protocol):
    """A Hugging Face config, or anything else that turns into the content of a config.json."""

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json, with every default filled in."""
        ...


def content_of(config: Fields | HasToDict) -> Fields:
    """The content of a config.json."""
    return config if isinstance(config, Mapping) else config.to_dict()


class LayerConfig(NamedTuple):
    """One layer, as its config has it.

    Attributes:
        kv: what it keeps per token.
        full_heads: what it would keep with a K and a V for each query head; None where the config does not tell.
        window: how many tokens it sees, itself included; None if all, or if it keeps nothing.
    """

    kv: LayerKV
    full_heads: LayerKV | None
    window: int | None


def kv_shape_from_config(config: Fields | HasToDict) -> KVShape:
    """What each layer keeps per token, from a config object or the content of a config.json. O(layers).

    Prefer the object: a `text_config` inside a config.json leaves out what equals the default of its class.

    Raises: as `layers_from_config`.
    """
    return KVShape(tuple(layer.kv for layer in layers_from_config(config)))


def layers_from_config(config: Fields | HasToDict) -> tuple[LayerConfig, ...]:
    """Every layer, first layer first. O(layers).

    Raises: UnsupportedModelError if fields are missing (it names them), contradict each other, or describe a
        model that keeps something else than keys and values.
    """
    content = content_of(config)
    fields = decoder_fields(content)
    if isinstance(config, Mapping) and fields is not content:
        refuse_left_out(fields)
    refuse_uncounted(content)
    refuse_uncounted(fields)
    refuse_unknown_sharing(fields)
    with reading(fields):
        return _read(fields)


def _read(fields: Fields) -> tuple[LayerConfig, ...]:
    layer_types = layer_types_from_fields(fields)
    num_owners = len(layer_types) - (integer(fields, "num_kv_shared_layers", minimum=0) or 0)
    layers = []
    for index, layer_type in enumerate(layer_types):
        if index < num_owners and holds_kv(fields, layer_type) and not _reads_an_earlier_layer(fields, index):
            own = _fields_of_layer(fields, index, layer_type, len(layer_types))
            kv = _with_indexer(fields, index, _layer_kv(own))
            layers.append(LayerConfig(kv, _full_heads(own), window_of_layer(own, index, layer_type)))
        else:
            layers.append(LayerConfig(NO_KV, NO_KV, None))
    return tuple(layers)


def _reads_an_earlier_layer(fields: Fields, index: int) -> bool:
    """Whether a layer attends to the KV of the last layer before it that keeps some (Hunyuan-Large)."""
    factor = integer(fields, "cla_share_factor", minimum=0) if fields.get("use_cla") else None
    return bool(factor) and index % (factor or 1) != 0


def _with_indexer(fields: Fields, index: int, kv: LayerKV) -> LayerKV:
    """`kv`, with the key of the layer's indexer if it runs one: others take the choice of the layer before."""
    index_dim = integer(fields, "index_head_dim")
    if index_dim is None or not _runs_indexer(fields, index):
        return kv
    return IndexedLayerKV(kv.num_kv_heads, kv.k_head_dim, kv.v_head_dim, index_dim)


def _runs_indexer(fields: Fields, index: int) -> bool:
    if types := fields.get("indexer_types"):
        return bool(types[index] == "full")
    if pattern := fields.get("index_topk_pattern"):
        return pattern[index] in ("F", "full")
    every = integer(fields, "index_topk_freq") or 1
    offset = integer(fields, "index_skip_topk_offset", minimum=0)
    first = 2 if offset is None else offset
    return max(index - first + 1, 0) % every == 0


# ------------------------------------------------------------------------------------------------ layers


def _fields_of_layer(fields: Fields, index: int, layer_type: str, num_layers: int) -> Fields:
    """`fields` as they hold for one layer: overrides applied, lists over all layers replaced by their element."""
    own = dict(fields) | _overrides(fields, index, layer_type)
    for name in (*NAMES["num_attention_heads"], *NAMES["num_key_value_heads"], *NAMES["head_dim"]):
        if isinstance(values := own.get(name), (list, tuple)):
            if len(values) != num_layers:
                raise UnsupportedModelError(
                    f"{name} of {model_name(fields)} lists {len(values)} values for {num_layers} layers"
                )
            own[name] = values[index]
    return own


def _overrides(fields: Fields, index: int, layer_type: str) -> dict[str, Any]:
    """Fields that differ in this layer."""
    own: dict[str, Any] = {}
    if layer_type == "full_attention":  # Gemma 4
        own["head_dim"] = fields.get("global_head_dim")
        if fields.get("attention_k_eq_v", True):
            own["num_key_value_heads"] = fields.get("num_global_key_value_heads")
    if "sliding" in layer_type:  # MiMo, Inkling
        if fields.get("model_type") == "mimo_v2_flash":  # as its class has it, where the config is silent
            own["num_key_value_heads"] = 2 * (integer(fields, "num_key_value_heads") or 0)
        for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "v_head_dim"):
            own[name] = fields.get(f"swa_{name}", own.get(name))
    if blocks := fields.get("block_configs"):  # DeciLM, Nemotron-NAS
        num_heads = integer(fields, "num_attention_heads") or 0
        own["num_key_value_heads"] = num_heads // blocks[index]["attention"]["n_heads_in_group"]
    own = {name: value for name, value in own.items() if value is not None}
    for key, stated in (fields.get("per_layer_config") or {}).items():
        if int(key) == index:
            own.update(stated)
    return own


def _layer_kv(fields: Fields) -> LayerKV:
    if (latent := integer(fields, "kv_lora_rank")) is not None:
        rotary = integer(fields, "qk_rope_head_dim")
        if rotary is None:
            raise missing_error(fields, ["qk_rope_head_dim"])
        return LayerKV(1, latent + rotary, 0)
    num_kv_heads, head_dim = _num_kv_heads(fields), _head_dim(fields)
    if num_kv_heads is None or head_dim is None:
        raise missing_error(fields, _missing_names(fields))
    return LayerKV(num_kv_heads, head_dim, integer(fields, "v_head_dim") or head_dim)


def _full_heads(fields: Fields) -> LayerKV | None:
    """A K and a V for each query head; those of a latent layer as they are expanded to attend (MLA)."""
    num_heads = integer(fields, "num_attention_heads")
    if integer(fields, "kv_lora_rank") is not None:
        nope, rotary = integer(fields, "qk_nope_head_dim"), integer(fields, "qk_rope_head_dim")
        head_dim, v_head_dim = (nope and rotary and nope + rotary), integer(fields, "v_head_dim")
    else:
        head_dim = _head_dim(fields)
        v_head_dim = integer(fields, "v_head_dim") or head_dim
    return LayerKV(num_heads, head_dim, v_head_dim) if num_heads and head_dim and v_head_dim else None


def _num_kv_heads(fields: Fields) -> int | None:
    if fields.get("multi_query") and not fields.get("new_decoder_architecture"):
        return 1
    if fields.get("multi_query_attention"):  # ChatGLM
        return integer(fields, "multi_query_group_num")
    num_heads = integer(fields, "num_attention_heads")
    if (shared_by := integer(fields, "n_shared_head")) is not None and num_heads is not None:  # PLaMo
        return -(-num_heads // shared_by)
    attention = fields.get("attn_config") or {}  # MPT, DBRX
    if attention.get("multiquery") or attention.get("attn_type") == "multiquery_attention":
        return 1
    stated = integer(attention, "kv_n_heads") or integer(fields, "num_key_value_heads")
    if stated is None and attention.get("attn_type") == "grouped_query_attention":
        raise missing_error(fields, ["attn_config.kv_n_heads"])
    return stated or num_heads


def _head_dim(fields: Fields) -> int | None:
    hidden, num_heads = integer(fields, "hidden_size"), integer(fields, "num_attention_heads")
    if stated := integer(fields, "head_dim"):
        return stated
    if hidden is None or num_heads is None or sets_own_head_dim(fields):
        return None
    if hidden % num_heads:
        raise UnsupportedModelError(
            f"{model_name(fields)} gives no head_dim, and hidden_size {hidden} is no multiple of {num_heads} heads"
        )
    return hidden // num_heads


def _missing_names(fields: Fields) -> list[str]:
    """What to add so that KV heads and head_dim can be read."""
    needed = ["num_attention_heads"]
    if look_up(fields, "head_dim") is None:
        needed.append("head_dim" if sets_own_head_dim(fields) else "hidden_size")
    if fields.get("multi_query_attention"):
        needed.append("multi_query_group_num")
    return [name for name in needed if look_up(fields, name) is None]
