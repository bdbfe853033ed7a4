"""Numba intrinsics that move numbers between addresses, which are int64: single ones, and blocks of 4-byte words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from radixkv.kernels.numba_emitter import F32, I32, I64, IVEC, LANES, Emitter
from radixkv.kernels.numba_modes import Tile


@intrinsic
def next_number(typing, address):  # type: ignore[no-untyped-def]
    """Take the next number of a counter that threads share, int64 at `address`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], I64.as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(I64, 1), "monotonic")

    return types.int64(address), codegen


@intrinsic
def call(typing, function, numbers):  # type: ignore[no-untyped-def]
    """Call the compiled function at an address with a tuple of integers of 8 bytes; it returns nothing."""
    assert all(number.bitwidth == 64 for number in numbers), numbers

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [I64] * len(numbers))
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), cgutils.unpack_tuple(builder, args[1]))
        return context.get_dummy_value()

    return types.void(types.int64, numbers), codegen


@intrinsic
def transpose_words(typing, rows, offset, out):  # type: ignore[no-untyped-def]
    """out[c, i] = word c of row i, for 16 rows and 16 words of 4 bytes; a butterfly of 64 shuffles (Eklundh, 1972).

    rows: addresses of the rows, int64 [16]; the words begin `offset` bytes after them
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        row_array, at, target = args
        words = [e.load(e.load(row_array, e.const(8 * i), I64, 8), at, IVEC) for i in range(LANES)]
        for step in (1, 2, 4, 8):
            lower = [lane if not lane & step else LANES + lane - step for lane in range(LANES)]
            upper = [lane + step if not lane & step else LANES + lane for lane in range(LANES)]
            for i in (i for i in range(LANES) if not i & step):
                pair = words[i], words[i | step]
                words[i], words[i | step] = (
                    builder.shuffle_vector(*pair, ir.Constant(IVEC, lanes)) for lanes in (lower, upper)
                )
        for c, vector in enumerate(words):
            e.store(vector, target, e.const(64 * c))
        return context.get_dummy_value()

    return types.void(rows, offset, out), codegen


@intrinsic
def copy_words(typing, source, target):  # type: ignore[no-untyped-def]
    """Copy 16 words of 4 bytes from one address to another."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        e.store(e.load(args[0], e.const(0), IVEC), args[1], e.const(0))
        return context.get_dummy_value()

    return types.void(source, target), codegen


@intrinsic
def interleave_halves(typing, first, second, out):  # type: ignore[no-untyped-def]
    """out[i] = (first[i], second[i]) for 32 values of 2 bytes at the addresses `first` and `second`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        one, other = (e.load(address, e.const(0), IVEC) for address in args[:2])
        even = builder.or_(builder.and_(one, e.ivec(0xFFFF)), builder.shl(other, e.ivec(16)))
        odd = builder.or_(builder.lshr(one, e.ivec(16)), builder.and_(other, e.ivec(-65536)))
        for part in range(2):
            lanes = [half * LANES + part * LANES // 2 + i for i in range(LANES // 2) for half in (0, 1)]
            e.store(builder.shuffle_vector(even, odd, ir.Constant(IVEC, lanes)), args[2], e.const(64 * part))
        return context.get_dummy_value()

    return types.void(first, second, out), codegen


@intrinsic
def load_i64(typing, address, index):  # type: ignore[no-untyped-def]
    """int64 number `index` from `address` on."""
    return types.int64(address, index), _loader(8, I64)


@intrinsic
def load_i32(typing, address, index):  # type: ignore[no-untyped-def]
    """int32 number `index` from `address` on."""
    return types.int32(address, index), _loader(4, I32)


@intrinsic
def load_f32(typing, address, index):  # type: ignore[no-untyped-def]
    """float32 number `index` from `address` on."""
    return types.float32(address, index), _loader(4, F32)


@intrinsic
def store_f32(typing, address, index, value):  # type: ignore[no-untyped-def]
    """Set float32 number `index` from `address` on."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        e.store(args[2], args[0], builder.mul(_as_i64(builder, args[1]), e.const(4)))
        return context.get_dummy_value()

    return types.void(address, index, value), codegen


@intrinsic
def store_as(typing, address, index, value, shape):  # type: ignore[no-untyped-def]
    """Set number `index` from `address` on, kept as the shape's mode says, to a float32."""
    mode = Tile.of_type(shape).mode
    narrow, size = mode.narrow, 4 // mode.in_4_bytes
    assert narrow is not None, mode.name

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        e.store(narrow(e, args[2]), args[0], builder.mul(_as_i64(builder, args[1]), e.const(size)), size)
        return context.get_dummy_value()

    return types.void(address, index, value, shape), codegen


def _loader(size: int, kind: Any) -> Callable[[Any, Any, Any, Any], Any]:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        return e.load(args[0], builder.mul(_as_i64(builder, args[1]), e.const(size)), kind, size)

    return codegen


def _as_i64(builder: Any, index: Any) -> Any:
    return index if index.type == I64 else builder.sext(index, I64)
