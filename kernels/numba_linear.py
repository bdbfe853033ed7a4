"""Linear layers over a few tokens on the CPU, compiled by Numba: a step of decoding is bound by reading the weights.

Libraries of dense products are made for many rows at once, and read weights at a fraction of the memory's bandwidth
when there are few. These read each weight once, for all tokens, in the order in which it lies in memory.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba as nb
import numpy as np
from numba import types

from radixkv.kernels import (
    numba_arguments,
    numba_codes,
    numba_emitter,
    numba_fp4,
    numba_linear_tiles,
    numba_modes,
    numba_words,
    numba_writers,
)
from radixkv.kernels.compiling import cache_depends_on, can_cache, inner
from radixkv.kernels.numba_emitter import LANES
from radixkv.kernels.numba_linear_tiles import product_tile
from radixkv.kernels.numba_modes import MODES, Tile
from radixkv.kernels.numba_words import load_f32, next_number, store_as
from radixkv.kernels.processor import this_processor

ROWS_AT_ONCE = 32  # output components that a thread takes at a time
MIN_ROWS = 6  # of a tile

ARGUMENTS = numba_arguments.LINEAR.dtype
PARTS = (  # what a worker is made of, besides this module
    numba_arguments,
    numba_codes,
    numba_emitter,
    numba_fp4,
    numba_linear_tiles,
    numba_modes,
    numba_words,
    numba_writers,
)


# Rows, columns and parts of a sum (see `product_tile`) by the number of tokens from which on they serve, as measured:
# few streams of weights, and no more sums and operands than registers.
WIDE_TILES = {1: (1, 1, 1), 2: (4, 2, 1), 4: (6, 4, 1), 8: (3, 8, 1)}  # 32 registers of 16 lanes
NARROW_TILES = {1: (1, 1, 1), 2: (4, 2, 2), 4: (3, 4, 2)}  # 16 registers of 8 lanes, or 32 of 4
NARROW_TILES_16_BIT = {**NARROW_TILES, 4: (2, 4, 2)}  # a register of weights becomes two


def tile_of(mode: str, num_tokens: int) -> Tile:
    """The tile for `num_tokens` tokens, or for the last ones of more."""
    is_wide = has_wide_registers() or MODES[mode].multiplies_pairs
    tiles = WIDE_TILES if is_wide else NARROW_TILES if MODES[mode].in_4_bytes == 1 else NARROW_TILES_16_BIT
    rows, columns, parts = tiles[max(number for number in tiles if number <= num_tokens)]
    return Tile(rows, columns, parts, MODES[mode], sums=rows * columns)


def has_wide_registers() -> bool:
    """Whether the processor has 32 registers of 16 lanes."""
    return this_processor().vectors >= 32


def linear_worker(mode: str, num_tokens: int) -> Any:
    """The compiled worker for weights of that mode (see `numba_modes`) and `num_tokens` tokens.

    It takes the address of a record of `numba_arguments.LINEAR`, and works until the counter has passed all rows. It is
    cached on disk.
    """
    return _worker(tile_of(mode, num_tokens))


@cache
def _worker(tile: Tile) -> Any:
    shape = tile.shape
    sources = cache_depends_on(*PARTS)

    @nb.cfunc(types.void(types.voidptr), cache=can_cache())
    def linear(data):
        _ = sources
        run_linear(nb.carray(data, 1, dtype=ARGUMENTS)[0], shape)

    return linear


@inner
def run_linear(a, shape):
    rows, columns = len(shape[0]), len(shape[1])
    products = np.empty((rows * columns + LANES - 1) // LANES * LANES, np.float32)
    while True:
        first = next_number(a.counter) * ROWS_AT_ONCE
        if first >= a.out_features:
            break
        last = min(first + ROWS_AT_ONCE, a.out_features)
        for r in range(first, last, rows):
            for c in range(0, a.num_tokens, columns):
                # the last tiles go back over what was computed before, so that all are whole
                multiply(a, min(r, a.out_features - rows), min(c, a.num_tokens - columns), products, shape)


@inner
def multiply(a, first_row, first_token, products, shape):
    rows, columns = len(shape[0]), len(shape[1])
    row_bytes, out_features = a.row_bytes, a.out_features
    w, x = a.weight + first_row * row_bytes, a.input + first_token * row_bytes
    product_tile(w, row_bytes, x, row_bytes, row_bytes // 64, products.ctypes.data, shape)
    for c in range(columns):
        for r in range(rows):
            value = products[c * rows + r]
            if a.bias:
                value += load_f32(a.bias, first_row + r)
            store_as(a.output, (first_token + c) * out_features + first_row + r, value, shape)
