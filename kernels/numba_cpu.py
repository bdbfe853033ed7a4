"""Attention over paged KV on the CPU, compiled by Numba: reads the pages in place, on all of torch's threads.

The work comes as a table of tasks. A task takes up to ROWS query rows that read the same KV head (the query heads of a
group, several tokens of an extend, or several sequences over a prefix that they share) over a range of one list of
pages, block by block with an online softmax (Milakov and Gimelshein, 2018). Rows whose tokens are split over several
tasks are merged by their log-sum-exps afterwards ("Flash-Decoding", Dao et al., 2023).

Inside, logarithms are of base 2: the scores are multiplied by log2(e) when they are scaled.
"""

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
    numba_blocks,
    numba_codes,
    numba_emitter,
    numba_modes,
    numba_words,
    numba_writers,
)
from radixkv.kernels.compiling import cache_depends_on, can_cache, inner
from radixkv.kernels.numba_attention_tiles import (
    NO_SCORE,
    exp2_row,
    limit_row,
    scale_scores,
    scale_weights,
    score_tile,
    value_tile,
)
from radixkv.kernels.numba_blocks import locate, locate_staged, stage_keys, stage_pairs_of_values, stage_values
from radixkv.kernels.numba_emitter import LANES
from radixkv.kernels.numba_modes import (
    MODES,
    Tile,
    bytes_of_weight_of,
    in_4_bytes_of,
    multiplies_pairs_of,
    num_scales_of,
    parts_of,
)
from radixkv.kernels.numba_words import load_f32, load_i32, load_i64, next_number, store_f32

BLOCK_TOKENS = 256  # between two rescalings; the scores of one block stay in the first-level cache
MAX_ROWS = 8
LN_2, LOG2_E = np.float32(math.log(2)), np.float32(math.log2(math.e))
NOT_SPLIT = -1

ARGUMENTS = numba_arguments.ATTENTION.dtype
PARTS = (  # what a worker is made of, besides this module
    numba_arguments,
    numba_attention_tiles,
    numba_blocks,
    numba_codes,
    numba_emitter,
    numba_modes,
    numba_words,
    numba_writers,
)


def tile_of(mode: str, rows: int) -> Tile:
    """The tile for `rows` query rows: sums enough to hide the multiplier's latency, not more than registers."""
    groups = 8 if rows <= 2 else 4 if rows <= 5 else 2
    vectors = 4 if rows <= 6 else 2
    return Tile(rows, groups, vectors // MODES[mode].parts, MODES[mode])


@cache
def attention_worker(mode: str, rows: int) -> Any:
    """The compiled worker for tasks of `rows` query rows over KV of that mode (see `numba_modes`).

    It takes the address of a record of `numba_arguments.ATTENTION`, and works until the counter has passed all tasks.
    The first call for a mode and a number of rows compiles, in a few seconds, and later processes load it from Numba's
    cache on disk.
    """
    shape = tile_of(mode, rows).shape
    sources = cache_depends_on(*PARTS)

    @nb.cfunc(types.void(types.voidptr), cache=can_cache())
    def attention(data):
        _ = sources
        run_attention(nb.carray(data, 1, dtype=ARGUMENTS)[0], shape)

    return attention


@inner
def run_attention(a, shape):
    rows, groups = len(shape[0]), len(shape[1])
    width, parts = in_4_bytes_of(shape), parts_of(shape)
    k_dim, v_dim = a.k_dim, a.v_dim
    queries = np.empty(k_dim * rows, np.uint32)
    row_tokens = BLOCK_TOKENS + groups * LANES
    scores = np.empty((rows, row_tokens), np.float32)
    weights = np.empty((rows, row_tokens * bytes_of_weight_of(shape)), np.uint8)
    # a vector may reach beyond V's last component: what it finds there stays in lanes that are never written out
    acc = np.empty((rows, parts * padded(v_dim // parts)), np.float32)
    maximum, total, rescale = np.empty(rows, np.float32), np.empty(rows, np.float32), np.empty(rows, np.float32)
    query_sums, zeros = np.zeros(rows, np.float32), np.zeros(rows, np.float32)  # what zeros of K and V are weighed by
    # of a block, and of what follows: the next block, or the last group again
    k_at, v_at = np.empty(BLOCK_TOKENS // LANES + groups, np.int64), np.empty(BLOCK_TOKENS // LANES + groups, np.int64)
    scales_at = np.empty((2, BLOCK_TOKENS // LANES + groups), np.int64)  # of K and of V
    staged_tokens = 0 if a.in_lanes else BLOCK_TOKENS
    k_lanes = np.empty(staged_tokens * k_dim // width, np.int32)
    v_lanes = np.empty(staged_tokens * v_dim // width + LANES, np.int32)
    while True:
        task = next_number(a.counter)
        if task >= a.num_tasks:
            break
        kv_head, page_list = load_i64(a.tasks, task * 5), load_i64(a.tasks, task * 5 + 1)
        start, end = load_i64(a.tasks, task * 5 + 2), load_i64(a.tasks, task * 5 + 3)
        first_row = task * rows
        pack_queries(a, first_row, queries, query_sums, shape)
        acc[:] = 0
        zeros[:] = 0
        maximum[:] = NO_SCORE
        total[:] = 0
        for first_token in range(start // LANES * LANES, end, BLOCK_TOKENS):
            size = located = min(BLOCK_TOKENS, end - first_token)
            if a.in_lanes:
                located = min(end - first_token, size + groups * LANES)
                locate(a, kv_head, page_list, first_token, located, k_at, v_at, scales_at, shape)
            else:
                stage_keys(a, kv_head, page_list, first_token, size, k_dim // width, k_lanes)
            if not a.in_lanes and width == 1:
                stage_values(a, kv_head, page_list, first_token, size, v_lanes)
            elif not a.in_lanes:
                stage_pairs_of_values(a, kv_head, page_list, first_token, size, v_lanes)
            if not a.in_lanes:
                locate_staged(a, size, k_lanes, v_lanes, k_at, v_at, width)
            score(a, size, located, k_at, v_at, queries, scores, shape)
            scale_keys(a, size, scales_at, scores, query_sums, shape)
            weigh(a, first_row, first_token, size, scores, weights, maximum, total, rescale, shape)
            scale_values(a, first_row, first_token, size, scales_at, weights, rescale, zeros, shape)
            add_values(a, size, v_at, weights, acc, rescale, shape)
        finish(a, first_row, load_i64(a.tasks, task * 5 + 4), acc, maximum, total, zeros, shape)


@inner
def padded(v_dim):
    return (v_dim + LANES - 1) // LANES * LANES


@inner
def pack_queries(a, first_row, queries, query_sums, shape):
    """The task's queries by component, so that a tile reads them in order, and their sums over the components."""
    rows, k_dim, parts = len(shape[0]), a.k_dim, parts_of(shape)
    for r in range(rows):
        q = max(np.int64(load_i32(a.row_ids, first_row + r)), 0) * k_dim
        if multiplies_pairs_of(shape):
            for d in range(k_dim // 2):
                low = np.uint32(load_i32(a.q, q + 2 * d)) >> np.uint32(16)  # what bfloat16 keeps of a float32
                high = np.uint32(load_i32(a.q, q + 2 * d + 1)) & np.uint32(0xFFFF0000)
                queries[d * rows + r] = low | high
        elif parts > 1:
            bytes_of_key, total = k_dim // parts, np.float32(0)
            for d in range(k_dim):
                part, byte = d // bytes_of_key, d % bytes_of_key
                step = (byte // 4 * parts + part) * 4 + byte % 4
                queries[step * rows + r] = np.uint32(load_i32(a.q, q + d))
                total += load_f32(a.q, q + d)
            query_sums[r] = total
        else:
            for d in range(k_dim):
                queries[d * rows + r] = np.uint32(load_i32(a.q, q + d))


@inner
def score(a, size, located, k_at, v_at, queries, scores, shape):
    """scores = <queries, K> of a block, tile by tile; past the tokens that were located stand scores of the last group.

    While a tile is computed, its V and the next tile's K are fetched.
    """
    groups = len(shape[1])
    num_groups = (size + LANES - 1) // LANES
    k_step = a.page_size * 4 if a.in_lanes else LANES * 4
    num_steps = a.k_dim // (in_4_bytes_of(shape) * parts_of(shape))
    for i in range((located + LANES - 1) // LANES, num_groups + groups):
        k_at[i], v_at[i] = k_at[i - 1], v_at[i - 1]
    v_lines = a.v_dim // a.k_dim if a.in_lanes else 0  # as many of V as of K
    for i in range(0, num_groups, groups):
        now, following = k_at.ctypes.data + i * 8, k_at.ctypes.data + min(i + groups, num_groups) * 8
        out = scores.ctypes.data + i * LANES * 4
        v_now = v_at.ctypes.data + i * 8
        score_tile(
            now, following, k_step, v_now, v_lines, queries.ctypes.data, out, scores.strides[0], num_steps, shape
        )


@inner
def scale_keys(a, size, scales_at, scores, query_sums, shape):
    """Make the scores of codes those of keys."""
    if num_scales_of(shape):
        at, to_zeros, num_vectors = scales_at.ctypes.data, a.page_size * 2, (size + LANES - 1) // LANES
        for r in range(len(shape[0])):
            row_scores = scores.ctypes.data + r * scores.strides[0]
            scale_scores(row_scores, at, to_zeros, query_sums[r], num_vectors, shape)


@inner
def scale_values(a, first_row, first_token, size, scales_at, weights, rescale, zeros, shape):
    """Make the weights of values those of their codes, and renew the rows' sums of weighted zeros."""
    if num_scales_of(shape):
        num_vectors = (size + LANES - 1) // LANES
        at, to_zeros = scales_at.ctypes.data + scales_at.strides[0], a.page_size * 2
        for r in range(len(shape[0])):
            row_weights = weights.ctypes.data + r * weights.strides[0]
            low, high = seen(a, first_row + r, first_token, size)
            zeros[r] *= rescale[r]
            if high > low:
                zeros[r] += scale_weights(row_weights, at, to_zeros, low, high, num_vectors, shape)


@inner
def seen(a, row, first_token, size):
    """Which tokens of a block a row sees, [low, high)."""
    low = max(np.int64(load_i32(a.row_starts, row)) - first_token, 0)
    return low, min(np.int64(load_i32(a.row_ends, row)) - first_token, size)


@inner
def weigh(a, first_row, first_token, size, scores, weights, maximum, total, rescale, shape):
    """Turn the scores of a block into weights, and renew each row's maximum and denominator."""
    num_vectors = (size + LANES - 1) // LANES
    factor, cap, inverse_cap = a.score_factor, a.softcap, a.inverse_softcap
    for r in range(len(shape[0])):
        row_scores = scores.ctypes.data + r * scores.strides[0]
        row_weights = weights.ctypes.data + r * weights.strides[0]
        low, high = seen(a, first_row + r, first_token, size)
        if high <= low:
            rescale[r] = 1
            weights[r] = 0
            continue
        largest = limit_row(row_scores, num_vectors, low, high, factor, cap, inverse_cap)
        largest = max(largest, maximum[r])
        rescale[r] = np.float32(2.0 ** max(maximum[r] - largest, np.float32(-126)))
        maximum[r] = largest
        total[r] = total[r] * rescale[r] + exp2_row(row_scores, row_weights, num_vectors, largest, shape)


@inner
def add_values(a, size, v_at, weights, acc, rescale, shape):
    """acc = acc * rescale + weights @ V of a block; moves `v_at` on."""
    vectors = len(shape[2])
    v_lanes, acc_lanes = a.v_dim // parts_of(shape), acc.shape[1] // parts_of(shape)
    p, p_row = weights.ctypes.data, weights.strides[0]
    at, factors, acc_at = v_at.ctypes.data, rescale.ctypes.data, acc.ctypes.data
    single = (shape[0], shape[1], (0,), shape[3])
    c = 0
    while c < v_lanes:
        taken = vectors if c + vectors * LANES <= acc_lanes else 1
        if taken == vectors:
            value_tile(at, v_lanes * 4, size, p, p_row, acc_at + c * 4, acc.strides[0], factors, shape)
        else:
            value_tile(at, v_lanes * 4, size, p, p_row, acc_at + c * 4, acc.strides[0], factors, single)
        c += taken * LANES
        for i in range((size + LANES - 1) // LANES):
            v_at[i] += taken * LANES * 4


@inner
def finish(a, first_row, partial, acc, maximum, total, zeros, shape):
    """Write the rows' outputs and log-sum-exps, as results or as parts of them."""
    parts = parts_of(shape)
    v_part, acc_part, unit = a.v_dim // parts, acc.shape[1] // parts, a.v_unit
    for r in range(len(acc)):
        row = np.int64(load_i32(a.row_ids, first_row + r))
        if row < 0:
            continue
        out, lse = a.out, a.lse
        if partial != NOT_SPLIT:
            out, lse, row = a.partial_out, a.partial_lse, partial + r
        inverse, log = np.float32(0), NO_SCORE
        if total[r] != 0:
            inverse, log = unit / total[r], np.float32(math.log2(total[r]))
        for part in range(parts):
            for d in range(v_part):
                value = (acc[r, part * acc_part + d] + zeros[r]) * inverse
                store_f32(out, row * a.v_dim + part * v_part + d, value)
        store_f32(lse, row, (maximum[r] + log) * LN_2)
