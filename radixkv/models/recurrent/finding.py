"""Finds the modules of a model that keep a state of the tokens before, by running it once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from radixkv.memory.state_pool import StateShape
from radixkv.models.recurrent.facade import KINDS


class Call(NamedTuple):
    """What a module was called with."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class RecurrentModule(NamedTuple):
    """A module that keeps a state.

    Attributes:
        module: as it is in the model.
        layer: index of the layer in the cache that it asks for its state.
        num_states: numbered tensors of each kind that its layer has room for.
        shapes: what it keeps of a sequence.
        call: an example of how the model calls it.
    """

    module: nn.Module
    layer: int
    num_states: int
    shapes: tuple[StateShape, ...]
    call: Call


class _RecordingCache(DynamicCache):  # type: ignore[misc]
    """transformers' own cache, which notes who asks it for states."""

    def __init__(self, config: Any, running: list[nn.Module]) -> None:
        super().__init__(config=config)
        self._running = running
        self.askers: dict[tuple[int, str, int], nn.Module] = {}

    def _note(self, layer: int, kind: str, index: int) -> None:
        self.askers.setdefault((layer, kind, index), self._running[-1])

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        self._note(layer_idx, "conv", state_idx)
        state: Tensor | None = super().get_conv_state(layer_idx, state_idx)
        return state

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        self._note(layer_idx, "conv", state_idx)
        state: Tensor = super().update_conv_state(conv_states, layer_idx, state_idx, **kwargs)
        return state

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        self._note(layer_idx, "recurrent", state_idx)
        state: Tensor | None = super().get_recurrent_state(layer_idx, state_idx)
        return state

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        self._note(layer_idx, "recurrent", state_idx)
        state: Tensor = super().update_recurrent_state(recurrent_states, layer_idx, state_idx, **kwargs)
        return state


def keeps_states(model: PreTrainedModel) -> bool:
    """Whether transformers' cache for `model` has layers that keep states. O(layers)."""
    try:
        layers = DynamicCache(config=model.config).layers
    except Exception:  # configs of unknown code, which DynamicCache need not understand
        return False
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)


def find_recurrent_modules(model: PreTrainedModel, token_ids: Tensor) -> list[RecurrentModule]:
    """The modules that keep states, in the order in which they run.

    Args:
        token_ids: int64 [tokens], which the model is run on.
    """
    running: list[nn.Module] = []
    calls: dict[nn.Module, Call] = {}
    cache = _RecordingCache(model.config, running)
    with _watching(model, running, calls):
        model(input_ids=token_ids[None], past_key_values=cache, use_cache=True)
    askers: dict[nn.Module, list[tuple[int, str, int]]] = {}
    for key, module in cache.askers.items():
        askers.setdefault(module, []).append(key)
    return [_recurrent_module(cache, module, keys, calls[module]) for module, keys in askers.items()]


def _recurrent_module(
    cache: DynamicCache, module: nn.Module, keys: list[tuple[int, str, int]], call: Call
) -> RecurrentModule:
    layers = {layer for layer, _, _ in keys}
    assert len(layers) == 1, f"{type(module).__name__} keeps states of layers {sorted(layers)}"
    (index,) = layers
    kept = cache.layers[index]
    shapes = []
    for layer, kind, number in sorted(keys, key=lambda key: (KINDS.index(key[1]), key[2])):
        state = getattr(kept, f"{kind}_states")[number]
        if state is not None:  # asked for, and never kept
            shapes.append(StateShape(layer, kind, number, tuple(state.shape[1:]), state.dtype))
    return RecurrentModule(module, index, kept.number_of_states, tuple(shapes), call)


@contextmanager
def _watching(model: nn.Module, running: list[nn.Module], calls: dict[nn.Module, Call]) -> Iterator[None]:
    """Keep in `running` the modules that are being called, and in `calls` what each was called with first."""

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running.append(module)
        calls.setdefault(module, Call(args, kwargs))

    def leave(module: nn.Module, args: object, output: object) -> None:
        running.pop()

    with ExitStack() as hooks:
        for module in model.modules():
            hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(leave).remove)
        yield
