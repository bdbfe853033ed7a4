"""The layers of one call of a model that keeps states, and the states in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from radixkv.errors import UnsupportedModelError
from radixkv.hf.chunk_buffer import ByteMeter
from radixkv.hf.chunked_cache import ChunkedLayer
from radixkv.memory.state_pool import StateShape
from radixkv.models.recurrent.facade import KINDS, put_state


class ChunkedHybridLayer(ChunkedLayer, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc]
    """One layer with states beside its keys and values, those of all tokens."""

    is_sliding = False

    def __init__(self, num_states: int, chunk_tokens: int, meter: ByteMeter) -> None:
        ChunkedLayer.__init__(self, chunk_tokens, meter)
        LinearAttentionLayer.__init__(self, number_of_states=num_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Of keys and values, which are passed by position, or of states, which are passed by name."""
        if args:
            ChunkedLayer.lazy_initialization(self, *args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns, and what states saw of them."""
        LinearAttentionLayer.crop(self, tokens_to_remove)
        ChunkedLayer.crop(self, tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give row i what row `beam_idx[i]` held."""
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        ChunkedLayer.reorder_cache(self, beam_idx)

    def reset(self) -> None:
        """Drop everything."""
        LinearAttentionLayer.reset(self)
        ChunkedLayer.reset(self)


def layers_of_call(config: PretrainedConfig, chunk_tokens: int, meter: ByteMeter) -> list[Any]:
    """Empty layers, as many as `DynamicCache` has for this config. Keys and values of all tokens are kept.

    Raises: UnsupportedModelError if a layer keeps something else than keys, values and states.
    """
    layers: list[Any] = []
    for index, layer in enumerate(DynamicCache(config=config).layers):
        match type(layer).__name__:
            case DynamicLayer.__name__ | DynamicSlidingWindowLayer.__name__:
                layers.append(ChunkedLayer(chunk_tokens, meter))
            case LinearAttentionLayer.__name__:
                layers.append(LinearAttentionLayer(number_of_states=layer.number_of_states))
            case LinearAttentionAndFullAttentionLayer.__name__ | LinearAttentionAndSlidingWindowAttentionLayer.__name__:
                layers.append(ChunkedHybridLayer(layer.number_of_states, chunk_tokens, meter))
            case "DummyLayer":
                layers.append(layer)
            case name:
                raise UnsupportedModelError(
                    f"only layers that keep keys and values per token, or states, are supported; layer {index} of "
                    f"{config.model_type} needs a {name}"
                )
    return layers


def kv_layers_of(layers: Sequence[Any]) -> list[ChunkedLayer]:
    """Those that keep keys and values."""
    return [layer for layer in layers if isinstance(layer, ChunkedLayer)]


def state_shapes(layers: Sequence[Any]) -> tuple[StateShape, ...]:
    """What the layers keep of a sequence besides keys and values, after a forward pass."""
    return tuple(_state_shapes(layers))


def _state_shapes(layers: Sequence[Any]) -> Iterator[StateShape]:
    for index, layer in enumerate(layers):
        if not isinstance(layer, LinearAttentionCacheLayerMixin):
            continue
        for kind in KINDS:
            for number, state in getattr(layer, f"{kind}_states").items():
                if state is not None:
                    yield StateShape(index, kind, number, tuple(state.shape[1:]), state.dtype)


def batch_states(layers: Sequence[Any], shapes: Sequence[StateShape]) -> list[Tensor]:
    """The states after the last column, one tensor [batch, *shape] for each of `shapes`. Views, where they can be."""
    states = []
    for shape in shapes:
        state = getattr(layers[shape.layer], f"{shape.kind}_states")[shape.number]
        assert state is not None, "a forward pass leaves a state in each layer"
        states.append(_last_inputs(state, shape.shape[-1]) if shape.kind == "conv" else state)
    return states


def put_states(layers: Sequence[Any], shapes: Sequence[StateShape], states: Sequence[Tensor]) -> None:
    """Let the layers go on from `states`, one tensor [batch, *shape] for each of `shapes`, which become theirs."""
    for shape, state in zip(shapes, states, strict=True):
        put_state(layers[shape.layer], shape.kind, shape.number, state)


def _last_inputs(state: Tensor, num_inputs: int) -> Tensor:
    """The last inputs of a convolution: a layer that records its past keeps more of them, or fewer at its start."""
    missing = num_inputs - state.shape[-1]
    return torch.nn.functional.pad(state, (missing, 0)) if missing > 0 else state[..., -num_inputs:]
