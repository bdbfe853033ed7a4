"""Attention over paged KV on the CPU, compiled by Numba: reads the pages in place, on all of torch's threads.

The work comes as a table of tasks. A task takes up to ROWS query rows that read the same KV head (the query heads of a
group, several tokens of an extend, or several sequences over a prefix that they share) over a range of one list of
pages, block by block with an online softmax (Milakov and Gimelshein, 2018). Rows whose tokens are split over several
tasks are merged by their log-sum-exps afterwards ("Flash-Decoding", Dao et al., 2023).

Inside, logarithms are of base 2: the scores are multiplied by log2(e) when they are scaled.
"""

from __future__ import annotations

import math
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numba as nb
import numpy as np
from numba import types

from radixkv.kernels import numba_ir
from radixkv.kernels.compiling import can_cache
from radixkv.kernels.numba_ir import (
    ALL_MODES,
    CODE_MODES,
    LANES,
    Tile,
    copy_words,
    exp2_row,
    interleave_halves,
    limit_row,
    load_f32,
    load_i32,
    load_i64,
    next_number,
    scale_scores,
    scale_weights,
    score_tile,
    store_f32,
    transpose_words,
    value_tile,
)

BLOCK_TOKENS = 256  # between two rescalings; the scores of one block stay in the first-level cache
MAX_ROWS = 8
MERGED_AT_ONCE = 16  # rows that a thread takes at a time
LN_2, LOG2_E = np.float32(math.log(2)), np.float32(math.log2(math.e))
NO_SCORE = np.float32(-1e30)
NOT_SPLIT = -1

# Modes as the length of a shape's last tuple; from FIRST_CODES on they are of codes.
F32_MODE, DOT_MODE = 1 + ALL_MODES.index("f32"), 1 + ALL_MODES.index("bf16dot")
INT8_MODE, INT4_MODE = 1 + ALL_MODES.index("int8"), 1 + ALL_MODES.index("int4")
FIRST_CODES = 1 + ALL_MODES.index(CODE_MODES[0])
NO_SOURCE = -1

# The places of the arguments in the int64 array that a worker gets: addresses and sizes.
COUNTER = 0  # int64 [1], where the next task is
NUM_TASKS = 1
TASKS = 2  # int64 [num_tasks, 5]: KV head, first entry of its page list, first token, end, first partial row or -1
ROW_IDS = 3  # int32 [num_tasks, ROWS]: token * num_q_heads + head, or -1
ROW_STARTS = 4  # int32 [num_tasks, ROWS]: of its task's tokens a row sees [start, end)
ROW_ENDS = 5
PAGES = 6  # int32, the page lists
Q = 7  # float32 [num_rows, k_dim]
K, V = 8, 9  # as `LaneKVPool` lays them out, or `KVPool`; behind V's last value up to 15 may be read
OUT, LSE = 10, 11  # float32 [num_rows, v_dim] and [num_rows]
PARTIAL_OUT, PARTIAL_LSE = 12, 13  # the same of partial rows
FACTORS = 14  # float32 [4]: scale * log2(e), 0, 0; or with a soft cap: scale, softcap * log2(e), 1 / softcap; V's unit
K_DIM, V_DIM, NUM_KV_HEADS, PAGE_SIZE = 15, 16, 17, 18
IN_LANES = 19  # always, where K and V are codes
K_HEAD_BYTES, V_HEAD_BYTES = 20, 21  # from one head of a page to the next, in lanes
K_SCALES, V_SCALES = 22, 23  # bfloat16 [pages, heads, scale (and zero), page_size]; of "int8" and "int4"
NUM_ARGUMENTS = 24

# of a worker that merges
MERGED_ROWS = 2  # int32 [NUM_TASKS]
MERGED_INDPTR = 3  # int32 [NUM_TASKS + 1]
MERGED_PARTIALS = 4  # int32, row i is made of partials [indptr[i], indptr[i + 1])
SINKS = 5  # float32 [num_q_heads] logits that join the denominator alone; 0 for none
NUM_Q_HEADS = 6


def tile_of(mode: str, rows: int) -> Tile:
    """The tile for so many query rows: sums enough to hide the multiplier's latency, not more than registers."""
    groups = 8 if rows <= 2 else 4 if rows <= 5 else 2
    vectors = 4 if rows <= 6 else 2
    return Tile(rows, groups, vectors // 2 if mode == "int4" else vectors, mode)


@cache
def attention_worker(mode: str, rows: int) -> Any:
    """The compiled worker for tasks of `rows` query rows over KV of that mode (see `numba_ir`).

    It takes the address of the arguments above, and works until the counter has passed all tasks. The first call for a
    mode and a number of rows compiles, in a few seconds, and later processes load it from Numba's cache on disk.
    """
    shape = tile_of(mode, rows).shape
    source = zlib.crc32(Path(numba_ir.__file__).read_bytes())  # Numba's cache looks at this file alone

    @nb.cfunc(types.void(types.CPointer(types.int64)), cache=can_cache())
    def attention(data):
        if source != NO_SOURCE:
            run_attention(nb.carray(data, (NUM_ARGUMENTS,)), shape)

    return attention


@nb.njit
def run_attention(a, shape):
    rows, groups = len(shape[0]), len(shape[1])
    width, parts = values_in_4_bytes(shape), parts_of_components(shape)
    k_dim, v_dim = a[K_DIM], a[V_DIM]
    queries = np.empty(k_dim * rows, np.uint32)
    row_tokens = BLOCK_TOKENS + groups * LANES
    scores = np.empty((rows, row_tokens), np.float32)
    weights = np.empty((rows, row_tokens * bytes_of_weight(shape)), np.uint8)
    # a vector may reach beyond V's last component: what it finds there stays in lanes that are never written out
    acc = np.empty((rows, parts * padded(v_dim // parts)), np.float32)
    maximum, total, rescale = np.empty(rows, np.float32), np.empty(rows, np.float32), np.empty(rows, np.float32)
    query_sums, zeros = np.zeros(rows, np.float32), np.zeros(rows, np.float32)  # what zeros of K and V are weighed by
    # of a block, and of what follows: the next block, or the last group again
    k_at, v_at = np.empty(BLOCK_TOKENS // LANES + groups, np.int64), np.empty(BLOCK_TOKENS // LANES + groups, np.int64)
    scales_at = np.empty((2, BLOCK_TOKENS // LANES + groups), np.int64)  # of K and of V
    staged_tokens = 0 if a[IN_LANES] else BLOCK_TOKENS
    k_lanes = np.empty(staged_tokens * k_dim // width, np.int32)
    v_lanes = np.empty(staged_tokens * v_dim // width + LANES, np.int32)
    while True:
        task = next_number(a[COUNTER])
        if task >= a[NUM_TASKS]:
            break
        kv_head, page_list = load_i64(a[TASKS], task * 5), load_i64(a[TASKS], task * 5 + 1)
        start, end = load_i64(a[TASKS], task * 5 + 2), load_i64(a[TASKS], task * 5 + 3)
        first_row = task * rows
        pack_queries(a, first_row, queries, query_sums, shape)
        acc[:] = 0
        zeros[:] = 0
        maximum[:] = NO_SCORE
        total[:] = 0
        for first_token in range(start // LANES * LANES, end, BLOCK_TOKENS):
            size = located = min(BLOCK_TOKENS, end - first_token)
            if a[IN_LANES]:
                located = min(end - first_token, size + groups * LANES)
                locate(a, kv_head, page_list, first_token, located, k_at, v_at, scales_at, shape)
            else:
                stage_keys(a, kv_head, page_list, first_token, size, k_dim // width, k_lanes)
            if not a[IN_LANES] and width == 1:
                stage_values(a, kv_head, page_list, first_token, size, v_lanes)
            elif not a[IN_LANES]:
                stage_pairs_of_values(a, kv_head, page_list, first_token, size, v_lanes)
            if not a[IN_LANES]:
                locate_staged(a, size, k_lanes, v_lanes, k_at, v_at, width)
            score(a, size, located, k_at, v_at, queries, scores, shape)
            scale_keys(a, size, scales_at, scores, query_sums, shape)
            weigh(a, first_row, first_token, size, scores, weights, maximum, total, rescale, shape)
            scale_values(a, first_row, first_token, size, scales_at, weights, rescale, zeros, shape)
            add_values(a, size, v_at, weights, acc, rescale, shape)
        finish(a, first_row, load_i64(a[TASKS], task * 5 + 4), acc, maximum, total, zeros, shape)


@nb.njit
def padded(v_dim):
    return (v_dim + LANES - 1) // LANES * LANES


@nb.njit
def values_in_4_bytes(shape):
    if len(shape[3]) >= FIRST_CODES:
        return 4
    return 1 if len(shape[3]) == F32_MODE else 2


@nb.njit
def parts_of_components(shape):
    """How many components share a byte, each from a part of its own of all components."""
    return 2 if len(shape[3]) == INT4_MODE else 1


@nb.njit
def num_scales(shape):
    """Scales of a token and head: one, and a zero."""
    return 2 if len(shape[3]) == INT4_MODE else 1 if len(shape[3]) == INT8_MODE else 0


@nb.njit
def bytes_of_weight(shape):
    return 2 if len(shape[3]) == DOT_MODE else 4


@nb.njit
def pack_queries(a, first_row, queries, query_sums, shape):
    """The task's queries by component, so that a tile reads them in order, and their sums over the components."""
    rows, k_dim, parts = len(shape[0]), a[K_DIM], parts_of_components(shape)
    for r in range(rows):
        q = max(np.int64(load_i32(a[ROW_IDS], first_row + r)), 0) * k_dim
        if len(shape[3]) == DOT_MODE:
            for d in range(k_dim // 2):
                low = np.uint32(load_i32(a[Q], q + 2 * d)) >> np.uint32(16)  # what bfloat16 keeps of a float32
                high = np.uint32(load_i32(a[Q], q + 2 * d + 1)) & np.uint32(0xFFFF0000)
                queries[d * rows + r] = low | high
        elif parts > 1:
            bytes_of_key, total = k_dim // parts, np.float32(0)
            for d in range(k_dim):
                part, byte = d // bytes_of_key, d % bytes_of_key
                step = (byte // 4 * parts + part) * 4 + byte % 4
                queries[step * rows + r] = np.uint32(load_i32(a[Q], q + d))
                total += load_f32(a[Q], q + d)
            query_sums[r] = total
        else:
            for d in range(k_dim):
                queries[d * rows + r] = np.uint32(load_i32(a[Q], q + d))


@nb.njit
def locate(a, kv_head, page_list, first_token, size, k_at, v_at, scales_at, shape):
    """Addresses of the K and V of a block's groups, and of their scales, where pages hold them in lanes."""
    page_groups = a[PAGE_SIZE] // LANES
    width, parts, scales = values_in_4_bytes(shape), parts_of_components(shape), num_scales(shape)
    v_bytes = a[V_DIM] // parts * 4 // width  # of a token
    for i in range((size + LANES - 1) // LANES):
        at = first_token // LANES + i
        head = np.int64(load_i32(a[PAGES], page_list + at // page_groups)) * a[NUM_KV_HEADS] + kv_head
        first = at % page_groups * LANES
        k_at[i] = a[K] + head * a[K_HEAD_BYTES] + first * 4
        v_at[i] = a[V] + head * a[V_HEAD_BYTES] + first * v_bytes
        for kind in range(2 if scales else 0):
            scales_at[kind, i] = a[K_SCALES + kind] + (head * scales * a[PAGE_SIZE] + first) * 2


@nb.njit
def locate_staged(a, size, k_lanes, v_lanes, k_at, v_at, width):
    """The same of a block that was copied into lanes."""
    for i in range((size + LANES - 1) // LANES):
        k_at[i] = k_lanes.ctypes.data + i * a[K_DIM] * LANES * 4 // width
        v_at[i] = v_lanes.ctypes.data + i * a[V_DIM] * LANES * 4 // width


@nb.njit
def row_of(a, kv_head, page_list, position):
    """Number of the row that holds a token's K or V, where pages hold rows."""
    page = np.int64(load_i32(a[PAGES], page_list + position // a[PAGE_SIZE]))
    return (page * a[PAGE_SIZE] + position % a[PAGE_SIZE]) * a[NUM_KV_HEADS] + kv_head


@nb.njit
def stage_keys(a, kv_head, page_list, first_token, size, words, k_lanes):
    """Copy a block's K into lanes, `words` of 4 bytes a token."""
    rows = np.empty(LANES, np.int64)
    whole = words // LANES * LANES
    for group in range((size + LANES - 1) // LANES):
        for i in range(LANES):  # where the tokens end, the last one stands in
            position = first_token + min(group * LANES + i, size - 1)
            rows[i] = a[K] + row_of(a, kv_head, page_list, position) * words * 4
        out = group * words * LANES
        for c in range(0, whole, LANES):
            transpose_words(rows.ctypes.data, c * 4, k_lanes.ctypes.data + (out + c * LANES) * 4)
        for c in range(whole, words):
            for i in range(LANES):
                k_lanes[out + c * LANES + i] = load_i32(rows[i], c)


@nb.njit
def stage_values(a, kv_head, page_list, first_token, size, v_lanes):
    """Copy a block's V of 4-byte values, token after token."""
    v_dim = a[V_DIM]
    whole = v_dim // LANES * LANES
    for t in range(size):
        row = a[V] + row_of(a, kv_head, page_list, first_token + t) * v_dim * 4
        for d in range(0, whole, LANES):
            copy_words(row + d * 4, v_lanes.ctypes.data + (t * v_dim + d) * 4)
        for d in range(whole, v_dim):
            v_lanes[t * v_dim + d] = load_i32(row, d)


@nb.njit
def stage_pairs_of_values(a, kv_head, page_list, first_token, size, v_lanes):
    """Copy a block's V of 2-byte values, two tokens interleaved; a last one without a neighbour comes twice."""
    words = a[V_DIM] // 2
    whole = words // LANES * LANES
    for t in range(0, size, 2):
        first = a[V] + row_of(a, kv_head, page_list, first_token + t) * words * 4
        second = a[V] + row_of(a, kv_head, page_list, first_token + min(t + 1, size - 1)) * words * 4
        out = t * words
        for c in range(0, whole, LANES):
            interleave_halves(first + c * 4, second + c * 4, v_lanes.ctypes.data + (out + 2 * c) * 4)
        for c in range(whole, words):
            one, other = np.uint32(load_i32(first, c)), np.uint32(load_i32(second, c))
            v_lanes[out + 2 * c] = np.int32((one & np.uint32(0xFFFF)) | (other << np.uint32(16)))
            v_lanes[out + 2 * c + 1] = np.int32((one >> np.uint32(16)) | (other & np.uint32(0xFFFF0000)))


@nb.njit
def score(a, size, located, k_at, v_at, queries, scores, shape):
    """scores = <queries, K> of a block, tile by tile; past the tokens that were located stand scores of the last group.

    While a tile is computed, its V and the next tile's K are fetched.
    """
    groups = len(shape[1])
    num_groups = (size + LANES - 1) // LANES
    k_step = a[PAGE_SIZE] * 4 if a[IN_LANES] else LANES * 4
    num_steps = a[K_DIM] // (values_in_4_bytes(shape) * parts_of_components(shape))
    for i in range((located + LANES - 1) // LANES, num_groups + groups):
        k_at[i], v_at[i] = k_at[i - 1], v_at[i - 1]
    v_lines = a[V_DIM] // a[K_DIM] if a[IN_LANES] else 0  # as many of V as of K
    for i in range(0, num_groups, groups):
        now, following = k_at.ctypes.data + i * 8, k_at.ctypes.data + min(i + groups, num_groups) * 8
        out = scores.ctypes.data + i * LANES * 4
        v_now = v_at.ctypes.data + i * 8
        score_tile(
            now, following, k_step, v_now, v_lines, queries.ctypes.data, out, scores.strides[0], num_steps, shape
        )


@nb.njit
def scale_keys(a, size, scales_at, scores, query_sums, shape):
    """Make the scores of codes those of keys."""
    if num_scales(shape):
        at, to_zeros, num_vectors = scales_at.ctypes.data, a[PAGE_SIZE] * 2, (size + LANES - 1) // LANES
        for r in range(len(shape[0])):
            row_scores = scores.ctypes.data + r * scores.strides[0]
            scale_scores(row_scores, at, to_zeros, query_sums[r], num_vectors, shape)


@nb.njit
def scale_values(a, first_row, first_token, size, scales_at, weights, rescale, zeros, shape):
    """Make the weights of values those of their codes, and renew the rows' sums of weighted zeros."""
    if num_scales(shape):
        num_vectors = (size + LANES - 1) // LANES
        at, to_zeros = scales_at.ctypes.data + scales_at.strides[0], a[PAGE_SIZE] * 2
        for r in range(len(shape[0])):
            row_weights = weights.ctypes.data + r * weights.strides[0]
            low, high = seen(a, first_row + r, first_token, size)
            zeros[r] *= rescale[r]
            if high > low:
                zeros[r] += scale_weights(row_weights, at, to_zeros, low, high, num_vectors, shape)


@nb.njit
def seen(a, row, first_token, size):
    """Which tokens of a block a row sees, [low, high)."""
    low = max(np.int64(load_i32(a[ROW_STARTS], row)) - first_token, 0)
    return low, min(np.int64(load_i32(a[ROW_ENDS], row)) - first_token, size)


@nb.njit
def weigh(a, first_row, first_token, size, scores, weights, maximum, total, rescale, shape):
    """Turn the scores of a block into weights, and renew each row's maximum and denominator."""
    num_vectors = (size + LANES - 1) // LANES
    factor, cap, inverse_cap = load_f32(a[FACTORS], 0), load_f32(a[FACTORS], 1), load_f32(a[FACTORS], 2)
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


@nb.njit
def add_values(a, size, v_at, weights, acc, rescale, shape):
    """acc = acc * rescale + weights @ V of a block; moves `v_at` on."""
    vectors = len(shape[2])
    v_lanes, acc_lanes = a[V_DIM] // parts_of_components(shape), acc.shape[1] // parts_of_components(shape)
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


@nb.njit
def finish(a, first_row, partial, acc, maximum, total, zeros, shape):
    """Write the rows' outputs and log-sum-exps, as results or as parts of them."""
    parts = parts_of_components(shape)
    v_part, acc_part, unit = a[V_DIM] // parts, acc.shape[1] // parts, load_f32(a[FACTORS], 3)
    for r in range(len(acc)):
        row = np.int64(load_i32(a[ROW_IDS], first_row + r))
        if row < 0:
            continue
        out, lse = a[OUT], a[LSE]
        if partial != NOT_SPLIT:
            out, lse, row = a[PARTIAL_OUT], a[PARTIAL_LSE], partial + r
        inverse, log = np.float32(0), NO_SCORE
        if total[r] != 0:
            inverse, log = unit / total[r], np.float32(math.log2(total[r]))
        for part in range(parts):
            for d in range(v_part):
                value = (acc[r, part * acc_part + d] + zeros[r]) * inverse
                store_f32(out, row * a[V_DIM] + part * v_part + d, value)
        store_f32(lse, row, (maximum[r] + log) * LN_2)


@cache
def merge_worker() -> Any:
    """The compiled worker that merges the parts of split rows, and adds sinks."""

    @nb.cfunc(types.void(types.CPointer(types.int64)), cache=can_cache())
    def merge(data):
        a = nb.carray(data, (NUM_ARGUMENTS,))
        v_dim = a[V_DIM]
        while True:
            first = next_number(a[COUNTER]) * MERGED_AT_ONCE
            if first >= a[NUM_TASKS]:
                break
            for i in range(first, min(first + MERGED_AT_ONCE, a[NUM_TASKS])):
                row = np.int64(load_i32(a[MERGED_ROWS], i))
                begin, end = load_i32(a[MERGED_INDPTR], i), load_i32(a[MERGED_INDPTR], i + 1)
                largest = NO_SCORE
                if a[SINKS]:
                    largest = load_f32(a[SINKS], row % a[NUM_Q_HEADS])
                sink = largest
                for j in range(begin, end):
                    largest = max(largest, load_f32(a[PARTIAL_LSE], load_i32(a[MERGED_PARTIALS], j)))
                total = np.float32(math.exp(sink - largest)) if a[SINKS] else np.float32(0)
                for j in range(begin, end):
                    total += np.float32(math.exp(load_f32(a[PARTIAL_LSE], load_i32(a[MERGED_PARTIALS], j)) - largest))
                for d in range(v_dim):
                    store_f32(a[OUT], row * v_dim + d, np.float32(0))
                for j in range(begin, end):
                    partial = np.int64(load_i32(a[MERGED_PARTIALS], j))
                    share = np.float32(math.exp(load_f32(a[PARTIAL_LSE], partial) - largest)) / total
                    for d in range(v_dim):
                        value = load_f32(a[OUT], row * v_dim + d)
                        value += share * load_f32(a[PARTIAL_OUT], partial * v_dim + d)
                        store_f32(a[OUT], row * v_dim + d, value)

    return merge


@nb.njit(cache=can_cache(), nogil=True)
def write_lanes_32(slots, page_size, k, v, k_pages, v_pages):
    """Store tokens of 4-byte values; k and v are [tokens, heads, dim], the pages as `LaneKVPool` has them."""
    for i in range(len(slots)):
        page, at = slots[i] // page_size, slots[i] % page_size
        for h in range(k.shape[1]):
            for d in range(k.shape[2]):
                k_pages[page, h, d, at, 0] = k[i, h, d]
            for d in range(v.shape[2]):
                v_pages[page, h, at, d, 0] = v[i, h, d]


@nb.njit(cache=can_cache(), nogil=True)
def write_lanes_16(slots, page_size, k, v, k_pages, v_pages):
    """Store tokens of 2-byte values."""
    for i in range(len(slots)):
        page, at = slots[i] // page_size, slots[i] % page_size
        for h in range(k.shape[1]):
            for d in range(k.shape[2]):
                k_pages[page, h, d // 2, at, d % 2] = k[i, h, d]
            for d in range(v.shape[2]):
                v_pages[page, h, at // 2, d, at % 2] = v[i, h, d]


@nb.njit(cache=can_cache(), nogil=True)
def write_lanes_8(slots, page_size, k, v, k_pages, v_pages):
    """Store tokens of single bytes."""
    for i in range(len(slots)):
        page, at = slots[i] // page_size, slots[i] % page_size
        for h in range(k.shape[1]):
            for d in range(k.shape[2]):
                k_pages[page, h, d // 4, at, d % 4] = k[i, h, d]
            for d in range(v.shape[2]):
                v_pages[page, h, at // 4, d, at % 4] = v[i, h, d]
