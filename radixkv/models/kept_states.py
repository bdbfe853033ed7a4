"""Finds layers that attend over the very keys and values of an earlier layer, while a model runs once."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from radixkv.attention.backend import LayerAttention


class _States(NamedTuple):
    """K and V as a layer passed them, which keeps their memory from being used anew, and as they were then."""

    attention: LayerAttention
    k: Tensor
    v: Tensor
    k_then: Tensor
    v_then: Tensor

    def are(self, k: Tensor, v: Tensor) -> bool:
        """Whether `k` and `v` are the same tensors, to which nothing was written since."""
        return (
            _is_same(self.k, k) and _is_same(self.v, v) and torch.equal(self.k_then, k) and torch.equal(self.v_then, v)
        )


class KeptStates:
    """The keys and values of all layers that keep their own, as long as it lives."""

    def __init__(self) -> None:
        self._states: dict[int, _States] = {}

    def keep(self, layer: int, attention: LayerAttention, k: Tensor, v: Tensor) -> LayerAttention:
        """`attention`, with the earlier layer whose KV it reads, if it reads another's in the same way.

        That is so if both are the same tensors, nothing was written to them since, and the layer asks for the same
        window, scale and heads: a pool and a backend know these of the layer that keeps the KV. With sinks, which
        belong to a layer, each keeps its own.

        Args:
            k, v: [tokens, num_kv_heads, head_dim], of the same tokens for all layers.
        """
        for earlier, states in self._states.items():
            if states.are(k, v) and _attends_alike(states.attention, attention):
                return replace(attention, reads=earlier)
        self._states[layer] = _States(attention, k, v, k.clone(), v.clone())
        return attention


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether they are views of the same places in memory, in the same order."""
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()


def _attends_alike(one: LayerAttention, other: LayerAttention) -> bool:
    if one.params.sinks is not None or other.params.sinks is not None:
        return False
    return one == other
