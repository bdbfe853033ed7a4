"""New KV as codes, straight into pages in lanes: one pass over it, where torch takes a dozen calls a layer.

Codes and scales are those of `radixkv.memory.kv_codes`, to the bit. The scales' pages come as uint16, the upper halves
of float32, and those of blocks as uint8, float8 e4m3.
"""

from __future__ import annotations

import math

import numba as nb
import numpy as np

from radixkv.kernels.compiling import can_cache, inner

LARGEST_INT8, LARGEST_INT4 = np.float32(127), np.float32(15)
NAN = np.uint16(0x7FC0)
BYTES_OF_LANE = 4

# of fp4
BLOCK = 16  # components that share a scale
GLOBAL_SCALE, LARGEST_FP4, LARGEST_E4M3 = np.float32(0.25), np.float32(6), np.float32(448)
NORMAL_E4M3 = np.float32(2.0**-6)  # smaller ones are multiples of 2**-9
NAN_E4M3, SIGN = np.uint8(0x7F), np.uint8(8)


@nb.njit(cache=can_cache(), nogil=True)
def write_int8(slots, page_size, k, v, k_pages, v_pages, k_scales, v_scales):
    """Store tokens; k and v are float32 [tokens, heads, dim], the pages as `QuantizedKVPool` has them in lanes."""
    for i in range(len(slots)):
        page, at = slots[i] // page_size, slots[i] % page_size
        word, byte = at // BYTES_OF_LANE, at % BYTES_OF_LANE
        for h in range(k.shape[1]):
            scale = scale_of_int8(k[i, h])
            k_scales[page, h, 0, at] = upper_half(scale)
            for d in range(k.shape[2]):
                code = np.uint8(np.int8(nearest(k[i, h, d], scale)))
                k_pages[page, h, d // BYTES_OF_LANE, at, d % BYTES_OF_LANE] = code
            scale = scale_of_int8(v[i, h])
            v_scales[page, h, 0, at] = upper_half(scale)
            for d in range(v.shape[2]):
                v_pages[page, h, word, d, byte] = np.uint8(np.int8(nearest(v[i, h, d], scale)))


@nb.njit(cache=can_cache(), nogil=True)
def write_int4(slots, page_size, k, v, k_pages, v_pages, k_scales, v_scales):
    """Store tokens likewise; k comes rotated."""
    for i in range(len(slots)):
        page, at = slots[i] // page_size, slots[i] % page_size
        word, byte = at // BYTES_OF_LANE, at % BYTES_OF_LANE
        for h in range(k.shape[1]):
            scale, zero = scale_of_int4(k[i, h])
            k_scales[page, h, 0, at], k_scales[page, h, 1, at] = upper_half(scale), upper_half(zero)
            for d in range(k.shape[2] // 2):
                code = two_codes(k[i, h], d, scale, zero)
                k_pages[page, h, d // BYTES_OF_LANE, at, d % BYTES_OF_LANE] = code
            scale, zero = scale_of_int4(v[i, h])
            v_scales[page, h, 0, at], v_scales[page, h, 1, at] = upper_half(scale), upper_half(zero)
            for d in range(v.shape[2] // 2):
                v_pages[page, h, word, d, byte] = two_codes(v[i, h], d, scale, zero)


@nb.njit(cache=can_cache(), nogil=True)
def write_fp4(slots, page_size, k, v, k_pages, v_pages, k_scales, v_scales):
    """Store tokens likewise, with a scale for each block of a vector."""
    for i in range(len(slots)):
        page, at = slots[i] // page_size, slots[i] % page_size
        word, byte = at // BYTES_OF_LANE, at % BYTES_OF_LANE
        for h in range(k.shape[1]):
            scales = k_scales[page, h, :, at]
            scale_blocks(k[i, h], scales)
            for d in range(k.shape[2] // 2):
                code = two_floats(k[i, h], d, scales)
                k_pages[page, h, d // BYTES_OF_LANE, at, d % BYTES_OF_LANE] = code
            scales = v_scales[page, h, :, at]
            scale_blocks(v[i, h], scales)
            for d in range(v.shape[2] // 2):
                v_pages[page, h, word, d, byte] = two_floats(v[i, h], d, scales)


@inner
def scale_of_int8(values):
    """That of a vector; NaN if something in it is not finite."""
    largest, spoiled = np.float32(0), np.float32(0)
    for value in values:
        largest = max(largest, abs(value))
        spoiled += value * np.float32(0)
    return rounded_up(largest / LARGEST_INT8 + spoiled)


@inner
def scale_of_int4(values):
    """That of a vector, and its zero."""
    low, high, spoiled = values[0], values[0], np.float32(0)
    for value in values:
        low, high = min(low, value), max(high, value)
        spoiled += value * np.float32(0)
    zero = -rounded_up(-low)
    return rounded_up((high - zero) / LARGEST_INT4 + spoiled), zero


@inner
def two_codes(values, d, scale, zero):
    """Those of component d and of its partner half the vector further."""
    low = max(min(nearest(values[d] - zero, scale), LARGEST_INT4), np.float32(0))
    high = max(min(nearest(values[len(values) // 2 + d] - zero, scale), LARGEST_INT4), np.float32(0))
    return np.uint8(low) | np.uint8(np.uint8(high) << np.uint8(4))


@inner
def scale_blocks(values, scales):
    """Set the scales of a vector's blocks; NaN, all of them, if something in it is not finite."""
    spoiled = np.float32(0)
    for value in values:
        spoiled += value * np.float32(0)
    for b in range(len(scales)):
        largest = np.float32(0)
        for value in values[b * BLOCK : (b + 1) * BLOCK]:
            largest = max(largest, abs(value))
        scales[b] = NAN_E4M3 if math.isnan(spoiled) else nearest_e4m3(largest / (LARGEST_FP4 * GLOBAL_SCALE))


@inner
def two_floats(values, d, scales):
    """Those of component d and of its partner half the vector further."""
    partner = len(values) // 2 + d
    high = nearest_fp4(values[partner], scales[partner // BLOCK])
    return nearest_fp4(values[d], scales[d // BLOCK]) | np.uint8(high << np.uint8(4))


@inner
def nearest_e4m3(value):
    """The bits of the float8 e4m3 nearest to a float32 that is not negative; ties go to even."""
    if value < NORMAL_E4M3:
        return np.uint8(np.rint(value * np.float32(512)))
    bits = np.float32(min(value, LARGEST_E4M3)).view(np.uint32)
    odd = (bits >> np.uint32(20)) & np.uint32(1)
    return np.uint8((np.uint32(bits + np.uint32(0x7FFFF) + odd) >> np.uint32(20)) - np.uint32((127 - 7) << 3))


@inner
def nearest_fp4(value, scale):
    """The bits of the E2M1 nearest to value / scale; 0 where the scale, bits of e4m3, is 0 or NaN."""
    if scale == 0 or scale == NAN_E4M3:
        return np.uint8(0)
    magnitude = abs(value) / (e4m3(scale) * GLOBAL_SCALE)
    if magnitude < 2:
        code = np.rint(magnitude * 2)
    elif magnitude < 4:
        code = np.rint(magnitude) + 2
    else:
        code = min(np.rint(magnitude / 2), np.float32(3)) + 4
    return np.uint8(code) | (SIGN if value < 0 else np.uint8(0))


@inner
def e4m3(bits):
    """The float32 of a float8 e4m3 that is neither negative nor NaN."""
    if bits < 8:
        return np.float32(bits) / np.float32(512)
    return np.uint32((np.uint32(bits) << np.uint32(20)) + np.uint32((127 - 7) << 23)).view(np.float32)


@inner
def nearest(value, scale):
    """value / scale as a whole number; 0 where the scale is 0 or NaN."""
    return np.rint(value / scale) if scale > 0 else np.float32(0)


@inner
def rounded_up(value):
    """The next bfloat16 towards infinity, as float32; NaN of what is not finite."""
    if not math.isfinite(value):
        return np.float32(np.nan)
    bits = np.float32(value).view(np.uint32)
    if value > 0:
        bits += np.uint32(0xFFFF)
    rounded = np.uint32(bits & np.uint32(0xFFFF0000)).view(np.float32)
    return rounded if math.isfinite(rounded) else np.float32(np.nan)


@inner
def upper_half(value):
    """The bits of a bfloat16 that is held in a float32."""
    if math.isnan(value):
        return NAN
    return np.uint16(np.float32(value).view(np.uint32) >> np.uint32(16))
