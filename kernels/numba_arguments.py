"""The arguments of the compiled CPU workers: records whose fields kernels read, and callers fill, by name.

A worker gets the address of its record. Fields that are not said to be numbers are addresses of arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from struct import Struct

import numpy as np
from numpy.typing import NDArray

STRUCT_CODES = {"i8": "q", "f4": "f"}
NO_ROW = -1  # in place of a row's number
NOT_SPLIT = -1  # in place of a partial row's number, of tasks that nothing is merged with


class Arguments:
    """A kind of record.

    Attributes:
        dtype: what compiled code reads, by name.
    """

    def __init__(self, fields: Sequence[tuple[str, str]]) -> None:
        self.dtype = np.dtype(list(fields), align=True)
        self._num_fields = len(fields)
        self._in_order = itemgetter(*(name for name, _ in fields))
        self._struct = Struct("@" + "".join(STRUCT_CODES[code] for _, code in fields))  # packs faster than NumPy does
        assert self._struct.size == self.dtype.itemsize, fields

    def fill(self, **values: float) -> NDArray[np.void]:
        """Make one record, shape (1,), read-only, of all its fields by name. O(fields).

        >>> record = LINEAR.fill(
        ...     counter=0, weight=0, input=0, bias=0, output=0, num_tokens=3, out_features=6, row_bytes=64
        ... )
        >>> int(record["num_tokens"][0])
        3
        """
        assert len(values) == self._num_fields, values.keys()
        return np.frombuffer(self._struct.pack(*self._in_order(values)), self.dtype)

    def make(self, **values: float) -> NDArray[np.void]:
        """As `fill`, but a record whose fields can be changed."""
        return self.fill(**values).copy()


ATTENTION = Arguments(
    [
        ("score_block", "i8"),  # addresses of functions (see `numba_cpu.compile_tiles`)
        ("value_block", "i8"),
        ("rows", "i8"),  # numbers: what their tiles are made for, and what the mode says (see `numba_modes`)
        ("groups", "i8"),
        ("value_lanes", "i8"),
        ("in_4_bytes", "i8"),
        ("parts", "i8"),
        ("num_scales", "i8"),
        ("block", "i8"),
        ("multiplies_pairs", "i8"),  # 1 or 0
        ("counter", "i8"),  # int64 [1], where the next task is
        ("num_tasks", "i8"),  # numbers
        ("from_memory", "i8"),  # 1 where few tasks read the same KV, so that most of it has to come from memory; else 0
        ("tasks", "i8"),  # int64 [num_tasks, 5]: KV head, its pages, first token, end, partial row or NOT_SPLIT
        ("row_ids", "i8"),  # int32 [num_tasks, rows]: token * num_q_heads + head, or NO_ROW
        ("row_starts", "i8"),  # int32 [num_tasks, rows]: of its task's tokens a row sees [start, end)
        ("row_ends", "i8"),
        ("pages", "i8"),  # int32, the page lists
        ("q", "i8"),  # float32 [num_rows, k_dim]
        ("k", "i8"),  # as `LaneKVPool` lays them out, or `KVPool`; after V's last value up to 15 may be read
        ("v", "i8"),
        # where the mode has scales: bfloat16 [pages, heads, scale (and zero), page_size]; of blocks uint8
        ("k_scales", "i8"),  # [pages, heads, blocks, page_size]
        ("v_scales", "i8"),
        ("key_bias", "i8"),  # float32 [num_q_heads, key_bias_tokens], a multiple of 16; 0 for none
        ("q_positions", "i8"),  # int64 [tokens], read where there are biases
        ("out", "i8"),  # float32 [num_rows, v_dim]
        ("lse", "i8"),  # float32 [num_rows]
        ("partial_out", "i8"),  # the same of partial rows
        ("partial_lse", "i8"),
        # numbers from here on
        ("k_dim", "i8"),
        ("v_dim", "i8"),
        ("num_kv_heads", "i8"),
        ("page_size", "i8"),
        ("key_bias_tokens", "i8"),
        ("num_q_heads", "i8"),
        ("in_lanes", "i8"),  # 1 or 0; always 1 where K and V are codes
        ("k_head_bytes", "i8"),  # from one head of a page to the next, in lanes
        ("v_head_bytes", "i8"),
        ("score_factor", "f4"),  # scale * log2(e); or scale, where there is a soft cap
        ("softcap", "f4"),  # the cap * log2(e), or 0
        ("inverse_softcap", "f4"),  # 1 / the cap, or 0
        ("v_unit", "f4"),  # what V is read as is 1 / `v_unit` of its values
        ("inverse_scale", "f4"),  # what makes biases of scores biases of products
        ("unused", "f4"),
    ]
)
"""Of `numba_cpu.attention_worker`. A task's partial row is the first of those it writes; -1 if it writes results."""

MERGE = Arguments(
    [
        ("counter", "i8"),  # int64 [1], where the next rows are
        ("num_rows", "i8"),  # a number
        ("rows", "i8"),  # int32 [num_rows]
        ("indptr", "i8"),  # int32 [num_rows + 1]
        ("partials", "i8"),  # int32; row i is made of partials [indptr[i], indptr[i + 1])
        ("sinks", "i8"),  # float32 [num_q_heads] logits that join the denominator alone; 0 for none
        ("out", "i8"),  # as in `ATTENTION`
        ("partial_out", "i8"),
        ("partial_lse", "i8"),
        ("num_q_heads", "i8"),  # numbers
        ("v_dim", "i8"),
    ]
)
"""Of `numba_merge.merge_worker`."""

LINEAR = Arguments(
    [
        ("counter", "i8"),  # int64 [1], where the next rows are
        ("weight", "i8"),  # [out_features, in_features]
        ("input", "i8"),  # [num_tokens, in_features], in the weight's dtype
        ("bias", "i8"),  # float32 [out_features], or 0
        ("output", "i8"),  # [num_tokens, out_features], in the weight's dtype
        ("num_tokens", "i8"),  # numbers
        ("out_features", "i8"),  # at least `numba_linear.MIN_ROWS`
        ("row_bytes", "i8"),  # a multiple of 64
    ]
)
"""Of `numba_linear.linear_worker`."""

NORM = Arguments(
    [
        ("counter", "i8"),  # int64 [1], where the next rows are
        ("input", "i8"),  # [num_rows, size]; where something is added, the sum is kept there
        ("added", "i8"),  # [num_rows, size], or 0
        ("weight", "i8"),  # [size]
        ("output", "i8"),  # [num_rows, size]; may be the input
        ("num_rows", "i8"),  # numbers
        ("size", "i8"),
        ("eps", "f4"),
        ("unused", "f4"),
    ]
)
"""Of `numba_fused.norm_worker`. All values are of one dtype."""

GATE = Arguments(
    [
        ("counter", "i8"),  # int64 [1], where the next values are
        ("gate", "i8"),  # [num_values]
        ("up", "i8"),
        ("output", "i8"),  # may be one of the others
        ("num_values", "i8"),  # a number, a multiple of 16
    ]
)
"""Of `numba_fused.gate_worker`."""

CAST = Arguments(
    [
        ("counter", "i8"),  # int64 [1], where the next values are
        ("narrow", "i8"),  # [num_values], as a mode keeps them
        ("wide", "i8"),  # float32 [num_values]
        ("num_values", "i8"),  # a number
    ]
)
"""Of `numba_fused.widen_worker` and `numba_fused.narrow_worker`."""

ROTARY = Arguments(
    [
        ("counter", "i8"),  # int64 [1], where the next heads are
        ("q", "i8"),  # [num_tokens, num_q_heads, head_dim]
        ("k", "i8"),  # [num_tokens, num_kv_heads, head_dim]
        ("v", "i8"),  # [num_tokens, num_kv_heads, v_dim]
        ("cos", "i8"),  # [num_tokens, head_dim]
        ("sin", "i8"),
        ("slots", "i8"),  # int64 [num_tokens]
        ("k_pages", "i8"),  # as `LaneKVPool` lays them out; 0 stores nothing
        ("v_pages", "i8"),
        ("num_tokens", "i8"),  # numbers
        ("num_q_heads", "i8"),
        ("num_kv_heads", "i8"),
        ("head_dim", "i8"),
        ("v_dim", "i8"),
        ("page_size", "i8"),
        ("k_head_bytes", "i8"),  # from one head of a page to the next
        ("v_head_bytes", "i8"),
    ]
)
"""Of `numba_fused.rotary_worker`. Slots and what follows are not read where nothing is stored."""

PROGRAM = Arguments([("table", "i8"), ("first", "i8"), ("last", "i8")])
"""Of `numba_program.program_worker`: the rows [first, last) of the table of `numba_program.Program`."""

NOTHING = Arguments([("counter", "i8"), ("unused", "i8")])
"""Of an operation that does nothing."""
