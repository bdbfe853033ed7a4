"""Vector code for the CPU's attention kernel, as Numba intrinsics that emit LLVM IR.

Numba's own loops leave it to LLVM to find vectors, and it finds poor ones here. These say which values stay in
registers: a tile's accumulators, 16 lanes of float32 each (LLVM splits them where registers are narrower).

All addresses are int64. "Groups" are 16 tokens of a page, as `LaneKVPool` lays them out; `ROWS` are query rows. What is
in the 4 bytes of a lane, a mode says:

- "f32": float32
- "bf16": bfloat16, widened to float32 in registers
- "bf16dot": bfloat16, multiplied in pairs by the processor (AVX512_BF16)
- "f16": float16, widened to float32 in registers
- "int8": codes in [-128, 127], to be multiplied with a scale for each token afterwards
- "int4": two codes in [0, 15] a byte, of component j and of j + half of all; a scale and a zero for each token
- "fp8_e4m3": a sign, 4 bits of exponent and 3 of fraction; what is read is 1 / `UNITS` of the value
- "fp8_e5m2": the upper half of a float16
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
MODES = ("f32", "bf16", "bf16dot", "f16")  # of KV, and of the weights of linear layers
CODE_MODES = ("int8", "int4", "fp8_e4m3", "fp8_e5m2")  # of KV alone
ALL_MODES = MODES + CODE_MODES
UNITS = {"fp8_e4m3": 256.0}  # the exponents' biases of e4m3 and float16 differ by 8

F32, I32, I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
VEC, IVEC = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
FAST = ("reassoc", "contract", "nsz", "arcp")  # not nnan and ninf: NaN must come through, not become anything
EXP2_COEFFICIENTS = tuple(math.log(2) ** n / math.factorial(n) for n in range(8))
LOG2_E = 1.4426950408889634


class _BFloat(ir.Type):  # type: ignore[misc]  # llvmlite has no such type of its own
    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_BFLOAT = _BFloat()


@cache
def best_bf16_mode() -> str:
    """The fastest mode for bfloat16 on this processor."""
    return "bf16dot" if llvm.get_host_cpu_features().get("avx512bf16", False) else "bf16"


@cache
def can_widen_f16() -> bool:
    """Whether the processor converts float16 itself."""
    features = llvm.get_host_cpu_features()
    return bool(features.get("f16c", False) or features.get("neon", False) or features.get("fullfp16", False))


class _Emitter:
    """An IR builder with the few operations on vectors that the tiles need."""

    def __init__(self, builder: Any) -> None:
        self.b = builder

    def pointer(self, address: Any, offset: Any, kind: Any) -> Any:
        return self.b.inttoptr(self.b.add(address, offset), kind.as_pointer())

    def load(self, address: Any, offset: Any, kind: Any, align: int = 4) -> Any:
        return self.b.load(self.pointer(address, offset, kind), align=align)

    def store(self, value: Any, address: Any, offset: Any, align: int = 4) -> None:
        self.b.store(value, self.pointer(address, offset, value.type), align=align)

    def const(self, value: int) -> Any:
        return ir.Constant(I64, value)

    def splat(self, scalar: Any) -> Any:
        """A vector of `scalar` in every lane."""
        kind = ir.VectorType(scalar.type, LANES)
        one = self.b.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(I32, 0))
        return self.b.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(IVEC, [0] * LANES))

    def vec(self, value: float) -> Any:
        return ir.Constant(VEC, [value] * LANES)

    def ivec(self, value: int) -> Any:
        return ir.Constant(IVEC, [value] * LANES)

    def call(self, name: str, kind: Any, *args: Any) -> Any:
        function = cgutils.get_or_insert_function(
            self.b.module, ir.FunctionType(kind, [arg.type for arg in args]), name
        )
        return self.b.call(function, args)

    def load_bf16(self, address: Any, offset: Any) -> Any:
        """16 bfloat16 as float32."""
        short = self.load(address, offset, ir.VectorType(ir.IntType(16), LANES), 2)
        return self.b.bitcast(self.b.shl(self.b.zext(short, IVEC), self.ivec(16)), VEC)

    def inside(self, first_lane: Any, low: Any, high: Any) -> Any:
        """Which of the 16 numbers from `first_lane` on lie in [low, high)."""
        b = self.b
        low32, high32 = (self.splat(b.trunc(bound, I32)) for bound in (low, high))
        position = b.add(self.splat(b.trunc(first_lane, I32)), ir.Constant(IVEC, list(range(LANES))))
        return b.and_(b.icmp_signed(">=", position, low32), b.icmp_signed("<", position, high32))

    def fma(self, x: Any, y: Any, acc: Any) -> Any:
        return self.call("llvm.fma.v16f32", VEC, x, y, acc)

    def dot(self, acc: Any, pairs: Any, other: Any) -> Any:
        """acc + both products of each lane's pair of bfloat16; the pairs come as <16 x i32>."""
        kind = ir.VectorType(_BFLOAT, 2 * LANES)
        return self.call(
            "llvm.x86.avx512bf16.dpbf16ps.512", VEC, acc, self.b.bitcast(pairs, kind), self.b.bitcast(other, kind)
        )

    def prefetch(self, address: Any, offset: Any, locality: int) -> None:
        pointer = self.pointer(address, offset, ir.IntType(8))
        function = cgutils.get_or_insert_function(
            self.b.module, ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32]), "llvm.prefetch.p0"
        )
        self.b.call(function, [pointer, ir.Constant(I32, 0), ir.Constant(I32, locality), ir.Constant(I32, 1)])

    def widen(self, pairs: Any, mode: str) -> tuple[Any, Any]:
        """The first and the second values, as float32, of <16 x i32> pairs of 16-bit values."""
        return self.value(pairs, mode, 0), self.value(pairs, mode, 1)

    def value(self, raw: Any, mode: str, i: int) -> Any:
        """Value i of each lane of `raw`, as float32; lanes of "f32" and "bf16dot" are taken as they are."""
        b = self.b
        if mode == "bf16":
            return b.bitcast(b.and_(raw, self.ivec(-65536)) if i else b.shl(raw, self.ivec(16)), VEC)
        if mode == "f16":
            halves = b.bitcast(raw, ir.VectorType(ir.HalfType(), 2 * LANES))
            pick = ir.Constant(IVEC, list(range(i, 2 * LANES, 2)))
            return b.fpext(b.shuffle_vector(halves, ir.Constant(halves.type, ir.Undefined), pick), VEC)
        if mode == "int8":
            return b.sitofp(b.ashr(b.shl(raw, self.ivec(24 - 8 * i)), self.ivec(24)), VEC)
        if mode == "int4":
            part, byte = divmod(i, 4)
            return b.sitofp(b.and_(b.lshr(raw, self.ivec(8 * byte + 4 * part)), self.ivec(15)), VEC)
        if mode in ("fp8_e4m3", "fp8_e5m2"):
            odd_bytes = b.and_(raw if i % 2 else b.shl(raw, self.ivec(8)), self.ivec(-0x00FF0100))  # 0xFF00FF00
            halves = odd_bytes if mode == "fp8_e5m2" else self._halves_of_e4m3(odd_bytes)
            return self.value(halves, "f16", i // 2)
        return raw

    def _halves_of_e4m3(self, odd_bytes: Any) -> Any:
        """float16 of 1 / 256 of the values whose bits are bytes 1 and 3 of each lane, the others being 0."""
        b = self.b
        magnitude = b.and_(b.lshr(odd_bytes, self.ivec(1)), self.ivec(0x3F803F80))
        nan = b.and_(b.add(magnitude, self.ivec(0x00800080)), self.ivec(0x40004000))  # only all ones carry
        return b.or_(b.or_(magnitude, nan), b.and_(odd_bytes, self.ivec(-0x7FFF8000)))  # 0x80008000

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

    def sum_lanes(self, x: Any) -> Any:
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
        b = self.b
        magnitude = self.call("llvm.fabs.v16f32", VEC, x)
        e = self.exp2(b.fmul(magnitude, self.vec(-2 * LOG2_E)))
        value = b.fdiv(b.fsub(self.vec(1.0), e), b.fadd(self.vec(1.0), e))
        return self.call("llvm.copysign.v16f32", VEC, value, x)

    @contextmanager
    def loop(self, count: Any) -> Iterator[Any]:
        with cgutils.for_range(self.b, count) as at:
            yield at.index

    def variables(self, count: int, start: Callable[[int], Any]) -> list[Any]:
        """Vectors that change within loops and end up in registers."""
        slots = [cgutils.alloca_once(self.b, VEC) for _ in range(count)]
        for i, slot in enumerate(slots):
            self.b.store(start(i), slot)
        return slots


class Tile(NamedTuple):
    """What is known of a tile at compile time.

    Compiled code gets it as `shape`: tuples whose lengths, and so whose types, are the numbers. (Functions that differ
    in a type are cached on disk; functions made in a function that differ in a value of its are not.)
    """

    rows: int
    groups: int
    vectors: int
    mode: str

    @property
    def shape(self) -> tuple[tuple[int, ...], ...]:
        """As compiled code gets it."""
        numbers = (self.rows, self.groups, self.vectors, 1 + ALL_MODES.index(self.mode))
        return tuple((0,) * number for number in numbers)

    @classmethod
    def of_type(cls, shape: Any) -> Tile:
        """From the Numba type of a shape."""
        rows, groups, vectors, mode = (kind.count for kind in shape)
        return cls(rows, groups, vectors, ALL_MODES[mode - 1])

    @property
    def width(self) -> int:
        """Components of a token's K, or tokens of V, whose bytes share a lane's 4."""
        return 1 if self.mode == "f32" else 4 if self.mode in CODE_MODES else 2

    @property
    def parts(self) -> int:
        """Values in each of them: those of int4 come from so many parts of the components."""
        return 2 if self.mode == "int4" else 1

    @property
    def values(self) -> int:
        """Values that a lane is taken as; pairs that the processor multiplies itself are one."""
        return 1 if self.mode == "bf16dot" else self.width * self.parts


@intrinsic
def score_tile(  # type: ignore[no-untyped-def]
    typing, k, k_next, k_step, v, v_lines, q, scores, scores_stride, num_steps, shape
):
    """scores[r, 16 * p + lane] = <q_r, k of that token>, for the tile's groups p of 16 tokens.

    k, k_next, v: addresses of the groups' K, and of K that comes next and of V, to be prefetched, int64 [GROUPS]
    v_lines: lines of 64 bytes of V to be prefetched with each step
    k_step: bytes from one step to the next of K; a step is 4 bytes of each of 16 tokens
    q: the rows' queries [num_steps, values, ROWS], 4 bytes each (a pair in "bf16dot"), for the values of each step
    """
    tile = Tile.of_type(shape)
    num_rows, num_groups, mode_name = tile.rows, tile.groups, tile.mode

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = _Emitter(builder)
        k_array, k_next_array, step, v_array, lines, q_address, out, out_stride, steps = args[:9]
        k_at = [e.load(k_array, e.const(8 * p), I64, 8) for p in range(num_groups)]
        next_at = [e.load(k_next_array, e.const(8 * p), I64, 8) for p in range(num_groups)]
        v_at = [e.load(v_array, e.const(8 * p), I64, 8) for p in range(num_groups)]
        acc = e.variables(num_rows * num_groups, lambda i: e.vec(0.0))
        with e.loop(steps) as d:
            at = builder.mul(d, step)
            q_at = builder.mul(d, e.const(4 * num_rows * tile.values))
            raw = []
            first_line = builder.mul(d, lines)
            with e.loop(lines) as line:
                v_offset = builder.mul(builder.add(first_line, line), e.const(64))
                for p in range(num_groups):
                    e.prefetch(v_at[p], v_offset, 2)
            for p in range(num_groups):
                e.prefetch(next_at[p], at, 3)
                raw.append(e.load(k_at[p], at, VEC if mode_name == "f32" else IVEC))
            for i in range(tile.values):
                keys = [e.value(lanes, mode_name, i) for lanes in raw]
                for r in range(num_rows):
                    offset = builder.add(q_at, e.const(4 * (i * num_rows + r)))
                    query = e.splat(e.load(q_address, offset, I32 if mode_name == "bf16dot" else F32))
                    for p in range(num_groups):
                        slot = acc[r * num_groups + p]
                        old = builder.load(slot)
                        if mode_name == "bf16dot":
                            builder.store(e.dot(old, keys[p], query), slot)
                        else:
                            builder.store(e.fma(keys[p], query, old), slot)
        for r in range(num_rows):
            row = builder.mul(out_stride, e.const(r))
            for p in range(num_groups):
                e.store(builder.load(acc[r * num_groups + p]), out, builder.add(row, e.const(64 * p)))
        return context.get_dummy_value()

    return types.void(k, k_next, k_step, v, v_lines, q, scores, scores_stride, num_steps, shape), codegen


@intrinsic
def value_tile(  # type: ignore[no-untyped-def]
    typing, v, v_step, num_tokens, p, p_stride, acc, acc_stride, rescale, shape
):
    """acc[r, :] = acc[r, :] * rescale[r] + sum over tokens t of p[r, t] * v[t, :], for 16 * VECTORS components.

    v: addresses of the groups' V at the first component, int64 [ceil(num_tokens / 16)]
    v_step: bytes from the tokens that share 4 bytes to the next
    p: float32 [ROWS, ...], or bfloat16 in "bf16dot", rows `p_stride` bytes apart
    acc: float32 [ROWS, parts, ...], rows `acc_stride` bytes apart; in "int4" both parts' components are added to
    rescale: float32 [ROWS]
    """
    tile = Tile.of_type(shape)
    num_rows, num_vectors, mode_name = tile.rows, tile.vectors, tile.mode
    width, per_row = tile.width, tile.vectors * tile.parts
    p_bytes = 2 if mode_name == "bf16dot" else 4

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = _Emitter(builder)
        v_array, step, tokens, p_address, p_row, acc_address, acc_row, rescale_address = args[:8]

        def accumulator(i: int) -> tuple[Any, Any]:
            (r, c), part_bytes = divmod(i, per_row), builder.sdiv(acc_row, e.const(tile.parts))
            part, c = divmod(c, num_vectors)
            at_part = builder.add(builder.mul(acc_row, e.const(r)), builder.mul(part_bytes, e.const(part)))
            return acc_address, builder.add(at_part, e.const(64 * c))

        def start(i: int) -> Any:
            factor = e.splat(e.load(rescale_address, e.const(4 * (i // per_row)), F32))
            return builder.fmul(e.load(*accumulator(i), VEC), factor)

        sums = e.variables(num_rows * per_row, start)

        def add(v_at: Any, v_offset: Any, p_offset: Any, keep: Any | None) -> None:
            """Add `width` tokens; of them, those whose bits `keep` has, where it is given."""
            raw = []
            for c in range(num_vectors):
                lanes = e.load(v_at, builder.add(v_offset, e.const(64 * c)), VEC if width == 1 else IVEC)
                raw.append(lanes if keep is None else builder.and_(lanes, keep))
            for i in range(tile.values):
                part, token = divmod(i, width)
                values = [e.value(lanes, mode_name, i) for lanes in raw]
                for r in range(num_rows):
                    at = builder.add(builder.add(builder.mul(p_row, e.const(r)), p_offset), e.const(4 * token))
                    weight = e.splat(e.load(p_address, at, I32 if mode_name == "bf16dot" else F32))
                    for c in range(num_vectors):
                        slot = sums[r * per_row + part * num_vectors + c]
                        old = builder.load(slot)
                        if mode_name == "bf16dot":
                            builder.store(e.dot(old, values[c], weight), slot)
                        else:
                            builder.store(e.fma(values[c], weight, old), slot)

        groups = builder.sdiv(builder.add(tokens, e.const(LANES - 1)), e.const(LANES))
        with e.loop(groups) as group:
            v_at = e.load(v_array, builder.mul(group, e.const(8)), I64, 8)
            first = builder.mul(group, e.const(LANES))
            left = builder.sub(tokens, first)
            whole = builder.icmp_signed("<", left, e.const(LANES))
            count = builder.sdiv(builder.select(whole, left, e.const(LANES)), e.const(width))
            with e.loop(count) as t:
                token = builder.add(first, builder.mul(t, e.const(width)))
                add(v_at, builder.mul(t, step), builder.mul(token, e.const(p_bytes)), None)
        if width > 1:
            rest = builder.srem(tokens, e.const(width))
            with builder.if_then(
                builder.icmp_signed("!=", rest, e.const(0)), likely=False
            ):  # tokens without the others
                first = builder.sub(tokens, rest)
                v_at = e.load(v_array, builder.mul(builder.sdiv(first, e.const(LANES)), e.const(8)), I64, 8)
                word = builder.sdiv(builder.srem(first, e.const(LANES)), e.const(width))
                bits = builder.mul(builder.trunc(rest, I32), ir.Constant(I32, 32 // width))
                keep = builder.sub(builder.shl(ir.Constant(I32, 1), bits), ir.Constant(I32, 1))
                add(v_at, builder.mul(word, step), builder.mul(first, e.const(p_bytes)), e.splat(keep))
        for i, slot in enumerate(sums):
            e.store(builder.load(slot), *accumulator(i))
        return context.get_dummy_value()

    return types.void(v, v_step, num_tokens, p, p_stride, acc, acc_stride, rescale, shape), codegen


@intrinsic
def limit_row(typing, scores, num_vectors, low, high, factor, softcap, inverse_softcap):  # type: ignore[no-untyped-def]
    """Scale (and cap) a row of scores in place, -1e30 outside [low, high); returns the largest.

    score * factor, or softcap * tanh(score * factor * inverse_softcap) where softcap > 0
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = _Emitter(builder)
        address, count, first, last, scale, cap, inverse_cap = args
        (largest,) = e.variables(1, lambda i: e.vec(-1e30))
        factor_vec, cap_vec = e.splat(scale), e.splat(cap)
        inverse_vec = e.splat(inverse_cap)
        has_cap = builder.fcmp_ordered(">", cap, ir.Constant(F32, 0.0))

        def finish(offset: Any, token: Any, value: Any) -> None:
            value = builder.select(e.inside(token, first, last), value, e.vec(-1e30))
            old = builder.load(largest)
            builder.store(builder.select(builder.fcmp_ordered(">", value, old), value, old), largest)
            e.store(value, address, offset)

        with builder.if_else(has_cap) as (capped, plain):
            with capped, e.loop(count) as i:
                offset = builder.mul(i, e.const(64))
                value = builder.fmul(e.load(address, offset, VEC), factor_vec)
                value = builder.fmul(cap_vec, e.tanh(builder.fmul(value, inverse_vec)))
                finish(offset, builder.mul(i, e.const(LANES)), value)
            with plain, e.loop(count) as i:
                offset = builder.mul(i, e.const(64))
                value = builder.fmul(e.load(address, offset, VEC), factor_vec)
                finish(offset, builder.mul(i, e.const(LANES)), value)
        return e.call("llvm.vector.reduce.fmax.v16f32", F32, builder.load(largest))

    signature = types.float32(scores, num_vectors, low, high, factor, softcap, inverse_softcap)
    return signature, codegen


@intrinsic
def exp2_row(typing, scores, weights, num_vectors, largest, shape):  # type: ignore[no-untyped-def]
    """weights = 2**(scores - largest), in bfloat16 in "bf16dot"; returns their sum. May be in place."""
    mode_name = Tile.of_type(shape).mode

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = _Emitter(builder)
        source, target, count, maximum = args[:4]
        maximum_vec = e.splat(maximum)
        (total,) = e.variables(1, lambda i: e.vec(0.0))
        with e.loop(count) as i:
            value = e.exp2(builder.fsub(e.load(source, builder.mul(i, e.const(64)), VEC), maximum_vec))
            if mode_name == "bf16dot":
                bits = builder.bitcast(value, IVEC)
                odd = builder.and_(builder.lshr(bits, e.ivec(16)), e.ivec(1))
                bits = builder.add(builder.add(bits, e.ivec(0x7FFF)), odd)  # round to nearest, ties to even
                short = builder.trunc(builder.lshr(bits, e.ivec(16)), ir.VectorType(ir.IntType(16), LANES))
                e.store(short, target, builder.mul(i, e.const(32)), 2)
                value = builder.bitcast(builder.and_(bits, e.ivec(-65536)), VEC)  # the sum is of what is multiplied
            else:
                e.store(value, target, builder.mul(i, e.const(64)))
            builder.store(builder.fadd(builder.load(total), value), total)
        return e.sum_lanes(builder.load(total))

    return types.float32(scores, weights, num_vectors, largest, shape), codegen


@intrinsic
def scale_scores(typing, scores, scales, to_zeros, query_sum, num_vectors, shape):  # type: ignore[no-untyped-def]
    """scores = scores * scale, + zero * query_sum in "int4", for a row of scores of codes.

    scales: addresses of the scales of each group of 16 tokens, bfloat16 [16], int64 [num_vectors]
    to_zeros: bytes from scales to zeros
    """
    has_zeros = Tile.of_type(shape).mode == "int4"

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = _Emitter(builder)
        address, scales_array, zeros_offset, of_query, count = args[:5]
        with e.loop(count) as i:
            at = e.load(scales_array, builder.mul(i, e.const(8)), I64, 8)
            offset = builder.mul(i, e.const(64))
            value = builder.fmul(e.load(address, offset, VEC), e.load_bf16(at, e.const(0)))
            if has_zeros:
                value = e.fma(e.load_bf16(at, zeros_offset), e.splat(of_query), value)
            e.store(value, address, offset)
        return context.get_dummy_value()

    return types.void(scores, scales, to_zeros, query_sum, num_vectors, shape), codegen


@intrinsic
def scale_weights(typing, weights, scales, to_zeros, low, high, num_vectors, shape):  # type: ignore[no-untyped-def]
    """weights = weights * scale within [low, high), 0 outside; returns the sum of weight * zero, 0 but in "int4".

    Arguments as of `scale_scores`. The scales of tokens outside may be anything.
    """
    has_zeros = Tile.of_type(shape).mode == "int4"

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = _Emitter(builder)
        address, scales_array, zeros_offset, first, last, count = args[:6]
        (total,) = e.variables(1, lambda i: e.vec(0.0))
        with e.loop(count) as i:
            at = e.load(scales_array, builder.mul(i, e.const(8)), I64, 8)
            offset = builder.mul(i, e.const(64))
            weight = e.load(address, offset, VEC)
            inside = e.inside(builder.mul(i, e.const(LANES)), first, last)
            scaled = builder.fmul(weight, e.load_bf16(at, e.const(0)))
            e.store(builder.select(inside, scaled, e.vec(0.0)), address, offset)
            if has_zeros:
                product = builder.fmul(weight, e.load_bf16(at, zeros_offset))
                product = builder.select(inside, product, e.vec(0.0))
                builder.store(builder.fadd(builder.load(total), product), total)
        return e.sum_lanes(builder.load(total))

    return types.float32(weights, scales, to_zeros, low, high, num_vectors, shape), codegen


@intrinsic
def next_number(typing, address):  # type: ignore[no-untyped-def]
    """Take the next number of a counter that threads share, int64 at `address`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], I64.as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(I64, 1), "monotonic")

    return types.int64(address), codegen


@intrinsic
def transpose_words(typing, rows, offset, out):  # type: ignore[no-untyped-def]
    """out[c, i] = word c of row i, for 16 rows and 16 words of 4 bytes; a butterfly of 64 shuffles (Eklundh, 1972).

    rows: addresses of the rows, int64 [16]; the words begin `offset` bytes behind them
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = _Emitter(builder)
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
        e = _Emitter(builder)
        e.store(e.load(args[0], e.const(0), IVEC), args[1], e.const(0))
        return context.get_dummy_value()

    return types.void(source, target), codegen


@intrinsic
def interleave_halves(typing, first, second, out):  # type: ignore[no-untyped-def]
    """out[i] = (first[i], second[i]) for 32 values of 2 bytes at the addresses `first` and `second`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = _Emitter(builder)
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
        e = _Emitter(builder)
        e.store(args[2], args[0], builder.mul(_as_i64(builder, args[1]), e.const(4)))
        return context.get_dummy_value()

    return types.void(address, index, value), codegen


def _loader(size: int, kind: Any) -> Callable[[Any, Any, Any, Any], Any]:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = _Emitter(builder)
        return e.load(args[0], builder.mul(_as_i64(builder, args[1]), e.const(size)), kind, size)

    return codegen


def _as_i64(builder: Any, index: Any) -> Any:
    return index if index.type == I64 else builder.sext(index, I64)


@intrinsic
def product_tile(typing, w, w_stride, x, x_stride, num_steps, out, shape):  # type: ignore[no-untyped-def]
    """out[c, r] = <w_r, x_c> for ROWS rows r of weights and GROUPS rows c of inputs, of one dtype.

    w, x: addresses of the first rows; the strides are bytes from one row to the next
    num_steps: how many times 64 bytes of each row; a row ends with a whole step
    out: float32 [GROUPS, ROWS], in memory for a multiple of 16 numbers
    """
    tile = Tile.of_type(shape)
    num_rows, num_columns, mode_name = tile.rows, tile.groups, tile.mode

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = _Emitter(builder)
        w_address, w_row, x_address, x_row, steps, out_address = args[:6]
        acc = e.variables(num_rows * num_columns, lambda i: e.vec(0.0))
        kind = VEC if mode_name == "f32" else IVEC

        def load_parts(address: Any, stride: Any, row: int, at: Any) -> tuple[Any, ...]:
            raw = e.load(address, builder.add(builder.mul(stride, e.const(row)), at), kind)
            return e.widen(raw, mode_name) if mode_name in ("bf16", "f16") else (raw,)

        with e.loop(steps) as step:
            at = builder.mul(step, e.const(64))
            weights = [load_parts(w_address, w_row, r, at) for r in range(num_rows)]
            # Those of the next tile; a single row is read in order, which the processor foresees itself.
            for r in range(num_rows if num_rows > 1 else 0):
                e.prefetch(w_address, builder.add(builder.mul(w_row, e.const(num_rows + r)), at), 3)
            for c in range(num_columns):
                inputs = load_parts(x_address, x_row, c, at)
                for r in range(num_rows):
                    slot = acc[c * num_rows + r]
                    for weight, value in zip(weights[r], inputs, strict=True):
                        old = builder.load(slot)
                        add = e.dot if mode_name == "bf16dot" else lambda old, w, x: e.fma(w, x, old)
                        builder.store(add(old, weight, value), slot)
        for first in range(0, len(acc), LANES):
            sums = e.sums([builder.load(slot) for slot in acc[first : first + LANES]])
            e.store(sums, out_address, e.const(4 * first))
        return context.get_dummy_value()

    return types.void(w, w_stride, x, x_stride, num_steps, out, shape), codegen


@intrinsic
def store_as(typing, address, index, value, shape):  # type: ignore[no-untyped-def]
    """Set number `index` from `address` on, in the dtype of the shape's mode, to a float32."""
    mode_name = Tile.of_type(shape).mode

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = _Emitter(builder)
        number, size = args[2], 4 if mode_name == "f32" else 2
        if mode_name == "f16":
            number = builder.fptrunc(number, ir.HalfType())
        elif mode_name != "f32":
            bits = builder.bitcast(number, I32)
            odd = builder.and_(builder.lshr(bits, ir.Constant(I32, 16)), ir.Constant(I32, 1))
            bits = builder.add(builder.add(bits, ir.Constant(I32, 0x7FFF)), odd)
            number = builder.trunc(builder.lshr(bits, ir.Constant(I32, 16)), ir.IntType(16))
        e.store(number, args[0], builder.mul(_as_i64(builder, args[1]), e.const(size)), size)
        return context.get_dummy_value()

    return types.void(address, index, value, shape), codegen
