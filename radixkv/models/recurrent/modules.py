"""The recurrent modules of a model, switched over to the states of a pool."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from radixkv.memory.state_pool import StatePool, StateShape
from radixkv.models.paged_attention import AttentionContext
from radixkv.models.recurrent.facade import FlattenedCache
from radixkv.models.recurrent.finding import RecurrentModule
from radixkv.models.recurrent.numbering import NumberedContext
from radixkv.models.recurrent.split_step import ModuleStates, SplitStep, StateSpan


class RecurrentModules:
    """Recurrent modules of one model, each of which computes a flattened batch sequence by sequence once plugged in.

    Calls that come with no flattened batch go through as ever.

    Args:
        found: in the order in which they run.
        takes_chunks: for each, whether it can go on from a state with more than one token at once.
    """

    def __init__(self, found: Sequence[RecurrentModule], takes_chunks: Sequence[bool]) -> None:
        self._modules: tuple[nn.Module, ...] = tuple(each.module for each in found)
        self._attention_layers: dict[int, int] | None = None
        self.shapes: tuple[StateShape, ...] = tuple(shape for each in found for shape in each.shapes)
        numbers = iter(range(len(self.shapes)))
        self._states = tuple(
            ModuleStates(
                each.layer,
                each.num_states,
                {(shape.kind, shape.number): next(numbers) for shape in each.shapes},
                takes,
            )
            for each, takes in zip(found, takes_chunks, strict=True)
        )

    @property
    def takes_chunks(self) -> bool:
        """Whether all of them can go on from a state with more than one token at once."""
        return all(states.takes_chunks for states in self._states)

    def step(self, pool: StatePool, spans: Sequence[StateSpan]) -> SplitStep:
        """What they compute in one forward pass."""
        return SplitStep(self._states, pool, spans)

    def number_attention_layers(self, layers: Sequence[int]) -> Mapping[int, int]:
        """Note the indexes, ascending, of the layers that attend: contexts know them by their place among these."""
        self._attention_layers = {layer: number for number, layer in enumerate(layers)}
        return self._attention_layers

    def numbered(self, context: AttentionContext, cache: FlattenedCache) -> NumberedContext:
        """`context`, for a model that is handed `cache`."""
        numbers = self._attention_layers
        return NumberedContext(context, cache, (lambda layer: layer) if numbers is None else numbers.__getitem__)

    def plug_in(self) -> None:
        """Let the modules compute flattened batches, too."""
        for number, module in enumerate(self._modules):
            module.forward = functools.partial(_split, number, module.forward)

    def unplug(self) -> None:
        """Leave the modules as they were."""
        for module in self._modules:
            vars(module).pop("forward", None)


def _split(number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The forward of a recurrent module that is plugged in."""
    caches = [value for value in (*args, *kwargs.values()) if isinstance(value, FlattenedCache)]
    if not caches:
        return forward(*args, **kwargs)
    return caches[0].states.run(number, forward, args, kwargs)
