"""One forward pass of a flattened batch, as recurrent modules see it: sequence by sequence, each from its own state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from radixkv.memory.state_pool import StatePool
from radixkv.models.recurrent.facade import LayerStates, OneLayerCache
from radixkv.models.recurrent.parts import Cut, cut_arguments, in_order, join, rows_of, span_of


class StateSpan(NamedTuple):
    """The rows `[first, last)` of a flattened batch, which belong to one sequence.

    Attributes:
        read: the slot of the state before the first of them; None at the start of a sequence.
        write: the slot for the state after the last one.
    """

    first: int
    last: int
    read: int | None
    write: int


class ModuleStates(NamedTuple):
    """What a step must know of a recurrent module.

    Attributes:
        layer: index in the cache that it asks.
        num_states: numbered tensors of each kind that its layer has room for.
        tensors: of the pool, by kind and index.
        takes_chunks: whether it can go on from a state with more than one token at once.
    """

    layer: int
    num_states: int
    tensors: Mapping[tuple[str, int], int]
    takes_chunks: bool


class _Group(NamedTuple):
    """A part of the batch that a module computes at once: one sequence, or single tokens of several.

    Attributes:
        cuts: of the arguments, one for each call; the states go from one call to the next.
        places: int64, which rows of the batch the outputs are.
        read, write: slots, int64 [sequences]; read is None where sequences start.
    """

    cuts: Sequence[Cut]
    places: Tensor
    read: Tensor | None
    write: Tensor


class SplitStep:
    """Runs recurrent modules on the parts of one batch. Single tokens that follow a state are computed side by side.

    Args:
        modules: what is known of each, by its number.
        spans: of the whole batch, in order.
    """

    def __init__(self, modules: Sequence[ModuleStates], pool: StatePool, spans: Sequence[StateSpan]) -> None:
        self._modules = modules
        self._pool = pool
        self._num_tokens = spans[-1].last
        self._in_chunks = tuple(self._groups(spans, takes_chunks=True))
        self._one_by_one = self._in_chunks
        if not all(module.takes_chunks for module in modules):
            self._one_by_one = tuple(self._groups(spans, takes_chunks=False))

    def run(self, module: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """As `StepStates.run`. Reads and writes the slots of the module's tensors."""
        states = self._modules[module]
        groups = self._in_chunks if states.takes_chunks else self._one_by_one
        outputs = [self._run_group(states, group, forward, args, kwargs) for group in groups]
        if len(outputs) == 1 and len(groups[0].cuts) == 1 and len(groups[0].write) == 1:
            return outputs[0]
        places = [group.places for group in groups]
        return join(outputs, lambda parts: in_order(parts, places, self._num_tokens))

    def _run_group(
        self,
        module: ModuleStates,
        group: _Group,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        states = LayerStates(module.num_states)
        if group.read is not None:
            for (kind, index), tensor in module.tensors.items():
                states.put(kind, index, self._pool.read(tensor, group.read))
        cache = OneLayerCache(module.layer, states)
        outputs = []
        for cut in group.cuts:
            own_args, own_kwargs = cut_arguments((args, dict(kwargs)), self._num_tokens, cut, cache)
            outputs.append(forward(*own_args, **own_kwargs))
        for (kind, index), tensor in module.tensors.items():
            state = states.take(kind, index)
            assert state is not None, f"a layer lost its {kind} state {index}"
            self._pool.write(tensor, group.write, state)
        return outputs[0] if len(outputs) == 1 else join(outputs, lambda parts: torch.cat(list(parts), dim=1))

    def _groups(self, spans: Sequence[StateSpan], *, takes_chunks: bool) -> Iterator[_Group]:
        singles = [span for span in spans if span.read is not None and span.last - span.first == 1]
        if singles:
            rows = self._int64([span.first for span in singles])
            read, write = ([getattr(span, name) for span in singles] for name in ("read", "write"))
            yield _Group([rows_of(rows)], rows, self._int64(read), self._int64(write))
        for span in spans:
            if span.read is not None and span.last - span.first == 1:
                continue
            cuts = [span_of(span.first, span.last)]
            if span.read is not None and not takes_chunks:
                cuts = [span_of(row, row + 1) for row in range(span.first, span.last)]
            places = torch.arange(span.first, span.last, dtype=torch.int64, device=self._pool.device)
            read_slots = None if span.read is None else self._int64([span.read])
            yield _Group(cuts, places, read_slots, self._int64([span.write]))

    def _int64(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._pool.device)
