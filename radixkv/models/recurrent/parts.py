"""Cuts the arguments of a module's call along the tokens of a flattened batch, and joins what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import Cache

Cut: TypeAlias = Callable[[Tensor], Tensor]


def map_arguments(value: Any, on_tensor: Cut, on_cache: Callable[[Cache], Cache]) -> Any:
    """`value` with each tensor and each cache replaced, through the tuples, lists and mappings that hold them."""
    if isinstance(value, Tensor):
        return on_tensor(value)
    if isinstance(value, Cache):
        return on_cache(value)
    if isinstance(value, tuple | list):
        return type(value)(map_arguments(each, on_tensor, on_cache) for each in value)
    if isinstance(value, Mapping):
        return {name: map_arguments(each, on_tensor, on_cache) for name, each in value.items()}
    return value


def cut_arguments(value: Any, num_tokens: int, cut: Cut, cache: Cache) -> Any:
    """`value` with each tensor [1, num_tokens, …] cut by `cut`, and the flattened batch's cache replaced by `cache`."""

    def cut_if_of_tokens(tensor: Tensor) -> Tensor:
        is_of_tokens = tensor.dim() >= 2 and tensor.shape[0] == 1 and tensor.shape[1] == num_tokens
        return cut(tensor) if is_of_tokens else tensor

    return map_arguments(value, cut_if_of_tokens, lambda _: cache)


def join(outputs: Sequence[Any], put: Callable[[Sequence[Tensor]], Tensor]) -> Any:
    """What the whole batch gives, of what its parts gave: tensors joined by `put`, and anything else from the first."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return put(outputs)
    if isinstance(first, tuple):
        return tuple(join([output[place] for output in outputs], put) for place in range(len(first)))
    return first


def span_of(first: int, last: int) -> Cut:
    """Cuts the tokens `[first, last)`, as one sequence."""
    return lambda tensor: tensor[:, first:last]


def rows_of(rows: Tensor) -> Cut:
    """Cuts the tokens `rows`, each as a sequence of one token."""
    return lambda tensor: tensor[0].index_select(0, rows)[:, None]


def as_rows(output: Tensor) -> Tensor:
    """[sequences, tokens, …] as [sequences × tokens, …]."""
    return output.flatten(0, 1)


def in_order(parts: Sequence[Tensor], places: Sequence[Tensor], num_tokens: int) -> Tensor:
    """[1, num_tokens, …] with the rows of each part where `places` (int64) says."""
    rows = [as_rows(part) for part in parts]
    joined = torch.empty((num_tokens, *rows[0].shape[1:]), dtype=rows[0].dtype, device=rows[0].device)
    for part, place in zip(rows, places, strict=True):
        joined.index_copy_(0, place, part)
    return joined[None]
