"""What the records of the compiled CPU workers of attention hold, and what they write to besides results."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixkv.attention.backend import AttentionParams
from radixkv.attention.numba_tasks import Work
from radixkv.kernels import numba_cpu


class Scratch(NamedTuple):
    """What tasks write besides results: `lse` of all rows and then of partial ones, and the results of these."""

    lse: Tensor
    partial_out: Tensor
    num_rows: int

    @property
    def partial_lse(self) -> int:
        """The address of the first partial row's."""
        return self.lse.data_ptr() + self.num_rows * self.lse.element_size()


class Launches(NamedTuple):
    """What layers that attend alike share in a plan.

    Attributes:
        work, scratch: what the addresses in the others lead to.
        tables: for each table of tasks what `numba_arguments.ATTENTION` holds for all of them, and how many threads.
        merge: what `numba_arguments.MERGE` holds for all of them, and how many threads; None if nothing is merged.
        counter: int64 [1].
    """

    work: Work
    scratch: Scratch
    tables: list[tuple[dict[str, Any], int]]
    merge: tuple[dict[str, int], int] | None
    counter: NDArray[np.int64]


def merge_fields(work: Work, out: Tensor, scratch: Scratch, num_q_heads: int) -> dict[str, int]:
    """What `numba_arguments.MERGE` holds besides the counter and sinks."""
    return {
        "num_rows": len(work.merged_rows),
        "rows": work.merged_rows.ctypes.data,
        "indptr": work.merged_indptr.ctypes.data,
        "partials": work.merged_partials.ctypes.data,
        "out": out.data_ptr(),
        "partial_out": scratch.partial_out.data_ptr(),
        "partial_lse": scratch.partial_lse,
        "num_q_heads": num_q_heads,
        "v_dim": out.shape[2],
    }


def factors(params: AttentionParams, unit: float) -> dict[str, float]:
    """The factors of scores and values, for K and V that are read as 1 / `unit` of their values."""
    log2_e, scale = float(numba_cpu.LOG2_E), params.scale * unit
    inverse_scale = 0.0 if params.key_bias is None else 1 / scale
    common = {"v_unit": unit, "inverse_scale": inverse_scale, "unused": 0}
    if params.softcap is None:
        return {"score_factor": scale * log2_e, "softcap": 0, "inverse_softcap": 0, **common}
    return {
        "score_factor": scale,
        "softcap": params.softcap * log2_e,
        "inverse_softcap": 1 / params.softcap,
        **common,
    }


def float32(*shape: int) -> Tensor:
    """What the kernel writes to: it takes addresses alone, so the application's default dtype must not decide."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")
