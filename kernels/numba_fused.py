"""The small operations between a decoder's linear layers on the CPU, compiled by Numba, as workers of a program.

They round where the modules of transformers round: in 16 bit after every step that such a module takes.
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
    numba_codes,
    numba_emitter,
    numba_modes,
    numba_values,
    numba_words,
    numba_writers,
)
from radixkv.kernels.compiling import cache_depends_on, can_cache, inner
from radixkv.kernels.numba_emitter import LANES
from radixkv.kernels.numba_modes import MODES, Tile, in_4_bytes_of
from radixkv.kernels.numba_values import (
    add_vectors,
    gate_vector,
    load_value,
    rotate_vectors,
    round_value,
    scale_vectors,
    sum_of_squares,
)
from radixkv.kernels.numba_words import load_f32, load_i64, next_number, store_as, store_f32

VALUES_AT_ONCE = 1024  # that a thread takes at a time
HEADS_AT_ONCE = 4

PARTS = (
    numba_arguments,
    numba_codes,
    numba_emitter,
    numba_modes,
    numba_values,
    numba_words,
    numba_writers,
)
NORM, GATE, CAST, ROTARY = (
    arguments.dtype
    for arguments in (numba_arguments.NORM, numba_arguments.GATE, numba_arguments.CAST, numba_arguments.ROTARY)
)


def norm_worker(mode: str) -> Any:
    """The compiled worker of RMSNorm (Zhang and Sennrich, 2019), for values of that mode (see `numba_modes`).

    It takes the address of a record of `numba_arguments.NORM`. Each row of `input`, to which that of `added` is added
    first where there is one, is divided by the root of the mean of its squares, and multiplied with `weight`.
    """
    return _norm(_tile(mode))


def gate_worker(mode: str) -> Any:
    """The compiled worker of silu(gate) * up, which takes the address of a record of `numba_arguments.GATE`."""
    return _gate(_tile(mode))


def widen_worker(mode: str) -> Any:
    """The compiled worker that makes float32 of values of that mode; its records are of `numba_arguments.CAST`."""
    return _widen(_tile(mode))


def narrow_worker(mode: str) -> Any:
    """The compiled worker that goes the other way, and rounds."""
    return _narrow(_tile(mode))


def rotary_worker(mode: str) -> Any:
    """The compiled worker of rotary embeddings, which takes the address of a record of `numba_arguments.ROTARY`.

    It turns the components i and i + head_dim / 2 of queries and keys in place. Where pages are given, it stores the
    turned keys and the values in them, as `LaneKVPool` lays them out.
    """
    return _rotary(_tile(mode))


def _tile(mode: str) -> Tile:
    return Tile(1, 1, 1, MODES[mode], sums=1)


@cache
def _norm(tile: Tile) -> Any:
    shape = tile.shape
    sources = cache_depends_on(*PARTS)

    @nb.cfunc(types.void(types.voidptr), cache=can_cache())
    def norm(data):
        _ = sources
        run_norm(nb.carray(data, 1, dtype=NORM)[0], shape)

    return norm


@cache
def _gate(tile: Tile) -> Any:
    shape = tile.shape
    sources = cache_depends_on(*PARTS)

    @nb.cfunc(types.void(types.voidptr), cache=can_cache())
    def gate(data):
        _ = sources
        run_gate(nb.carray(data, 1, dtype=GATE)[0], shape)

    return gate


@cache
def _widen(tile: Tile) -> Any:
    shape = tile.shape
    sources = cache_depends_on(*PARTS)

    @nb.cfunc(types.void(types.voidptr), cache=can_cache())
    def widen(data):
        _ = sources
        run_widen(nb.carray(data, 1, dtype=CAST)[0], shape)

    return widen


@cache
def _narrow(tile: Tile) -> Any:
    shape = tile.shape
    sources = cache_depends_on(*PARTS)

    @nb.cfunc(types.void(types.voidptr), cache=can_cache())
    def narrow(data):
        _ = sources
        run_narrow(nb.carray(data, 1, dtype=CAST)[0], shape)

    return narrow


@cache
def _rotary(tile: Tile) -> Any:
    shape = tile.shape
    sources = cache_depends_on(*PARTS)

    @nb.cfunc(types.void(types.voidptr), cache=can_cache())
    def rotary(data):
        _ = sources
        run_rotary(nb.carray(data, 1, dtype=ROTARY)[0], shape)

    return rotary


@inner
def run_norm(a, shape):
    size = a.size
    whole = size // LANES * LANES
    value_bytes = 4 // in_4_bytes_of(shape)
    at_once = max(1, VALUES_AT_ONCE // size)
    while True:
        first = next_number(a.counter) * at_once
        if first >= a.num_rows:
            break
        for row in range(first, min(first + at_once, a.num_rows)):
            x, out = a.input + row * size * value_bytes, a.output + row * size * value_bytes
            if a.added:
                added = a.added + row * size * value_bytes
                add_vectors(x, added, whole // LANES, shape)
                for i in range(whole, size):
                    store_as(x, i, load_value(x, i, shape) + load_value(added, i, shape), shape)
            squares = sum_of_squares(x, whole // LANES, shape)
            for i in range(whole, size):
                squares += load_value(x, i, shape) * load_value(x, i, shape)
            factor = np.float32(1) / np.float32(math.sqrt(squares / np.float32(size) + a.eps))
            scale_vectors(x, a.weight, out, factor, whole // LANES, shape)
            for i in range(whole, size):
                store_as(
                    out, i, round_value(load_value(x, i, shape) * factor, shape) * load_value(a.weight, i, shape), shape
                )


@inner
def run_gate(a, shape):
    value_bytes = 4 // in_4_bytes_of(shape)
    while True:
        first = next_number(a.counter) * VALUES_AT_ONCE
        if first >= a.num_values:
            break
        for i in range(first, min(first + VALUES_AT_ONCE, a.num_values), LANES):
            at = i * value_bytes
            gate_vector(a.gate + at, a.up + at, a.output + at, shape)


@inner
def run_widen(a, shape):
    while True:
        first = next_number(a.counter) * VALUES_AT_ONCE
        if first >= a.num_values:
            break
        for i in range(first, min(first + VALUES_AT_ONCE, a.num_values)):
            store_f32(a.wide, i, load_value(a.narrow, i, shape))


@inner
def run_narrow(a, shape):
    while True:
        first = next_number(a.counter) * VALUES_AT_ONCE
        if first >= a.num_values:
            break
        for i in range(first, min(first + VALUES_AT_ONCE, a.num_values)):
            store_as(a.narrow, i, load_f32(a.wide, i), shape)


@inner
def run_rotary(a, shape):
    """Heads are numbered through: those of queries, keys and values, of one token after another."""
    value_bytes = 4 // in_4_bytes_of(shape)
    head_bytes = a.head_dim * value_bytes
    first_value = a.num_q_heads + a.num_kv_heads
    heads = first_value + (a.num_kv_heads if a.k_pages else 0)
    while True:
        first = next_number(a.counter) * HEADS_AT_ONCE
        if first >= a.num_tokens * heads:
            break
        for i in range(first, min(first + HEADS_AT_ONCE, a.num_tokens * heads)):
            token, head = i // heads, i % heads
            at = token * head_bytes
            if head < a.num_q_heads:
                turn(a, a.q + (token * a.num_q_heads + head) * head_bytes, at, shape)
            elif head < first_value:
                head -= a.num_q_heads
                k = a.k + (token * a.num_kv_heads + head) * head_bytes
                turn(a, k, at, shape)
                if a.k_pages:
                    store_key(a, token, head, k, shape)
            else:
                head -= first_value
                store_value(a, token, head, a.v + (token * a.num_kv_heads + head) * a.v_dim * value_bytes, shape)


@inner
def turn(a, x, at, shape):
    half = a.head_dim // 2
    whole = half // LANES * LANES
    half_bytes = half * (4 // in_4_bytes_of(shape))
    cos, sin = a.cos + at, a.sin + at
    rotate_vectors(x, cos, sin, half_bytes, whole // LANES, shape)
    for i in range(whole, half):
        one, other = load_value(x, i, shape), load_value(x, half + i, shape)
        one_cos = round_value(one * load_value(cos, i, shape), shape)
        one_sin = round_value(one * load_value(sin, half + i, shape), shape)
        other_cos = round_value(other * load_value(cos, half + i, shape), shape)
        other_sin = round_value(-other * load_value(sin, i, shape), shape)
        store_as(x, i, one_cos + other_sin, shape)
        store_as(x, half + i, other_cos + one_sin, shape)


@inner
def store_key(a, token, head, k, shape):
    width, page_size = in_4_bytes_of(shape), a.page_size
    slot = load_i64(a.slots, token)
    page, at = slot // page_size, slot % page_size
    target = a.k_pages + (page * a.num_kv_heads + head) * a.k_head_bytes
    for d in range(a.head_dim):
        store_as(target, (d // width * page_size + at) * width + d % width, load_value(k, d, shape), shape)


@inner
def store_value(a, token, head, v, shape):
    width, page_size = in_4_bytes_of(shape), a.page_size
    slot = load_i64(a.slots, token)
    page, at = slot // page_size, slot % page_size
    target = a.v_pages + (page * a.num_kv_heads + head) * a.v_head_bytes
    for d in range(a.v_dim):
        store_as(target, (at // width * a.v_dim + d) * width + at % width, load_value(v, d, shape), shape)
