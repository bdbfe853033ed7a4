"""Recognises decoders whose every part is transformers' own, so that what they compute is known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain, repeat
from operator import contains, is_
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from radixkv.models.paged_attention import INTERFACE_NAME
from radixkv.models.skinny_linear import SkinnyLinear, linear_mode

FAMILIES: Mapping[str, str] = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral"}
"""The families that differ in nothing but biases and norms of heads: name of the package, and of its classes."""

_GLOBAL_HOOKS = tuple(
    getattr(torch_module, name)
    for name in ("_global_forward_hooks", "_global_forward_pre_hooks")
    if hasattr(torch_module, name)
)


class Norm(NamedTuple):
    """RMSNorm."""

    weight: Tensor
    eps: float


class DecoderLayer(NamedTuple):
    """The parts of a layer, in the order in which they compute; q_norm and k_norm are None where there are none."""

    input_norm: Norm
    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    q_norm: Norm | None
    k_norm: Norm | None
    o: nn.Linear
    mlp_norm: Norm
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear

    @property
    def linears(self) -> tuple[nn.Linear, ...]:
        """Its linear layers."""
        return self.q, self.k, self.v, self.o, self.gate, self.up, self.down


class PlainDecoder:
    """A decoder of which every module was found to be of the class that transformers has for it.

    Attributes:
        mode: how the compiled kernels read its weights, see `numba_modes`.
        head_dim: of queries, keys and values.
        rotary: makes (cos, sin) of hidden states and positions.
    """

    def __init__(self, model: PreTrainedModel, layers: tuple[DecoderLayer, ...], mode: str) -> None:
        self.layers = layers
        self.mode = mode
        self.embeddings: Tensor = model.model.embed_tokens.weight
        self.norm = _norm(model.model.norm)
        self.head: nn.Linear = model.lm_head
        self.rotary: nn.Module = model.model.rotary_emb
        self.head_dim: int = model.model.layers[0].self_attn.head_dim
        self._config = model.config
        self._inner_config = model.model.config
        watched = [module for module in model.modules() if module is not self.rotary]
        self._hooks = [hooks for module in watched for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._attributes = [vars(module) for module in watched]
        self._children = [module._modules for module in watched]
        self._parameters = [module._parameters for module in watched]
        self._watched = watched  # all that is compared by identity is kept, so that no other can take its place
        self._tensors = [value for value in chain(*map(dict.values, self._parameters)) if value is not None]
        self._classes = sorted({type(module) for module in watched}, key=id)
        self._seen = list(self._look())
        self._addresses = list(map(Tensor.data_ptr, self._tensors))

    @property
    def hidden_size(self) -> int:
        """Components of a hidden state."""
        return int(self.embeddings.shape[1])

    def is_unchanged(self) -> bool:
        """Whether nobody has exchanged or hooked anything since. O(modules)."""
        return (
            not any(self._hooks)
            and not any(_GLOBAL_HOOKS)
            and self._config._attn_implementation == INTERFACE_NAME
            and self._inner_config._attn_implementation == INTERFACE_NAME
            and not any(map(contains, self._attributes, repeat("forward")))
            and all(map(is_, self._look(), self._seen))
            and list(map(Tensor.data_ptr, self._tensors)) == self._addresses
        )

    def _look(self) -> Iterator[object]:
        """Who is where: classes, their forwards, modules and parameters, and at the end that there are no more."""
        return chain(
            map(type, self._watched),
            [kind.forward for kind in self._classes],
            chain.from_iterable(map(dict.values, self._children)),
            chain.from_iterable(map(dict.values, self._parameters)),
            (PlainDecoder,),
        )


def find_plain_decoder(model: PreTrainedModel) -> PlainDecoder | None:
    """`model` in parts; None if it is not on the CPU, or if any module is not what transformers makes of its class."""
    family = type(model).__module__.rpartition("modeling_")[2]
    if family not in FAMILIES or not _is(model, family, "ForCausalLM"):
        return None
    inner = model.model
    parts = {
        inner: "Model",
        inner.norm: "RMSNorm",
        inner.rotary_emb: "RotaryEmbedding",
        **{module: part for layer in inner.layers for module, part in _parts_of_layer(layer)},
    }
    if not all(_is(module, family, part) for module, part in parts.items()):
        return None
    others = [inner.embed_tokens, inner.layers, model.lm_head, *(layer.mlp.act_fn for layer in inner.layers)]
    linears = [module for layer in inner.layers for module in _linears_of_layer(layer)]
    known = {model, *parts, *others, *linears, *inner.rotary_emb.modules()}
    if not all(module in known for module in model.modules()) or len(inner.layers) != model.config.num_hidden_layers:
        return None
    if type(inner.embed_tokens) is not nn.Embedding or inner.embed_tokens.max_norm is not None:
        return None
    if not all(type(layer.mlp.act_fn) in (nn.SiLU, type(ACT2FN["silu"])) for layer in inner.layers):
        return None
    mode = _common_mode([*linears, model.lm_head], model)
    if mode is None:
        return None
    decoder = PlainDecoder(model, tuple(_layer(layer) for layer in inner.layers), mode)
    return decoder if decoder.is_unchanged() else None


def _is(module: nn.Module, family: str, part: str) -> bool:
    """Whether `module` is of transformers' class of that name, and runs that class's own forward."""
    kind, place, name = type(module), f"transformers.models.{family}.modeling_{family}", FAMILIES[family] + part
    if kind.__module__ != place or kind.__name__ != name:
        return False
    if issubclass(kind, PreTrainedModel):  # decorators stand around these
        return getattr(kind.forward, "__qualname__", "") == f"{name}.forward"
    return kind.forward.__module__ == place and kind.forward.__qualname__ == f"{name}.forward"


def _parts_of_layer(layer: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    yield layer, "DecoderLayer"
    for name, part in (
        ("self_attn", "Attention"),
        ("mlp", "MLP"),
        ("input_layernorm", "RMSNorm"),
        ("post_attention_layernorm", "RMSNorm"),
    ):
        yield getattr(layer, name), part
    for name in ("q_norm", "k_norm"):
        if hasattr(layer.self_attn, name):
            yield getattr(layer.self_attn, name), "RMSNorm"


def _linears_of_layer(layer: Any) -> tuple[nn.Module, ...]:
    attention, mlp = layer.self_attn, layer.mlp
    return (
        attention.q_proj,
        attention.k_proj,
        attention.v_proj,
        attention.o_proj,
        mlp.gate_proj,
        mlp.up_proj,
        mlp.down_proj,
    )


def _common_mode(linears: list[nn.Module], model: PreTrainedModel) -> str | None:
    """The mode in which the kernels read all of `linears`, if they are plain and everything has their dtype."""
    if not all(type(linear) in (nn.Linear, SkinnyLinear) for linear in linears):
        return None
    weights: list[Any] = [linear.weight for linear in linears]
    modes = {linear_mode(weight) for weight in weights}
    if len(modes) != 1 or any(
        value.dtype != weights[0].dtype or value.device.type != "cpu" or not value.is_contiguous()
        for value in model.parameters()
    ):
        return None
    if any(
        type(value) not in (nn.Parameter, Tensor) for value in model.parameters()
    ):  # tensors of classes of their own
        return None
    return modes.pop()


def _layer(layer: Any) -> DecoderLayer:
    attention, mlp = layer.self_attn, layer.mlp
    return DecoderLayer(
        _norm(layer.input_layernorm),
        attention.q_proj,
        attention.k_proj,
        attention.v_proj,
        _norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
        _norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        attention.o_proj,
        _norm(layer.post_attention_layernorm),
        mlp.gate_proj,
        mlp.up_proj,
        mlp.down_proj,
    )


def _norm(module: Any) -> Norm:
    return Norm(module.weight, float(module.variance_epsilon))
