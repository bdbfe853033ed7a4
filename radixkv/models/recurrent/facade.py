"""Stands in for transformers' cache: hands recurrent layers the states of the sequences that they compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import LinearAttentionLayer

from radixkv.models.paged_attention import FlattenedPositions

KINDS = ("conv", "recurrent")


def put_state(layer: LinearAttentionLayer, kind: str, index: int, state: Tensor) -> None:
    """Let a layer of transformers' cache go on from `state`, [sequences, *shape]."""
    if kind == "conv":
        layer.conv_states[index], layer.is_conv_states_initialized[index] = state, True
        layer.conv_kernel_size[index] = state.shape[-1]
        layer.device, layer.dtype = state.device, state.dtype
    else:
        layer.recurrent_states[index], layer.is_recurrent_states_initialized[index] = state, True
    layer.has_previous_state[index] = True


class LayerStates:
    """The states of one layer for some sequences, in the object that transformers keeps them in.

    It pads, cuts and concatenates as ever, on copies: what it holds after the layer ran is its new state.
    """

    def __init__(self, num_states: int) -> None:
        self.layer = LinearAttentionLayer(number_of_states=num_states)

    def put(self, kind: str, index: int, state: Tensor) -> None:
        """Give it what is known of a sequence before the layer runs: `state` [sequences, *shape]."""
        put_state(self.layer, kind, index, state)

    def take(self, kind: str, index: int) -> Tensor | None:
        """What it holds; None if the layer keeps no such state."""
        states: Mapping[int, Tensor | None] = getattr(self.layer, f"{kind}_states")
        return states.get(index)


class OneLayerCache(Cache):  # type: ignore[misc]
    """What a recurrent module is handed as its cache, while it computes some sequences: the states of one layer."""

    def __init__(self, layer_index: int, states: LayerStates) -> None:
        super().__init__(layers=[None] * layer_index + [states.layer])


class StepStates(Protocol):
    """What recurrent modules compute in one forward pass, and from which states."""

    def run(self, module: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call `forward` of that recurrent module for each part of the batch that it can compute at once."""
        ...


class FlattenedCache(FlattenedPositions, Cache):  # type: ignore[misc]
    """Stands in for a cache that keeps nothing, while a flattened batch runs.

    Attributes:
        states: where recurrent modules find theirs.
        updated_layer: the layer whose keys and values were handed over last. Where several layers share an attention
            module it tells which one runs.
    """

    def __init__(self, positions: Tensor, states: StepStates) -> None:
        FlattenedPositions.__init__(self, positions)
        Cache.__init__(self, layers=[])
        self.states = states
        self.updated_layer: int | None = None

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Sequences with and without one run side by side; each recurrent module is told of its own."""
        return False

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep nothing, but which layer it was."""
        self.updated_layer = layer_idx
        return key_states, value_states
