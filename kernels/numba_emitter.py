"""LLVM IR for vectors: the operations that the CPU's kernels are made of.

Numba's own loops leave it to LLVM to find vectors, and it finds poor ones here. Code that an `Emitter` emits says which
values stay in registers, 16 lanes of float32 or int32 each (LLVM splits them where registers are narrower).

All addresses are int64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba.core import cgutils

LANES = 16

F32, I32, I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
VEC, IVEC = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
FAST = ("reassoc", "contract", "nsz", "arcp")  # not nnan and ninf: NaN must come through, not become anything
EXP2_COEFFICIENTS = tuple(math.log(2) ** n / math.factorial(n) for n in range(8))
LOG2_E = 1.4426950408889634


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat16, which llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_BFLOAT = _BFloat()


class Emitter:
    """An IR builder with the few operations on vectors that the tiles need."""

    def __init__(self, builder: Any) -> None:
        self.b = builder

    # -- constants and memory ----------------------------------------------------------------------------------------

    def const(self, value: int) -> Any:
        """An int64."""
        return ir.Constant(I64, value)

    def vec(self, value: float) -> Any:
        """A vector of `value` in every lane, as float32."""
        return ir.Constant(VEC, [value] * LANES)

    def ivec(self, value: int) -> Any:
        """A vector of `value` in every lane, as int32."""
        return ir.Constant(IVEC, [value] * LANES)

    def splat(self, scalar: Any) -> Any:
        """A vector of `scalar` in every lane."""
        kind = ir.VectorType(scalar.type, LANES)
        one = self.b.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(I32, 0))
        return self.b.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(IVEC, [0] * LANES))

    def pointer(self, address: Any, offset: Any, kind: Any) -> Any:
        """A pointer to a `kind`, `offset` bytes after `address`."""
        return self.b.inttoptr(self.b.add(address, offset), kind.as_pointer())

    def load(self, address: Any, offset: Any, kind: Any, align: int = 4) -> Any:
        """The `kind` that lies `offset` bytes after `address`."""
        return self.b.load(self.pointer(address, offset, kind), align=align)

    def store(self, value: Any, address: Any, offset: Any, align: int = 4) -> None:
        """Put `value` into memory, `offset` bytes after `address`."""
        self.b.store(value, self.pointer(address, offset, value.type), align=align)

    def load_bf16(self, address: Any, offset: Any) -> Any:
        """16 bfloat16 as float32."""
        short = self.load(address, offset, ir.VectorType(ir.IntType(16), LANES), 2)
        return self.b.bitcast(self.b.shl(self.b.zext(short, IVEC), self.ivec(16)), VEC)

    def prefetch(self, address: Any, offset: Any, locality: int) -> None:
        """Ask for the line of the cache `offset` bytes after `address`; a higher locality keeps it nearer."""
        pointer = self.pointer(address, offset, ir.IntType(8))
        function = cgutils.get_or_insert_function(
            self.b.module, ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32]), "llvm.prefetch.p0"
        )
        self.b.call(function, [pointer, ir.Constant(I32, 0), ir.Constant(I32, locality), ir.Constant(I32, 1)])

    # -- arithmetic --------------------------------------------------------------------------------------------------

    def call(self, name: str, kind: Any, *args: Any) -> Any:
        """The result of LLVM's intrinsic `name`, a `kind`."""
        function = cgutils.get_or_insert_function(
            self.b.module, ir.FunctionType(kind, [arg.type for arg in args]), name
        )
        return self.b.call(function, args)

    def inside(self, first_lane: Any, low: Any, high: Any) -> Any:
        """True in the lanes whose number, counted from `first_lane` in the first, lies in [low, high)."""
        b = self.b
        low32, high32 = (self.splat(b.trunc(bound, I32)) for bound in (low, high))
        position = b.add(self.splat(b.trunc(first_lane, I32)), ir.Constant(IVEC, list(range(LANES))))
        return b.and_(b.icmp_signed(">=", position, low32), b.icmp_signed("<", position, high32))

    def fma(self, x: Any, y: Any, acc: Any) -> Any:
        """x * y + acc, rounded once."""
        return self.call("llvm.fma.v16f32", VEC, x, y, acc)

    def dot(self, acc: Any, pairs: Any, other: Any) -> Any:
        """acc + both products of each lane's pair of bfloat16; the pairs come as <16 x i32>."""
        kind = ir.VectorType(_BFLOAT, 2 * LANES)
        return self.call(
            "llvm.x86.avx512bf16.dpbf16ps.512", VEC, acc, self.b.bitcast(pairs, kind), self.b.bitcast(other, kind)
        )

    def table(self, name: str, values: Sequence[float]) -> Any:
        """The address of a constant table of float32 in the compiled code."""
        constant = ir.Constant(ir.ArrayType(F32, len(values)), list(values))
        kept = self.b.module.globals.get(name) or cgutils.global_constant(self.b.module, name, constant)
        return self.b.ptrtoint(kept, I64)

    def halves(self, first: Any, second: Any) -> Any:
        """A vector of `first` in its lower lanes and `second` in its upper ones."""
        lanes = [0] * (LANES // 2) + [LANES] * (LANES // 2)
        return self.b.shuffle_vector(self.splat(first), self.splat(second), ir.Constant(IVEC, lanes))

    def lookup(self, table: Sequence[float], indices: Any) -> Any:
        """What each lane's lower 4 bits point to in a table of 16 numbers; for registers of 16 lanes alone."""
        return self.call("llvm.x86.avx512.permvar.sf.512", VEC, ir.Constant(VEC, list(table)), indices)

    def lookup_bytes(self, table: Sequence[int], indices: Any) -> Any:
        """What each byte of 16 lanes, in [0, 16), points to in a table of 16 bytes; for x86 with AVX2 alone."""
        kind, halves = ir.VectorType(ir.IntType(8), 32), (range(32), range(32, 64))
        whole = self.b.bitcast(indices, ir.VectorType(ir.IntType(8), 64))
        found = [
            self.call(
                "llvm.x86.avx2.pshuf.b",
                kind,
                ir.Constant(kind, list(table) * 2),
                self.b.shuffle_vector(whole, whole, ir.Constant(ir.VectorType(I32, 32), list(half))),
            )
            for half in halves
        ]
        both = ir.Constant(ir.VectorType(I32, 64), list(range(64)))
        return self.b.bitcast(self.b.shuffle_vector(*found, both), IVEC)

    def smaller(self, x: Any, y: Any) -> Any:
        """The smaller one of two integers."""
        return self.b.select(self.b.icmp_signed("<", x, y), x, y)

    def exp2(self, x: Any) -> Any:
        """2**x for x <= 0 to 2e-7: 2**i exactly, times the Taylor series of what is left in [-0.5, 0.5]."""
        b = self.b
        x = b.select(b.fcmp_ordered("<", x, self.vec(-126.0)), self.vec(-126.0), x)
        i = self.call("llvm.floor.v16f32", VEC, b.fadd(x, self.vec(0.5)))
        f = b.fsub(x, i)
        p = self.vec(EXP2_COEFFICIENTS[-1])
        for coefficient in reversed(EXP2_COEFFICIENTS[:-1]):
            p = self.fma(p, f, self.vec(coefficient))
        exponent = b.shl(b.add(b.fptosi(i, IVEC), self.ivec(127)), self.ivec(23))
        return b.fmul(p, b.bitcast(exponent, VEC))

    def round_to_bf16(self, value: Any) -> Any:
        """int32 whose upper halves are `value`, one float32 or a vector, in bfloat16; ties go to even."""
        is_vector = isinstance(value.type, ir.VectorType)
        bits = self.b.bitcast(value, IVEC if is_vector else I32)
        sixteen, one, half = (self.ivec(n) if is_vector else ir.Constant(I32, n) for n in (16, 1, 0x7FFF))
        odd = self.b.and_(self.b.lshr(bits, sixteen), one)
        return self.b.add(self.b.add(bits, half), odd)

    def sum_lanes(self, x: Any) -> Any:
        """The sum over the lanes, a float32."""
        function = cgutils.get_or_insert_function(
            self.b.module, ir.FunctionType(F32, [F32, VEC]), "llvm.vector.reduce.fadd.v16f32"
        )
        return self.b.call(function, [ir.Constant(F32, 0.0), x], fastmath=FAST)

    def sums(self, vectors: list[Any]) -> Any:
        """A vector of the sums over the lanes of each of up to 16 vectors, in order; other lanes mean nothing.

        Neighbours are folded together, halving what is left of each: 15 additions for 16 vectors, not 64.
        """
        kept = LANES  # lanes that are left of each vector
        while kept > 1:
            half, per_vector = kept // 2, LANES // kept
            firsts = [v * kept + i for v in range(per_vector) for i in range(half)]
            lower = firsts + [LANES + lane for lane in firsts]
            upper = [lane + half for lane in lower]
            folded = []
            for i in range(0, len(vectors), 2):
                one = vectors[i]
                other = vectors[i + 1] if i + 1 < len(vectors) else ir.Constant(VEC, ir.Undefined)
                halves = [self.b.shuffle_vector(one, other, ir.Constant(IVEC, lanes)) for lanes in (lower, upper)]
                folded.append(self.b.fadd(*halves, flags=FAST))
            vectors, kept = folded, half
        return vectors[0]

    def tanh(self, x: Any) -> Any:
        """The hyperbolic tangent."""
        b = self.b
        magnitude = self.call("llvm.fabs.v16f32", VEC, x)
        e = self.exp2(b.fmul(magnitude, self.vec(-2 * LOG2_E)))
        value = b.fdiv(b.fsub(self.vec(1.0), e), b.fadd(self.vec(1.0), e))
        return self.call("llvm.copysign.v16f32", VEC, value, x)

    # -- loops -------------------------------------------------------------------------------------------------------

    @contextmanager
    def loop(self, count: Any) -> Iterator[Any]:
        """A loop over [0, count); gives the number of the round."""
        with cgutils.for_range(self.b, count) as at:
            yield at.index

    def variable(self, start: Any) -> Any:
        """A slot for a vector that changes in loops, and holds `start`. LLVM keeps it in registers."""
        slot = cgutils.alloca_once(self.b, VEC)
        self.b.store(start, slot)
        return slot
