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
from radixkv.kernels.numba_ir import (
    LANES,
    MODES,
    Tile,
    exp2_row,
    limit_row,
    load_f32,
    load_i32,
    load_i64,
    next_number,
    score_tile,
    store_f32,
    value_tile,
)

BLOCK_TOKENS = 256  # between two rescalings; the scores of one block stay in the first-level cache
MAX_ROWS = 8
MERGED_AT_ONCE = 16  # rows that a thread takes at a time
LN_2, LOG2_E = np.float32(math.log(2)), np.float32(math.log2(math.e))
NO_SCORE = np.float32(-1e30)
NOT_SPLIT = -1
F32_MODE, DOT_MODE = 1 + MODES.index("f32"), 1 + MODES.index("bf16dot")  # as the length of a shape's last tuple
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
FACTORS = 14  # float32 [3]: scale * log2(e), 0, 0; or with a soft cap: scale, softcap * log2(e), 1 / softcap
K_DIM, V_DIM, NUM_KV_HEADS, PAGE_SIZE = 15, 16, 17, 18
IN_LANES = 19
NUM_ARGUMENTS = 20

# of a worker that merges
MERGED_ROWS = 2  # int32 [NUM_TASKS]
MERGED_INDPTR = 3  # int32 [NUM_TASKS + 1]
MERGED_PARTIALS = 4  # int32, row i is made of partials [indptr[i], indptr[i + 1])
SINKS = 5  # float32 [num_q_heads] logits that join the denominator alone; 0 for none
NUM_Q_HEADS = 6


def tile_of(mode: str, rows: int) -> Tile:
    """The tile for so many query rows: sums enough to hide the multiplier's latency, not more than registers."""
    groups = 8 if rows <= 2 else 4 if rows <= 5 else 2
    return Tile(rows, groups, 4 if rows <= 6 else 2, mode)


@cache
def attention_worker(mode: str, rows: int) -> Any:
    """The compiled worker for tasks of `rows` query rows over KV of that mode (see `numba_ir`).

    It takes the address of the arguments above, and works until the counter has passed all tasks. The first call for a
    mode and a number of rows compiles, in a few seconds, and later processes load it from Numba's cache on disk.
    """
    shape = tile_of(mode, rows).shape
    source = zlib.crc32(Path(numba_ir.__file__).read_bytes())  # Numba's cache looks at this file alone

    @nb.cfunc(types.void(types.CPointer(types.int64)), cache=True)
    def attention(data):
        if source != NO_SOURCE:
            run_attention(nb.carray(data, (NUM_ARGUMENTS,)), shape)

    return attention


@nb.njit
def run_attention(a, shape):
    rows, groups = len(shape[0]), len(shape[1])
    width = values_in_4_bytes(shape)
    k_dim, v_dim = a[K_DIM], a[V_DIM]
    queries = np.empty(k_dim * rows, np.uint32)
    row_tokens = BLOCK_TOKENS + groups * LANES
    scores = np.empty((rows, row_tokens), np.float32)
    weights = np.empty((rows, row_tokens * bytes_of_weight(shape)), np.uint8)
    # a vector may reach beyond V's last component: what it finds there stays in lanes that are never written out
    acc = np.empty((rows, padded(v_dim)), np.float32)
    maximum, total, rescale = np.empty(rows, np.float32), np.empty(rows, np.float32), np.empty(rows, np.float32)
    k_at, v_at = np.empty(BLOCK_TOKENS // LANES + groups, np.int64), np.empty(BLOCK_TOKENS // LANES, np.int64)
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
        pack_queries(a, first_row, queries, shape)
        acc[:] = 0
        maximum[:] = NO_SCORE
        total[:] = 0
        for first_token in range(start // LANES * LANES, end, BLOCK_TOKENS):
            size = min(BLOCK_TOKENS, end - first_token)
            if a[IN_LANES]:
                locate(a, kv_head, page_list, first_token, size, k_at, v_at, width)
            elif width == 1:
                stage_rows(a, kv_head, page_list, first_token, size, k_lanes, v_lanes)
            else:
                stage_rows_of_pairs(a, kv_head, page_list, first_token, size, k_lanes, v_lanes)
            if not a[IN_LANES]:
                locate_staged(a, size, k_lanes, v_lanes, k_at, v_at, width)
            score(a, size, k_at, queries, scores, shape)
            weigh(a, first_row, first_token, size, scores, weights, maximum, total, rescale, shape)
            add_values(a, size, v_at, weights, acc, rescale, shape)
        finish(a, first_row, load_i64(a[TASKS], task * 5 + 4), acc, maximum, total)


@nb.njit
def padded(v_dim):
    return (v_dim + LANES - 1) // LANES * LANES


@nb.njit
def values_in_4_bytes(shape):
    return 1 if len(shape[3]) == F32_MODE else 2


@nb.njit
def bytes_of_weight(shape):
    return 2 if len(shape[3]) == DOT_MODE else 4


@nb.njit
def pack_queries(a, first_row, queries, shape):
    """The task's queries by component, so that a tile reads them in order."""
    rows, k_dim = len(shape[0]), a[K_DIM]
    for r in range(rows):
        q = max(np.int64(load_i32(a[ROW_IDS], first_row + r)), 0) * k_dim
        if len(shape[3]) == DOT_MODE:
            for d in range(k_dim // 2):
                low = np.uint32(load_i32(a[Q], q + 2 * d)) >> np.uint32(16)  # what bfloat16 keeps of a float32
                high = np.uint32(load_i32(a[Q], q + 2 * d + 1)) & np.uint32(0xFFFF0000)
                queries[d * rows + r] = low | high
        else:
            for d in range(k_dim):
                queries[d * rows + r] = np.uint32(load_i32(a[Q], q + d))


@nb.njit
def locate(a, kv_head, page_list, first_token, size, k_at, v_at, width):
    """Addresses of the K and V of a block's groups, where pages hold them in lanes."""
    page_groups = a[PAGE_SIZE] // LANES
    for i in range((size + LANES - 1) // LANES):
        at = first_token // LANES + i
        head = np.int64(load_i32(a[PAGES], page_list + at // page_groups)) * a[NUM_KV_HEADS] + kv_head
        first = at % page_groups * LANES
        k_at[i] = a[K] + head * a[K_DIM] * a[PAGE_SIZE] * 4 // width + first * 4
        v_at[i] = a[V] + (head * a[PAGE_SIZE] + first) * a[V_DIM] * 4 // width


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
def stage_rows(a, kv_head, page_list, first_token, size, k_lanes, v_lanes):
    """Copy tokens of 4-byte values into lanes."""
    k_dim, v_dim = a[K_DIM], a[V_DIM]
    for t in range(size):
        row = row_of(a, kv_head, page_list, first_token + t)
        group, lane = t // LANES, t % LANES
        for d in range(k_dim):
            k_lanes[(group * k_dim + d) * LANES + lane] = load_i32(a[K], row * k_dim + d)
        for d in range(v_dim):
            v_lanes[t * v_dim + d] = load_i32(a[V], row * v_dim + d)


@nb.njit
def stage_rows_of_pairs(a, kv_head, page_list, first_token, size, k_lanes, v_lanes):
    """Copy tokens of 2-byte values into lanes: K's pairs are neighbours in a row, V's are two tokens."""
    k_pairs, v_pairs = a[K_DIM] // 2, a[V_DIM] // 2
    for t in range(size):
        row = row_of(a, kv_head, page_list, first_token + t)
        group, lane = t // LANES, t % LANES
        for d in range(k_pairs):
            k_lanes[(group * k_pairs + d) * LANES + lane] = load_i32(a[K], row * k_pairs + d)
        at = t // 2 * 2 * v_pairs
        for d in range(v_pairs):
            two = np.uint32(load_i32(a[V], row * v_pairs + d))
            first, second = two & np.uint32(0xFFFF), two >> np.uint32(16)
            if t % 2 == 0:  # the other halves come with the next token; a last one without is masked
                v_lanes[at + 2 * d], v_lanes[at + 2 * d + 1] = np.int32(first), np.int32(second)
            else:
                v_lanes[at + 2 * d] |= np.int32(first << np.uint32(16))
                v_lanes[at + 2 * d + 1] |= np.int32(second << np.uint32(16))


@nb.njit
def score(a, size, k_at, queries, scores, shape):
    """scores = <queries, K> of a block, tile by tile; past the block's end stand scores of its last group."""
    groups = len(shape[1])
    num_groups = (size + LANES - 1) // LANES
    in_pairs = len(shape[3]) != F32_MODE
    k_step = a[PAGE_SIZE] * 4 if a[IN_LANES] else LANES * 4
    num_steps = a[K_DIM] // 2 if in_pairs else a[K_DIM]
    for i in range(num_groups, num_groups + groups):
        k_at[i] = k_at[num_groups - 1]
    for i in range(0, num_groups, groups):
        now, following = k_at.ctypes.data + i * 8, k_at.ctypes.data + min(i + groups, num_groups) * 8
        out = scores.ctypes.data + i * LANES * 4
        score_tile(now, following, k_step, queries.ctypes.data, out, scores.strides[0], num_steps, shape)


@nb.njit
def weigh(a, first_row, first_token, size, scores, weights, maximum, total, rescale, shape):
    """Turn the scores of a block into weights, and renew each row's maximum and denominator."""
    num_vectors = (size + LANES - 1) // LANES
    factor, cap, inverse_cap = load_f32(a[FACTORS], 0), load_f32(a[FACTORS], 1), load_f32(a[FACTORS], 2)
    for r in range(len(shape[0])):
        row_scores = scores.ctypes.data + r * scores.strides[0]
        row_weights = weights.ctypes.data + r * weights.strides[0]
        low = max(np.int64(load_i32(a[ROW_STARTS], first_row + r)) - first_token, 0)
        high = min(np.int64(load_i32(a[ROW_ENDS], first_row + r)) - first_token, size)
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
    v_dim, vectors = a[V_DIM], len(shape[2])
    p, p_row = weights.ctypes.data, weights.strides[0]
    at, factors, acc_at = v_at.ctypes.data, rescale.ctypes.data, acc.ctypes.data
    single = (shape[0], shape[1], (0,), shape[3])
    c = 0
    while c < v_dim:
        taken = vectors if c + vectors * LANES <= acc.shape[1] else 1
        if taken == vectors:
            value_tile(at, v_dim * 4, size, p, p_row, acc_at + c * 4, acc.strides[0], factors, shape)
        else:
            value_tile(at, v_dim * 4, size, p, p_row, acc_at + c * 4, acc.strides[0], factors, single)
        c += taken * LANES
        for i in range((size + LANES - 1) // LANES):
            v_at[i] += taken * LANES * 4


@nb.njit
def finish(a, first_row, partial, acc, maximum, total):
    """Write the rows' outputs and log-sum-exps, as results or as parts of them."""
    v_dim = a[V_DIM]
    for r in range(len(acc)):
        row = np.int64(load_i32(a[ROW_IDS], first_row + r))
        if row < 0:
            continue
        out, lse = a[OUT], a[LSE]
        if partial != NOT_SPLIT:
            out, lse, row = a[PARTIAL_OUT], a[PARTIAL_LSE], partial + r
        inverse, log = np.float32(0), NO_SCORE
        if total[r] != 0:
            inverse, log = np.float32(1) / total[r], np.float32(math.log2(total[r]))
        for d in range(v_dim):
            store_f32(out, row * v_dim + d, acc[r, d] * inverse)
        store_f32(lse, row, (maximum[r] + log) * LN_2)


@cache
def merge_worker() -> Any:
    """The compiled worker that merges the parts of split rows, and adds sinks."""

    @nb.cfunc(types.void(types.CPointer(types.int64)), cache=True)
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


@nb.njit(cache=True, nogil=True)
def write_lanes_32(slots, page_size, k, v, k_pages, v_pages):
    """Store tokens of 4-byte values; k and v are [tokens, heads, dim], the pages as `LaneKVPool` has them."""
    for i in range(len(slots)):
        page, at = slots[i] // page_size, slots[i] % page_size
        for h in range(k.shape[1]):
            for d in range(k.shape[2]):
                k_pages[page, h, d, at, 0] = k[i, h, d]
            for d in range(v.shape[2]):
                v_pages[page, h, at, d, 0] = v[i, h, d]


@nb.njit(cache=True, nogil=True)
def write_lanes_16(slots, page_size, k, v, k_pages, v_pages):
    """Store tokens of 2-byte values."""
    for i in range(len(slots)):
        page, at = slots[i] // page_size, slots[i] % page_size
        for h in range(k.shape[1]):
            for d in range(k.shape[2]):
                k_pages[page, h, d // 2, at, d % 2] = k[i, h, d]
            for d in range(v.shape[2]):
                v_pages[page, h, at // 2, d, at % 2] = v[i, h, d]
