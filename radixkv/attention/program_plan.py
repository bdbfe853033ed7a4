"""Plans whose attention can be part of a program of compiled workers, see `radixkv.kernels.numba_program`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from radixkv.attention.backend import AttentionParams
from radixkv.kernels.numba_program import Operation


class Pages(NamedTuple):
    """Where the keys and values of one layer lie, as `numba_arguments.ROTARY` names it."""

    k_pages: int
    v_pages: int
    page_size: int
    k_head_bytes: int
    v_head_bytes: int

    @classmethod
    def none(cls) -> Pages:
        """No pages: nothing is stored."""
        return cls(0, 0, 1, 0, 0)


class LayerOperations(NamedTuple):
    """The attention of one layer: operations that do not depend on each other, at most two, and one after them."""

    attend: list[Operation]
    merge: Operation | None


@runtime_checkable
class ProgramPlan(Protocol):
    """The attention of one batch as operations. Valid as a plan is."""

    def pages(self, dtype: torch.dtype) -> list[Pages] | None:
        """Where each layer's KV lies, in lanes; None if it does not, or is not kept or computed in `dtype`."""
        ...

    def operations(self, q: Tensor, out: Tensor, layers: Sequence[AttentionParams]) -> list[LayerOperations]:
        """The attention of every layer, which has its queries in `q` when its turn comes.

        Args:
            q: float32 [tokens, num_q_heads, k_head_dim]
            out: float32 [tokens, num_q_heads, v_head_dim], for the results

        Raises: ValueError if a layer asks for sinks.
        """
        ...
