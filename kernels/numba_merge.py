"""The worker that merges the parts of rows whose tokens were split over several tasks, and adds sinks."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numba as nb
import numpy as np
from numba import types

from radixkv.kernels import (
    numba_arguments,
    numba_attention_tiles,
    numba_block_scales,
    numba_codes,
    numba_emitter,
    numba_fp4,
    numba_modes,
    numba_words,
    numba_writers,
)
from radixkv.kernels.compiling import cache_depends_on, can_cache
from radixkv.kernels.numba_attention_tiles import NO_SCORE
from radixkv.kernels.numba_words import load_f32, load_i32, next_number, store_f32

MERGED_AT_ONCE = 16  # rows that a thread takes at a time
PARTS = (
    numba_arguments,
    numba_attention_tiles,
    numba_block_scales,
    numba_codes,
    numba_emitter,
    numba_fp4,
    numba_modes,
    numba_words,
    numba_writers,
)
ARGUMENTS = numba_arguments.MERGE.dtype


@cache
def merge_worker() -> Any:
    """The compiled worker that merges the parts of split rows, and adds sinks.

    It takes the address of a record of `numba_arguments.MERGE`, and works until the counter has passed all rows.
    """
    sources = cache_depends_on(*PARTS)

    @nb.cfunc(types.void(types.voidptr), cache=can_cache())
    def merge(data):
        _ = sources
        a = nb.carray(data, 1, dtype=ARGUMENTS)[0]
        v_dim = a.v_dim
        while True:
            first = next_number(a.counter) * MERGED_AT_ONCE
            if first >= a.num_rows:
                break
            for i in range(first, min(first + MERGED_AT_ONCE, a.num_rows)):
                row = np.int64(load_i32(a.rows, i))
                begin, end = load_i32(a.indptr, i), load_i32(a.indptr, i + 1)
                largest = NO_SCORE
                if a.sinks:
                    largest = load_f32(a.sinks, row % a.num_q_heads)
                sink = largest
                for j in range(begin, end):
                    largest = max(largest, load_f32(a.partial_lse, load_i32(a.partials, j)))
                total = np.float32(math.exp(sink - largest)) if a.sinks else np.float32(0)
                for j in range(begin, end):
                    total += np.float32(math.exp(load_f32(a.partial_lse, load_i32(a.partials, j)) - largest))
                for d in range(v_dim):
                    store_f32(a.out, row * v_dim + d, np.float32(0))
                for j in range(begin, end):
                    partial = np.int64(load_i32(a.partials, j))
                    share = np.float32(math.exp(load_f32(a.partial_lse, partial) - largest)) / total
                    for d in range(v_dim):
                        value = load_f32(a.out, row * v_dim + d)
                        value += share * load_f32(a.partial_out, partial * v_dim + d)
                        store_f32(a.out, row * v_dim + d, value)

    return merge
