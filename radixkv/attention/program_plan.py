"""Plans whose attention can be part of a program of compiled workers, see `radixkv.kernels.numba_program`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixkv.attention.backend import AttentionParams


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


class LayersOperation(NamedTuple):
    """One operation of the attention of several layers.

    Attributes:
        layers: which, ascending.
        stage: 0 or 1 for what may run side by side, 2 for what follows both.
        worker: the compiled worker of all of them.
        records: the record of each, which the program may change.
    """

    layers: NDArray[np.int64]
    stage: int
    worker: Any
    records: NDArray[np.void]


STAGES = 3


@runtime_checkable
class ProgramPlan(Protocol):
    """The attention of one batch as operations. Valid as a plan is."""

    def pages(self, dtype: torch.dtype) -> list[Pages] | None:
        """Where each layer's KV lies, in lanes; None if it does not, or is not kept or computed in `dtype`."""
        ...

    def operations(self, q: Tensor, out: Tensor, layers: Sequence[AttentionParams]) -> list[LayersOperation]:
        """The attention of every layer, which has its queries in `q` when its turn comes.

        Args:
            q: float32 [tokens, num_q_heads, k_head_dim]
            out: float32 [tokens, num_q_heads, v_head_dim], for the results

        Raises: ValueError if a layer asks for sinks.
        """
        ...
