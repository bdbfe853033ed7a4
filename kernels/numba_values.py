"""Numba intrinsics over values as a mode keeps them: 16 at a time, widened to float32 and narrowed again."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from radixkv.kernels.numba_emitter import F32, I32, I64, LANES, LOG2_E, VEC, Emitter
from radixkv.kernels.numba_modes import Mode, Tile

SHORTS = ir.VectorType(ir.IntType(16), LANES)
HALVES = ir.VectorType(ir.HalfType(), LANES)


@intrinsic
def load_value(typing, address, index, shape):  # type: ignore[no-untyped-def]
    """Value number `index` from `address` on, as float32."""
    mode = Tile.of_type(shape).mode

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        size = _size(mode)
        index = args[1] if args[1].type == I64 else builder.sext(args[1], I64)
        offset = builder.mul(index, e.const(size))
        if mode.dtype == "float32":
            return e.load(args[0], offset, F32)
        if mode.dtype == "float16":
            return builder.fpext(e.load(args[0], offset, ir.HalfType(), size), F32)
        bits = builder.zext(e.load(args[0], offset, ir.IntType(16), size), I32)
        return builder.bitcast(builder.shl(bits, ir.Constant(I32, 16)), F32)

    return types.float32(address, index, shape), codegen


@intrinsic
def round_value(typing, value, shape):  # type: ignore[no-untyped-def]
    """A float32 as it comes back from being kept."""
    mode = Tile.of_type(shape).mode

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if mode.dtype == "float32":
            return args[0]
        if mode.dtype == "float16":
            return builder.fpext(builder.fptrunc(args[0], ir.HalfType()), F32)
        bits = builder.and_(Emitter(builder).round_to_bf16(args[0]), ir.Constant(I32, -65536))
        return builder.bitcast(bits, F32)

    return types.float32(types.float32, shape), codegen


@intrinsic
def add_vectors(typing, x, added, count, shape):  # type: ignore[no-untyped-def]
    """x += added, for `count` vectors."""
    mode = Tile.of_type(shape).mode

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        with e.loop(args[2]) as i:
            at = builder.mul(i, e.const(LANES * _size(mode)))
            _store(e, mode, builder.fadd(_load(e, mode, args[0], at), _load(e, mode, args[1], at)), args[0], at)
        return context.get_dummy_value()

    return types.void(x, added, count, shape), codegen


@intrinsic
def sum_of_squares(typing, x, count, shape):  # type: ignore[no-untyped-def]
    """The sum of the squares of `count` vectors, a float32."""
    mode = Tile.of_type(shape).mode

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        total = e.variable(e.vec(0.0))
        with e.loop(args[1]) as i:
            value = _load(e, mode, args[0], builder.mul(i, e.const(LANES * _size(mode))))
            builder.store(e.fma(value, value, builder.load(total)), total)
        return e.sum_lanes(builder.load(total))

    return types.float32(x, count, shape), codegen


@intrinsic
def scale_vectors(typing, x, weight, out, factor, count, shape):  # type: ignore[no-untyped-def]
    """out = weight * (x * factor), for `count` vectors; the product in brackets is rounded."""
    mode = Tile.of_type(shape).mode

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        factors = e.splat(args[3])
        with e.loop(args[4]) as i:
            at = builder.mul(i, e.const(LANES * _size(mode)))
            scaled = _rounded(e, mode, builder.fmul(_load(e, mode, args[0], at), factors))
            _store(e, mode, builder.fmul(_load(e, mode, args[1], at), scaled), args[2], at)
        return context.get_dummy_value()

    return types.void(x, weight, out, types.float32, count, shape), codegen


@intrinsic
def gate_vector(typing, gate, up, out, shape):  # type: ignore[no-untyped-def]
    """out = silu(gate) * up, for one vector; silu's value is rounded."""
    mode = Tile.of_type(shape).mode

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        at = e.const(0)
        x = _load(e, mode, args[0], at)
        magnitude = e.call("llvm.fabs.v16f32", VEC, x)
        small = e.exp2(builder.fmul(magnitude, e.vec(-LOG2_E)))  # exp(-|x|), so that nothing overflows
        is_negative = builder.fcmp_ordered("<", x, e.vec(0.0))
        numerator = builder.select(is_negative, builder.fmul(x, small), x)
        silu = _rounded(e, mode, builder.fdiv(numerator, builder.fadd(e.vec(1.0), small)))
        _store(e, mode, builder.fmul(silu, _load(e, mode, args[1], at)), args[2], at)
        return context.get_dummy_value()

    return types.void(gate, up, out, shape), codegen


@intrinsic
def rotate_vectors(typing, x, cos, sin, half_bytes, count, shape):  # type: ignore[no-untyped-def]
    """Turn `count` vectors of x and those half a head further, in place; every product and sum is rounded."""
    mode = Tile.of_type(shape).mode

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e, b = Emitter(builder), builder
        x_at, cos_at, sin_at, half, vectors = args[:5]
        with e.loop(vectors) as i:
            low = b.mul(i, e.const(LANES * _size(mode)))
            high = b.add(low, half)
            one, other = _load(e, mode, x_at, low), _load(e, mode, x_at, high)
            products = [
                _rounded(e, mode, b.fmul(value, _load(e, mode, address, at)))
                for value, address, at in (
                    (one, cos_at, low),
                    (b.fneg(other), sin_at, low),
                    (other, cos_at, high),
                    (one, sin_at, high),
                )
            ]
            _store(e, mode, b.fadd(products[0], products[1]), x_at, low)
            _store(e, mode, b.fadd(products[2], products[3]), x_at, high)
        return context.get_dummy_value()

    return types.void(x, cos, sin, half_bytes, count, shape), codegen


def _size(mode: Mode) -> int:
    return 4 // mode.in_4_bytes


def _load(e: Emitter, mode: Mode, address: Any, offset: Any) -> Any:
    """16 values as float32."""
    if mode.dtype == "float32":
        return e.load(address, offset, VEC)
    if mode.dtype == "float16":
        return e.b.fpext(e.load(address, offset, HALVES, 2), VEC)
    return e.load_bf16(address, offset)


def _store(e: Emitter, mode: Mode, value: Any, address: Any, offset: Any) -> None:
    """Keep 16 float32."""
    if mode.dtype == "float32":
        e.store(value, address, offset)
    elif mode.dtype == "float16":
        e.store(e.b.fptrunc(value, HALVES), address, offset, 2)
    else:
        e.store(e.b.trunc(e.b.lshr(e.round_to_bf16(value), e.ivec(16)), SHORTS), address, offset, 2)


def _rounded(e: Emitter, mode: Mode, value: Any) -> Any:
    """16 float32 as they come back from being kept."""
    if mode.dtype == "float32":
        return value
    if mode.dtype == "float16":
        return e.b.fpext(e.b.fptrunc(value, HALVES), VEC)
    return e.b.bitcast(e.b.and_(e.round_to_bf16(value), e.ivec(-65536)), VEC)
