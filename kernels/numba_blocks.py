"""Where a block's K and V lie: in the pages, where these keep lanes, or in scratch that the pages' rows are copied to.

A block is up to 256 tokens of one list of pages. `a` is a record of `numba_arguments.ATTENTION`.
"""

from __future__ import annotations

import numpy as np

from radixkv.kernels.compiling import inner
from radixkv.kernels.numba_emitter import LANES
from radixkv.kernels.numba_words import copy_words, interleave_halves, load_i32, transpose_words


@inner
def locate(a, kv_head, page_list, first_token, size, k_at, v_at, scales_at):
    """Addresses of the K and V of a block's groups, and of their scales, where pages hold them in lanes."""
    page_groups = a.page_size // LANES
    v_bytes = a.v_dim // a.parts * 4 // a.in_4_bytes  # of a token
    place, group = page_list + first_token // LANES // page_groups, first_token // LANES % page_groups
    for i in range((size + LANES - 1) // LANES):
        head = np.int64(load_i32(a.pages, place)) * a.num_kv_heads + kv_head
        first = group * LANES
        k_at[i] = a.k + head * a.k_head_bytes + first * 4
        v_at[i] = a.v + head * a.v_head_bytes + first * v_bytes
        if a.num_scales:
            scale = (head * a.num_scales * a.page_size + first) * 2
            scales_at[0, i], scales_at[1, i] = a.k_scales + scale, a.v_scales + scale
        if a.block:
            scales_at[0, i] = a.k_scales + head * (a.k_dim // a.block) * a.page_size + first
            scales_at[1, i] = a.v_scales + head * (a.v_dim // a.block) * a.page_size + first
        group += 1
        if group == page_groups:
            place, group = place + 1, 0


@inner
def locate_staged(a, size, k_lanes, v_lanes, k_at, v_at):
    """The same of a block that was copied into lanes."""
    width = a.in_4_bytes
    for i in range((size + LANES - 1) // LANES):
        k_at[i] = k_lanes.ctypes.data + i * a.k_dim * LANES * 4 // width
        v_at[i] = v_lanes.ctypes.data + i * a.v_dim * LANES * 4 // width


@inner
def row_of(a, kv_head, page_list, position):
    """Number of the row that holds a token's K or V, where pages hold rows."""
    page = np.int64(load_i32(a.pages, page_list + position // a.page_size))
    return (page * a.page_size + position % a.page_size) * a.num_kv_heads + kv_head


@inner
def stage_keys(a, kv_head, page_list, first_token, size, words, k_lanes):
    """Copy a block's K into lanes, `words` of 4 bytes a token."""
    rows = np.empty(LANES, np.int64)
    whole = words // LANES * LANES
    for group in range((size + LANES - 1) // LANES):
        for i in range(LANES):  # where the tokens end, the last one stands in
            position = first_token + min(group * LANES + i, size - 1)
            rows[i] = a.k + row_of(a, kv_head, page_list, position) * words * 4
        out = group * words * LANES
        for c in range(0, whole, LANES):
            transpose_words(rows.ctypes.data, c * 4, k_lanes.ctypes.data + (out + c * LANES) * 4)
        for c in range(whole, words):
            for i in range(LANES):
                k_lanes[out + c * LANES + i] = load_i32(rows[i], c)


@inner
def stage_values(a, kv_head, page_list, first_token, size, v_lanes):
    """Copy a block's V of 4-byte values, token after token."""
    v_dim = a.v_dim
    whole = v_dim // LANES * LANES
    for t in range(size):
        row = a.v + row_of(a, kv_head, page_list, first_token + t) * v_dim * 4
        for d in range(0, whole, LANES):
            copy_words(row + d * 4, v_lanes.ctypes.data + (t * v_dim + d) * 4)
        for d in range(whole, v_dim):
            v_lanes[t * v_dim + d] = load_i32(row, d)


@inner
def stage_pairs_of_values(a, kv_head, page_list, first_token, size, v_lanes):
    """Copy a block's V of 2-byte values, two tokens interleaved; a last one without a neighbour comes twice."""
    words = a.v_dim // 2
    whole = words // LANES * LANES
    for t in range(0, size, 2):
        first = a.v + row_of(a, kv_head, page_list, first_token + t) * words * 4
        second = a.v + row_of(a, kv_head, page_list, first_token + min(t + 1, size - 1)) * words * 4
        out = t * words
        for c in range(0, whole, LANES):
            interleave_halves(first + c * 4, second + c * 4, v_lanes.ctypes.data + (out + 2 * c) * 4)
        for c in range(whole, words):
            one, other = np.uint32(load_i32(first, c)), np.uint32(load_i32(second, c))
            v_lanes[out + 2 * c] = np.int32((one & np.uint32(0xFFFF)) | (other << np.uint32(16)))
            v_lanes[out + 2 * c + 1] = np.int32((one >> np.uint32(16)) | (other & np.uint32(0xFFFF0000)))
