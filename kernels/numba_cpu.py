"""Attention over paged KV on the CPU, compiled by Numba: reads the pages in place, on all of torch's threads.

The work comes as a table of tasks. A task takes up to ROWS query rows that read the same KV head (the query heads of a
group, several tokens of an extend, or several sequences over a prefix that they share) over a range of one list of
pages, block by block with an online softmax (Milakov and Gimelshein, 2018). Rows whose tokens are split over several
tasks are merged by their log-sum-exps afterwards ("Flash-Decoding", Dao et al., 2023).

Inside, logarithms are of base 2: the scores are multiplied by log2(e) when they are scaled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

import numba as nb
import numpy as np
from numba import types

from radixkv.kernels import (
    numba_arguments,
    numba_attention_tiles,
    numba_block_scales,
    numba_blocks,
    numba_codes,
    numba_emitter,
    numba_fp4,
    numba_modes,
    numba_words,
    numba_writers,
)
from radixkv.kernels.compiling import cache_depends_on, can_cache, inner
from radixkv.kernels.numba_arguments import NOT_SPLIT
from radixkv.kernels.numba_attention_tiles import (
    NO_SCORE,
    bias_row,
    exp2_row,
    exp2_row_to_bf16,
    limit_row,
    scale_scores,
    scale_scores_and_zeros,
    scale_weights,
    scale_weights_and_zeros,
    score_tile,
    value_tile,
)
from radixkv.kernels.numba_blocks import locate, locate_staged, stage_keys, stage_pairs_of_values, stage_values
from radixkv.kernels.numba_emitter import LANES
from radixkv.kernels.numba_modes import MODES, Tile, in_4_bytes_of
from radixkv.kernels.numba_words import call, load_f32, load_i32, load_i64, next_number, store_f32
from radixkv.kernels.processor import Processor, this_processor

BLOCK_TOKENS = 256  # between two rescalings; the scores of one block stay in the first-level cache
MAX_ROWS = 8
LN_2, LOG2_E = np.float32(math.log(2)), np.float32(math.log2(math.e))

ARGUMENTS = numba_arguments.ATTENTION.dtype
PARTS = (  # what a worker is made of, besides this module
    numba_arguments,
    numba_attention_tiles,
    numba_block_scales,
    numba_blocks,
    numba_codes,
    numba_emitter,
    numba_fp4,
    numba_modes,
    numba_words,
    numba_writers,
)


def tile_of(mode: str, rows: int, processor: Processor | None = None) -> Tile:
    """The tile for `rows` query rows: sums enough to hide the multiplier's latency, not more than registers.

    processor: what it is for; this one, if it is None
    """
    vectors_in_registers = (processor or this_processor()).vectors
    kept = MODES[mode]
    sums = vectors_in_registers * 3 // 4  # the rest is for what is multiplied
    if vectors_in_registers >= 32:
        groups = 8 if rows <= 2 else 4 if rows <= 5 else 2
        vectors = 4 if rows <= 6 else 2
    else:
        if kept.values > 1 and kept.parts == 1:  # several values of what was loaded need registers, too
            sums = vectors_in_registers // 2
        groups = vectors = max(n for n in (1, 2, 4) if n == 1 or n * rows <= sums)
    return Tile(rows, groups, max(vectors // kept.parts, 1), kept, sums)


def rows_of_extends(mode: str, processor: Processor | None = None) -> int:
    """Query rows of a task that could have any number: the most, but no more than are taken in one turn.

    Where several values are made of what is loaded, two turns over it cost less than loading it for fewer rows.
    """
    sums = (processor or this_processor()).vectors * 3 // 4
    return min(MAX_ROWS, sums) if MODES[mode].values == 1 else MAX_ROWS


class AttentionTiles(NamedTuple):
    """The compiled inner loops of one mode for so many query rows, and what the worker must know of them.

    Attributes:
        fields: those of `numba_arguments.ATTENTION` that tell of tiles and mode.
        functions: what the addresses among them belong to.
    """

    fields: Mapping[str, int]
    functions: tuple[Any, ...]


@cache
def attention_tiles(mode: str, rows: int) -> AttentionTiles:
    """Compile the tiles for tasks of `rows` query rows over KV of that mode (see `numba_modes`), or load them.

    The first call for a mode and a number of rows takes about a second; later processes load them from Numba's cache on
    disk.
    """
    tile = tile_of(mode, rows)
    functions = {name: compile_tiles(name, tile) for name in ("score_block", "value_block")}
    fields = {name: function.address for name, function in functions.items()} | {
        "rows": tile.rows,
        "groups": tile.groups,
        "value_lanes": tile.vectors * LANES,
        "in_4_bytes": tile.mode.in_4_bytes,
        "parts": tile.mode.parts,
        "num_scales": tile.mode.num_scales,
        "block": tile.mode.block,
        "multiplies_pairs": tile.mode.multiplies_pairs,
    }
    return AttentionTiles(MappingProxyType(fields), tuple(functions.values()))


def compile_tiles(kind: str, tile: Tile) -> Any:
    """The compiled function "score_block" or "value_block", for that tile; it takes int64 numbers alone.

    They go through a block of tokens tile by tile: a call for each tile would cost some percent of it.
    """
    sources, shape = cache_depends_on(*PARTS), tile.shape
    narrow = tile._replace(vectors=1).shape

    def score_block(k, k_step, v, v_lines, q, scores, scores_stride, num_steps, scales, num_groups):
        _ = sources
        groups = len(shape[1])
        for i in range(0, num_groups, groups):
            now, following, out = k + 8 * i, k + 8 * min(i + groups, num_groups), scores + 4 * LANES * i
            v_now, scales_now = v + 8 * i, scales + 8 * i
            score_tile(now, following, k_step, v_now, v_lines, q, out, scores_stride, num_steps, scales_now, shape)

    def value_block(
        v, v_dim, num_tokens, p, p_stride, acc, acc_stride, acc_dim, rescale, scales, scales_step, k, lines
    ):
        _ = sources
        wide = len(shape[2]) * LANES
        k_bytes = 64 * lines * (LANES // in_4_bytes_of(shape))  # of a group of K, in a turn over V
        c = k_at = 0
        while c < v_dim:
            step, k_now = v_dim * 4, (k, k_at, lines)
            if c + wide <= acc_dim:
                value_tile(
                    v, step, num_tokens, p, p_stride, acc, acc_stride, rescale, scales, scales_step, c, k_now, shape
                )
                c += wide
            else:
                value_tile(
                    v, step, num_tokens, p, p_stride, acc, acc_stride, rescale, scales, scales_step, c, k_now, narrow
                )
                c += LANES
            k_at += k_bytes

    function = {"score_block": score_block, "value_block": value_block}[kind]
    num_arguments = function.__code__.co_argcount
    return nb.cfunc(types.void(*[types.int64] * num_arguments), cache=can_cache())(function)


@cache
def attention_worker() -> Any:
    """The compiled worker, for all modes and tiles.

    It takes the address of a record of `numba_arguments.ATTENTION`, and works until the counter has passed all tasks.
    The first call compiles, in a few seconds, and later processes load it from Numba's cache on disk.
    """
    sources = cache_depends_on(*PARTS)

    @nb.cfunc(types.void(types.voidptr), cache=can_cache())
    def attention(data):
        _ = sources
        run_attention(nb.carray(data, 1, dtype=ARGUMENTS)[0])

    return attention


@inner
def run_attention(a):
    rows, groups, width, parts = a.rows, a.groups, a.in_4_bytes, a.parts
    k_dim, v_dim = a.k_dim, a.v_dim
    queries = np.empty(k_dim * rows, np.uint32)
    row_tokens = BLOCK_TOKENS + groups * LANES
    scores = np.empty((rows, row_tokens), np.float32)
    weights = np.empty((rows, row_tokens * (2 if a.multiplies_pairs else 4)), np.uint8)
    # a vector may reach beyond V's last component: what it finds there stays in lanes that are never written out
    acc = np.empty((rows, parts * padded(v_dim // parts)), np.float32)
    maximum, total, rescale = np.empty(rows, np.float32), np.empty(rows, np.float32), np.empty(rows, np.float32)
    query_sums, zeros = np.zeros(rows, np.float32), np.zeros(rows, np.float32)  # what zeros of K and V are weighed by
    # of a block, and of what follows: the next block, or the last group again
    most_groups = 2 * BLOCK_TOKENS // LANES + groups
    k_at, v_at, scales_at = (
        np.empty(most_groups, np.int64),
        np.empty(most_groups, np.int64),
        np.empty((2, most_groups), np.int64),
    )
    ahead_tokens = BLOCK_TOKENS if a.from_memory else groups * LANES
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
        pack_queries(a, first_row, queries, query_sums)
        acc[:] = 0
        zeros[:] = 0
        maximum[:] = NO_SCORE
        total[:] = 0
        for first_token in range(start // LANES * LANES, end, BLOCK_TOKENS):
            size = located = min(BLOCK_TOKENS, end - first_token)
            if a.in_lanes:
                located = min(end - first_token, size + ahead_tokens)
                locate(a, kv_head, page_list, first_token, located, k_at, v_at, scales_at)
            else:
                stage_keys(a, kv_head, page_list, first_token, size, k_dim // width, k_lanes)
                if width == 1:
                    stage_values(a, kv_head, page_list, first_token, size, v_lanes)
                else:
                    stage_pairs_of_values(a, kv_head, page_list, first_token, size, v_lanes)
                locate_staged(a, size, k_lanes, v_lanes, k_at, v_at)
            score(a, size, located, k_at, v_at, scales_at, queries, scores)
            scale_keys(a, size, scales_at, scores, query_sums)
            weigh(a, first_row, first_token, size, scores, weights, maximum, total, rescale)
            scale_values(a, first_row, first_token, size, scales_at, weights, rescale, zeros)
            add_values(a, size, located, k_at, v_at, scales_at, weights, acc, rescale)
        finish(a, first_row, load_i64(a.tasks, task * 5 + 4), acc, maximum, total, zeros)


@inner
def padded(v_dim):
    return (v_dim + LANES - 1) // LANES * LANES


@inner
def pack_queries(a, first_row, queries, query_sums):
    """The task's queries by component, so that a tile reads them in order, and their sums over the components."""
    rows, k_dim, parts = a.rows, a.k_dim, a.parts
    for r in range(rows):
        q = max(np.int64(load_i32(a.row_ids, first_row + r)), 0) * k_dim
        if a.multiplies_pairs:
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
def score(a, size, located, k_at, v_at, scales_at, queries, scores):
    """scores = <queries, K> of a block, tile by tile; past the tokens that were located stand scores of the last group.

    While a tile is computed, its V and the next tile's K are fetched.
    """
    groups = a.groups
    num_groups = (size + LANES - 1) // LANES
    k_step = a.page_size * 4 if a.in_lanes else LANES * 4
    num_steps = a.k_dim // (a.in_4_bytes * a.parts)
    for i in range((located + LANES - 1) // LANES, num_groups + groups):
        k_at[i], v_at[i], scales_at[0, i] = k_at[i - 1], v_at[i - 1], scales_at[0, i - 1]
    v_lines = a.v_dim // a.k_dim if a.in_lanes else 0  # as many of V as of K
    numbers = (k_at.ctypes.data, k_step, v_at.ctypes.data, v_lines, queries.ctypes.data, scores.ctypes.data)
    call(a.score_block, (*numbers, scores.strides[0], num_steps, scales_at.ctypes.data, num_groups))


@inner
def scale_keys(a, size, scales_at, scores, query_sums):
    """Make the scores of codes those of keys."""
    if a.num_scales:
        at, to_zeros, num_vectors = scales_at.ctypes.data, a.page_size * 2, (size + LANES - 1) // LANES
        for r in range(a.rows):
            row_scores = scores.ctypes.data + r * scores.strides[0]
            if a.num_scales == 2:
                scale_scores_and_zeros(row_scores, at, num_vectors, to_zeros, query_sums[r])
            else:
                scale_scores(row_scores, at, num_vectors)


@inner
def scale_values(a, first_row, first_token, size, scales_at, weights, rescale, zeros):
    """Make the weights of values those of their codes, and renew the rows' sums of weighted zeros."""
    if a.num_scales:
        num_vectors = (size + LANES - 1) // LANES
        at, to_zeros = scales_at.ctypes.data + scales_at.strides[0], a.page_size * 2
        for r in range(a.rows):
            row_weights = weights.ctypes.data + r * weights.strides[0]
            low, high = seen(a, first_row + r, first_token, size)
            zeros[r] *= rescale[r]
            if high > low and a.num_scales == 2:
                zeros[r] += scale_weights_and_zeros(row_weights, at, low, high, num_vectors, to_zeros)
            elif high > low:
                scale_weights(row_weights, at, low, high, num_vectors)


@inner
def seen(a, row, first_token, size):
    """Which tokens of a block a row sees, [low, high)."""
    low = max(np.int64(load_i32(a.row_starts, row)) - first_token, 0)
    return low, min(np.int64(load_i32(a.row_ends, row)) - first_token, size)


@inner
def weigh(a, first_row, first_token, size, scores, weights, maximum, total, rescale):
    """Turn the scores of a block into weights, and renew each row's maximum and denominator."""
    num_vectors = (size + LANES - 1) // LANES
    factor, cap, inverse_cap = a.score_factor, a.softcap, a.inverse_softcap
    for r in range(a.rows):
        row_scores = scores.ctypes.data + r * scores.strides[0]
        row_weights = weights.ctypes.data + r * weights.strides[0]
        low, high = seen(a, first_row + r, first_token, size)
        if high <= low:
            rescale[r] = 1
            weights[r] = 0
            continue
        if a.key_bias:
            add_key_bias(a, first_row + r, first_token, row_scores, num_vectors)
        largest = limit_row(row_scores, num_vectors, low, high, factor, cap, inverse_cap)
        largest = max(largest, maximum[r])
        rescale[r] = np.float32(2.0 ** max(maximum[r] - largest, np.float32(-126)))
        maximum[r] = largest
        total[r] *= rescale[r]
        if a.multiplies_pairs:
            total[r] += exp2_row_to_bf16(row_scores, row_weights, num_vectors, largest)
        else:
            total[r] += exp2_row(row_scores, row_weights, num_vectors, largest)


@inner
def add_key_bias(a, row, first_token, row_scores, num_vectors):
    """Add what the row's head adds to each key of a block, less what it adds to one at the row's own position."""
    row_id = np.int64(load_i32(a.row_ids, row))
    table = row_id % a.num_q_heads * a.key_bias_tokens
    own = load_f32(a.key_bias, table + load_i64(a.q_positions, row_id // a.num_q_heads))
    bias_row(row_scores, a.key_bias + (table + first_token) * 4, num_vectors, own, a.inverse_scale)


@inner
def add_values(a, size, located, k_at, v_at, scales_at, weights, acc, rescale):
    """acc = acc * rescale + weights @ V of a block. While that is computed, the next block's K is fetched.

    V was fetched while its own K was multiplied (see `score`): so memory is read all the time.
    """
    num_groups = (size + LANES - 1) // LANES
    v_dim, acc_dim = a.v_dim // a.parts, acc.shape[1] // a.parts
    lines = 0
    if a.from_memory and located > size:
        for i in range((located + LANES - 1) // LANES, 2 * num_groups):
            k_at[i] = k_at[i - 1]
        lines = a.k_dim // (LANES * a.parts) * a.value_lanes // v_dim
    p, p_row, factors = weights.ctypes.data, weights.strides[0], rescale.ctypes.data
    scales, k_next = scales_at.ctypes.data + scales_at.strides[0], k_at.ctypes.data + num_groups * 8
    numbers = (v_at.ctypes.data, v_dim, size, p, p_row, acc.ctypes.data, acc.strides[0], acc_dim, factors)
    call(a.value_block, (*numbers, scales, a.page_size, k_next, lines))


@inner
def finish(a, first_row, partial, acc, maximum, total, zeros):
    """Write the rows' outputs and log-sum-exps, as results or as parts of them."""
    parts = a.parts
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
