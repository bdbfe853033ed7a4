"""Finds out which recurrent modules can go on from a state with several tokens at once."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from radixkv.memory.state_pool import StatePool
from radixkv.models.recurrent.facade import FlattenedCache
from radixkv.models.recurrent.finding import Call, RecurrentModule
from radixkv.models.recurrent.parts import cut_arguments, map_arguments, span_of
from radixkv.models.recurrent.split_step import ModuleStates, SplitStep, StateSpan

MAX_DIFFERENCE = 1e-4  # of the outputs in float32, relative to their largest
PROBED_TOKENS = 140  # so that both halves are longer than the chunks of 64 that many of them compute in


def takes_chunks(found: Sequence[RecurrentModule], num_tokens: int) -> list[bool]:
    """For each module, whether it gives the same if it is fed its tokens at once or in chunks. O(classes) calls.

    A copy in float32 is run on the hidden states of the module's example call, so rounding hides nothing. Several of
    transformers' modules start their recurrence anew with each chunk of more than one token.

    Args:
        num_tokens: of the example calls.
    """
    known: dict[type[nn.Module], bool] = {}
    for each in found:
        if type(each.module) not in known:
            known[type(each.module)] = _takes_chunks(each, num_tokens)
    return [known[type(each.module)] for each in found]


def _takes_chunks(found: RecurrentModule, example_tokens: int) -> bool:
    module = copy.deepcopy(found.module).to(torch.float32)
    times = -(-PROBED_TOKENS // example_tokens)
    num_tokens = times * example_tokens
    found = found._replace(call=_repeated(found.call, example_tokens, times))
    device = next((value.device for value in module.parameters()), torch.device("cpu"))
    shapes = [shape._replace(dtype=torch.float32) for shape in found.shapes]
    pool = StatePool(shapes, 3, device)
    tensors = {(shape.kind, shape.number): number for number, shape in enumerate(shapes)}
    states = ModuleStates(found.layer, found.num_states, tensors, takes_chunks=True)
    half = num_tokens // 2
    whole = _run(states, pool, module, found.call, num_tokens, StateSpan(0, num_tokens, None, 0))
    first = _run(states, pool, module, found.call, num_tokens, StateSpan(0, half, None, 1))
    second = _run(states, pool, module, found.call, num_tokens, StateSpan(half, num_tokens, 1, 2))
    difference = float((torch.cat([first, second], dim=1) - whole).abs().max())
    return difference <= MAX_DIFFERENCE * float(whole.abs().max())


def _run(
    states: ModuleStates, pool: StatePool, module: nn.Module, call: Call, num_tokens: int, span: StateSpan
) -> Tensor:
    """What the module makes of the tokens of `span`, [1, tokens, …]."""
    num = span.last - span.first
    step = SplitStep([states], pool, [span._replace(first=0, last=num)])
    cut = span_of(span.first, span.last)
    cache = FlattenedCache(torch.arange(span.first, span.last, dtype=torch.int64, device=pool.device), step)
    args, kwargs = map_arguments(cut_arguments(tuple(call), num_tokens, cut, cache), _in_float32, lambda given: given)
    output = step.run(0, module.forward, args, kwargs)
    return output if isinstance(output, Tensor) else torch.cat([part.flatten(2) for part in output], dim=-1)


def _repeated(call: Call, num_tokens: int, times: int) -> Call:
    """A call with the tokens of `call`, several times one after the other."""
    args, kwargs = cut_arguments(
        tuple(call), num_tokens, lambda tensor: torch.cat([tensor] * times, dim=1), DynamicCache()
    )
    return Call(args, kwargs)


def _in_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32) if tensor.is_floating_point() else tensor
