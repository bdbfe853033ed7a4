"""Linear layers over a few tokens on the CPU, compiled by Numba: a step of decoding is bound by reading the weights.

Libraries of dense products are made for many rows at once, and read weights at a fraction of the memory's bandwidth
when there are few. These read each weight once, for all tokens, in the order in which it lies in memory.
"""

from __future__ import annotations

import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numba as nb
import numpy as np
from numba import types

from radixkv.kernels import numba_ir
from radixkv.kernels.compiling import can_cache
from radixkv.kernels.numba_ir import LANES, Tile, load_f32, next_number, product_tile, store_as

ROWS_AT_ONCE = 32  # output components that a thread takes at a time
MIN_ROWS = 6  # of a tile

# The places of the arguments in the int64 array that a worker gets: addresses and sizes.
COUNTER = 0  # int64 [1], where the next rows are
WEIGHT = 1  # [out_features, in_features]
INPUT = 2  # [tokens, in_features], in the weight's dtype
BIAS = 3  # float32 [out_features], or 0
OUTPUT = 4  # [tokens, out_features], in the weight's dtype
NUM_TOKENS, OUT_FEATURES, ROW_BYTES = 5, 6, 7  # a row is a multiple of 64 bytes; there are MIN_ROWS at least
NUM_ARGUMENTS = 8

NO_SOURCE = -1


def tile_of(mode: str, num_tokens: int) -> Tile:
    """The tile for so many tokens, as measured: few streams of weights, and no more sums than registers."""
    columns = 8 if num_tokens >= 8 else 4 if num_tokens >= 4 else 2 if num_tokens >= 2 else 1
    return Tile({1: 1, 2: 4, 4: 6, 8: 3}[columns], columns, 1, mode)


def linear_worker(mode: str, num_tokens: int) -> Any:
    """The compiled worker for weights of that mode (see `numba_ir`) and so many tokens.

    It takes the address of the arguments above, and works until the counter has passed all rows. Cached on disk.
    """
    return _worker(tile_of(mode, num_tokens))


@cache
def _worker(tile: Tile) -> Any:
    shape = tile.shape
    source = zlib.crc32(Path(numba_ir.__file__).read_bytes())  # Numba's cache looks at this file alone

    @nb.cfunc(types.void(types.CPointer(types.int64)), cache=can_cache())
    def linear(data):
        if source != NO_SOURCE:
            run_linear(nb.carray(data, (NUM_ARGUMENTS,)), shape)

    return linear


@nb.njit
def run_linear(a, shape):
    rows, columns = len(shape[0]), len(shape[1])
    products = np.empty((rows * columns + LANES - 1) // LANES * LANES, np.float32)
    while True:
        first = next_number(a[COUNTER]) * ROWS_AT_ONCE
        if first >= a[OUT_FEATURES]:
            break
        last = min(first + ROWS_AT_ONCE, a[OUT_FEATURES])
        for r in range(first, last, rows):
            for c in range(0, a[NUM_TOKENS], columns):
                # the last tiles go back over what was computed before, so that all are whole
                multiply(a, min(r, a[OUT_FEATURES] - rows), min(c, a[NUM_TOKENS] - columns), products, shape)


@nb.njit
def multiply(a, first_row, first_token, products, shape):
    rows, columns = len(shape[0]), len(shape[1])
    row_bytes, out_features = a[ROW_BYTES], a[OUT_FEATURES]
    w, x = a[WEIGHT] + first_row * row_bytes, a[INPUT] + first_token * row_bytes
    product_tile(w, row_bytes, x, row_bytes, row_bytes // 64, products.ctypes.data, shape)
    for c in range(columns):
        for r in range(rows):
            value = products[c * rows + r]
            if a[BIAS]:
                value += load_f32(a[BIAS], first_row + r)
            store_as(a[OUTPUT], (first_token + c) * out_features + first_row + r, value, shape)
