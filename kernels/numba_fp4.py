"""How floats of 4 bits, and the scales of their blocks, become float32 in registers.

Codes are E2M1, two in a byte, and scales float8 e4m3 that are not negative, as `numba_codes.write_fp4` writes them.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir

from radixkv.kernels.numba_emitter import F32, I64, IVEC, LANES, VEC, Emitter
from radixkv.kernels.processor import this_processor

TWICE = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # what each code stands for, as a whole number
SCALE_UNIT = 256.0  # the exponents' biases of e4m3 and of float16 differ by 8
UNIT = SCALE_UNIT / 2
"""A value is so many times the product of what `read_code` and `read_scales` make of it, times the constant."""

_SMALL_SCALES = [bits / 512 for bits in range(8)]
_SCALES = [*_SMALL_SCALES, *((8 + bits % 8) * 2.0 ** (bits // 8 - 10) for bits in range(8, 127))]
_SCALE_TABLE = [scale / SCALE_UNIT for scale in _SCALES] + [math.nan] * (256 - len(_SCALES))


def read_code(e: Emitter, raw: Any, i: int) -> Any:
    """Twice the value: by a table of floats, by one of bytes, or without any."""
    part, byte = divmod(i, 4)
    processor, b = this_processor(), e.b
    if processor.lanes == LANES:
        return e.lookup(TWICE, b.lshr(raw, e.ivec(8 * byte + 4 * part)))
    codes = b.and_(b.lshr(raw, e.ivec(4 * part)), e.ivec(0x0F0F0F0F))
    if processor.looks_up_bytes:
        twice = b.shl(e.lookup_bytes(TWICE, codes), e.ivec(24 - 8 * byte))
        return b.sitofp(b.ashr(twice, e.ivec(24)), VEC)
    return _compute(e, b.and_(b.lshr(codes, e.ivec(8 * byte)), e.ivec(15)))


def read_scales(e: Emitter, address: Any, offset: Any) -> Any:
    """16 scales that lie `offset` bytes after `address`, as 1 / `SCALE_UNIT` of their values."""
    shorts = ir.VectorType(ir.IntType(16), LANES)
    bits = e.b.zext(e.load(address, offset, ir.VectorType(ir.IntType(8), LANES), 1), shorts)
    one, seven, nan_bit = (ir.Constant(shorts, [number] * LANES) for number in (1, 7, 0x4000))
    nan = e.b.and_(e.b.shl(e.b.add(bits, one), seven), nan_bit)  # only all ones carry
    return e.b.fpext(e.b.bitcast(e.b.or_(e.b.shl(bits, seven), nan), ir.VectorType(ir.HalfType(), LANES)), VEC)


def read_scale(e: Emitter, address: Any, offset: Any) -> Any:
    """One of them."""
    bits = e.b.zext(e.load(address, offset, ir.IntType(8), 1), I64)
    return e.load(e.table("scales_of_blocks", _SCALE_TABLE), e.b.mul(bits, e.const(4)), F32)


def _compute(e: Emitter, codes: Any) -> Any:
    """Twice the value of codes, one a lane: a magnitude of 2 or more is 2 or 3, doubled as its exponent says."""
    b = e.b
    magnitude = b.and_(codes, e.ivec(7))
    normal = b.or_(b.and_(magnitude, e.ivec(1)), e.ivec(2))
    doubled = b.lshr(b.shl(normal, b.lshr(magnitude, e.ivec(1))), e.ivec(1))
    twice = b.select(b.icmp_unsigned("<", magnitude, e.ivec(2)), magnitude, doubled)
    signed = b.select(b.icmp_unsigned("<", codes, e.ivec(8)), twice, b.sub(ir.Constant(IVEC, [0] * LANES), twice))
    return b.sitofp(signed, VEC)
