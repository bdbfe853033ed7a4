"""What the recurrent layers of a model keep of a sequence, read off its Hugging Face config.

A recurrent layer carries a state from token to token in place of keys and values. It has one size, however many tokens
there are: the last inputs of a convolution, `channels × kernel`, and what the recurrence carries on:

    gated delta rule (Gated DeltaNet, Yang et al. 2024), KDA (Kimi Linear, 2025)   heads × key dim × value dim
    Mamba-2 (Dao and Gu, 2024)                                                     heads × head dim × state dim
    Mamba (Gu and Dao, 2023)                                                       channels × state dim
    CCA (Zaya)                                                                     the delayed half of each value
    short convolutions (LFM2)                                                      nothing

All but CCA's are float32 in the classes of transformers 5.23, whatever the dtype of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from types import MappingProxyType
from typing import NamedTuple

from radixkv.errors import UnsupportedModelError
from radixkv.memory.config_fields import Fields, decoder_fields, integer, model_name, reading
from radixkv.memory.config_layer_types import keeps_state, layer_types_from_fields
from radixkv.memory.kv_shape import dtype_bits
from radixkv.memory.sizing import HasToDict, content_of


class LayerState(NamedTuple):
    """What one recurrent layer keeps of a sequence.

    Attributes:
        kind: of the recurrence.
        conv: channels and kernel of its convolution, in the dtype of the model.
        recurrent: shape of what the recurrence carries on; () if there is none.
        is_float32: whether that is float32 in a model of any dtype, or else in the model's own.
    """

    kind: str
    conv: tuple[int, int]
    recurrent: tuple[int, ...] = ()
    is_float32: bool = True

    def num_bytes(self, model_dtype: str) -> int:
        """Size in a model of that dtype.

        >>> LayerState("short convolution", conv=(2048, 3)).num_bytes("bfloat16")
        12288
        """
        recurrent_dtype = "float32" if self.is_float32 else model_dtype
        num_recurrent = prod(self.recurrent) if self.recurrent else 0
        return (prod(self.conv) * dtype_bits(model_dtype) + num_recurrent * dtype_bits(recurrent_dtype)) // 8


def states_from_config(config: Fields | HasToDict) -> tuple[LayerState, ...]:
    """What each recurrent layer keeps, first layer first; () for a model without any. O(layers).

    Args:
        config: as for `layers_from_config`.

    Raises: UnsupportedModelError if the family's states are not known here (it names those that are), or fields are
        missing or malformed.
    """
    fields = decoder_fields(content_of(config))
    with reading(fields):
        num_layers = sum(keeps_state(fields, layer_type) for layer_type in layer_types_from_fields(fields))
        return (_state(fields, num_layers),) * num_layers if num_layers else ()


def _state(fields: Fields, num_layers: int) -> LayerState:
    read = _READERS.get(str(fields.get("model_type")))
    if read is None:
        raise UnsupportedModelError(
            f"the states of the {num_layers} recurrent layers of {model_name(fields)} are not known here; known are "
            f"those of {', '.join(_READERS)}"
        )
    return read(fields)


def _needed(fields: Fields, name: str) -> int:
    value = integer(fields, name)
    if value is None:
        raise UnsupportedModelError(
            f"the states of {model_name(fields)} cannot be read: missing {name}; add it, or load the config with "
            "transformers.AutoConfig, which knows the defaults of the model's class"
        )
    return value


def _gated_delta_rule(fields: Fields) -> LayerState:
    key_heads, value_heads = _needed(fields, "linear_num_key_heads"), _needed(fields, "linear_num_value_heads")
    key_dim, value_dim = _needed(fields, "linear_key_head_dim"), _needed(fields, "linear_value_head_dim")
    channels = 2 * key_heads * key_dim + value_heads * value_dim
    kernel = _needed(fields, "linear_conv_kernel_dim")
    return LayerState("gated delta rule", (channels, kernel), (value_heads, key_dim, value_dim))


def _kda(fields: Fields) -> LayerState:
    if published := fields.get("linear_attn_config"):  # Kimi Linear, as published
        fields = {
            **fields,
            "linear_num_heads": published.get("num_heads"),
            "linear_head_dim": published.get("head_dim"),
            "linear_conv_kernel_dim": published.get("short_conv_kernel_size"),
        }
    heads, dim = _needed(fields, "linear_num_heads"), _needed(fields, "linear_head_dim")
    return LayerState("KDA", (3 * heads * dim, _needed(fields, "linear_conv_kernel_dim")), (heads, dim, dim))


class _Mamba2Names(NamedTuple):
    """What a family calls the sizes of Mamba-2."""

    heads: str = "mamba_n_heads"
    head_dim: str = "mamba_d_head"
    state: str = "mamba_d_state"
    groups: str = "mamba_n_groups"
    kernel: str = "mamba_d_conv"

    def read(self, fields: Fields) -> LayerState:
        """The state, whose convolution runs over the inputs of all heads, and B and C of all groups."""
        heads, head_dim, state, groups, kernel = (_needed(fields, name) for name in self)
        channels = heads * head_dim + 2 * groups * state
        return LayerState("Mamba-2", (channels, kernel), (heads, head_dim, state))


def _mamba(fields: Fields) -> LayerState:
    channels, state = _needed(fields, "mamba_expand") * _needed(fields, "hidden_size"), _needed(fields, "mamba_d_state")
    return LayerState("Mamba", (channels, _needed(fields, "mamba_d_conv")), (channels, state))


def _mamba_heads(fields: Fields) -> LayerState:
    """Mamba in heads, which Zamba alone has."""
    state, heads = _mamba(fields), _needed(fields, "n_mamba_heads")
    channels, state_dim = state.recurrent
    return state._replace(recurrent=(heads, channels // heads, state_dim))


def _short_convolution(fields: Fields) -> LayerState:
    return LayerState("short convolution", (_needed(fields, "hidden_size"), _needed(fields, "conv_L_cache")))


def _cca(fields: Fields) -> LayerState:
    dim, kv_heads = _needed(fields, "head_dim"), _needed(fields, "num_key_value_heads")
    channels = (_needed(fields, "num_attention_heads") + kv_heads) * dim
    kernel = _needed(fields, "cca_time0") + _needed(fields, "cca_time1") - 2
    return LayerState("CCA", (channels, kernel), (kv_heads * dim // 2,), is_float32=False)


_mamba2 = _Mamba2Names().read
_NEMOTRON_H = _Mamba2Names("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel")
_ZAMBA2 = _Mamba2Names("n_mamba_heads", "mamba_headdim", groups="mamba_ngroups")

_READERS: Mapping[str, Callable[[Fields], LayerState]] = MappingProxyType(
    {
        "qwen3_next": _gated_delta_rule,
        "qwen3_5_text": _gated_delta_rule,
        "qwen3_5_moe_text": _gated_delta_rule,
        "olmo_hybrid": _gated_delta_rule,
        "kimi_linear": _kda,
        "bailing_hybrid": _kda,
        "falcon_h1": _mamba2,
        "granitemoehybrid": _mamba2,
        "bamba": _mamba2,
        "nemotron_h": _Mamba2Names(
            "mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel"
        ).read,
        "zamba2": _Mamba2Names("n_mamba_heads", "mamba_headdim", groups="mamba_ngroups").read,
        "jamba": _mamba,
        "zamba": _mamba_heads,
        "lfm2": _short_convolution,
        "lfm2_moe": _short_convolution,
        "lfm3": _short_convolution,
        "zaya": _cca,
    }
)
