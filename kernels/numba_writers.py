"""New KV into pages in lanes, as it is: one function for each size of value. `numba_codes` writes what is coded.

k and v are [tokens, heads, dim], and the pages as `LaneKVPool` has them.
"""

from __future__ import annotations

import numba as nb

from radixkv.kernels.compiling import can_cache


@nb.njit(cache=can_cache(), nogil=True)
def write_lanes_32(slots, page_size, k, v, k_pages, v_pages):
    """Store tokens of 4-byte values."""
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
    """Store tokens of 1-byte values."""
    for i in range(len(slots)):
        page, at = slots[i] // page_size, slots[i] % page_size
        for h in range(k.shape[1]):
            for d in range(k.shape[2]):
                k_pages[page, h, d // 4, at, d % 4] = k[i, h, d]
            for d in range(v.shape[2]):
                v_pages[page, h, at // 4, d, at % 4] = v[i, h, d]
