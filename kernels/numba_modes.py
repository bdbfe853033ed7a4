"""The modes of the CPU's kernels: what is in the 4 bytes of a lane, and how it becomes float32.

A new mode is a row of `MODES`, and nothing else: the tiles, the workers and the backend ask the row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from radixkv.kernels import numba_codes, numba_fp4, numba_writers
from radixkv.kernels.numba_emitter import I32, I64, IVEC, LANES, VEC, Emitter
from radixkv.kernels.processor import Processor, this_processor


def _anywhere(processor: Processor) -> bool:
    return True


def _where_f16_is_widened(processor: Processor) -> bool:
    return processor.widens_f16


def _where_pairs_are_multiplied(processor: Processor) -> bool:
    return processor.multiplies_bf16


@dataclass(frozen=True, slots=True, eq=False)
class Mode:
    """How values are kept, and what they are multiplied as.

    Attributes:
        name: what callers choose it by.
        dtype: the name of what is kept: a dtype, or codes as `kv_cache_dtype` names them.
        in_4_bytes: components of a token's K, or tokens of V, whose bytes share a lane's 4.
        read: makes value i of each lane's 4 bytes, as float32 (or what `multiplies_pairs` takes), of the raw lanes.
        write: the compiled function that stores new KV in lanes: values or, where it `encodes`, float32.
        encodes: whether `write` makes codes and scales of float32 itself.
        parts: values in each byte; several come from as many parts of the components.
        num_scales: bfloat16 numbers of each token and head: none, a scale, or a scale and a zero.
        block: components that share a scale of float8 e4m3; 0 where none do.
        unit: what is read is 1 / `unit` of the value.
        multiplies_pairs: whether the processor multiplies two values of a lane itself, and adds both products.
        narrow: makes a value to keep of a float32; None where the kernels only read.
        runs_on: whether a processor has what it needs.
    """

    name: str
    dtype: str
    in_4_bytes: int
    read: Callable[[Emitter, Any, int], Any]
    write: Any
    encodes: bool = False
    parts: int = 1
    num_scales: int = 0
    block: int = 0
    unit: float = 1.0
    multiplies_pairs: bool = False
    narrow: Callable[[Emitter, Any], Any] | None = None
    runs_on: Callable[[Processor], bool] = _anywhere

    @property
    def values(self) -> int:
        """Values that a lane is taken as; pairs that the processor multiplies itself are one."""
        return 1 if self.multiplies_pairs else self.in_4_bytes * self.parts

    @property
    def lanes(self) -> Any:
        """The LLVM type of raw lanes."""
        return VEC if self.in_4_bytes == 1 else IVEC

    @property
    def bytes_of_weight(self) -> int:
        """Bytes of a factor that V is multiplied with: half of a pair, or a float32."""
        return 2 if self.multiplies_pairs else 4

    @property
    def factor(self) -> Any:
        """The LLVM type of what a value is multiplied with: a pair, or a float32."""
        return I32 if self.multiplies_pairs else ir.FloatType()

    def add_product(self, e: Emitter, slot: Any, values: Any, factors: Any) -> None:
        """slot += values * factors, lane by lane, or pair by pair."""
        old = e.b.load(slot)
        e.b.store(e.dot(old, values, factors) if self.multiplies_pairs else e.fma(values, factors, old), slot)


# -- reading and narrowing ---------------------------------------------------------------------------------------------


def _as_it_is(e: Emitter, raw: Any, i: int = 0) -> Any:
    return raw


def _read_bf16(e: Emitter, raw: Any, i: int) -> Any:
    return e.b.bitcast(e.b.and_(raw, e.ivec(-65536)) if i else e.b.shl(raw, e.ivec(16)), VEC)


def _read_f16(e: Emitter, raw: Any, i: int) -> Any:
    halves = e.b.bitcast(raw, ir.VectorType(ir.HalfType(), 2 * LANES))
    pick = ir.Constant(IVEC, list(range(i, 2 * LANES, 2)))
    return e.b.fpext(e.b.shuffle_vector(halves, ir.Constant(halves.type, ir.Undefined), pick), VEC)


def _read_int8(e: Emitter, raw: Any, i: int) -> Any:
    return e.b.sitofp(e.b.ashr(e.b.shl(raw, e.ivec(24 - 8 * i)), e.ivec(24)), VEC)


def _read_int4(e: Emitter, raw: Any, i: int) -> Any:
    part, byte = divmod(i, 4)
    return e.b.sitofp(e.b.and_(e.b.lshr(raw, e.ivec(8 * byte + 4 * part)), e.ivec(15)), VEC)


def _read_e5m2(e: Emitter, raw: Any, i: int) -> Any:
    return _read_f16(e, _odd_bytes(e, raw, i), i // 2)


def _read_e4m3(e: Emitter, raw: Any, i: int) -> Any:
    """The byte's bits as a float16 of 1 / 256 of its value: the exponents' biases differ by 8."""
    b, odd_bytes = e.b, _odd_bytes(e, raw, i)
    magnitude = b.and_(b.lshr(odd_bytes, e.ivec(1)), e.ivec(0x3F803F80))
    nan = b.and_(b.add(magnitude, e.ivec(0x00800080)), e.ivec(0x40004000))  # only all ones carry
    halves = b.or_(b.or_(magnitude, nan), b.and_(odd_bytes, e.ivec(-0x7FFF8000)))  # 0x80008000
    return _read_f16(e, halves, i // 2)


def _odd_bytes(e: Emitter, raw: Any, i: int) -> Any:
    """Bytes 1 and 3 of each lane, or 0 and 2 in their places where i is even; the other bytes are 0."""
    return e.b.and_(raw if i % 2 else e.b.shl(raw, e.ivec(8)), e.ivec(-0x00FF0100))  # 0xFF00FF00


def _narrow_to_f16(e: Emitter, number: Any) -> Any:
    return e.b.fptrunc(number, ir.HalfType())


def _narrow_to_bf16(e: Emitter, number: Any) -> Any:
    return e.b.trunc(e.b.lshr(e.round_to_bf16(number), ir.Constant(I32, 16)), ir.IntType(16))


# -- the table ---------------------------------------------------------------------------------------------------------

_ROWS = (
    Mode("f32", "float32", 1, _as_it_is, numba_writers.write_lanes_32, narrow=_as_it_is),
    Mode("bf16", "bfloat16", 2, _read_bf16, numba_writers.write_lanes_16, narrow=_narrow_to_bf16),
    Mode(
        "bf16dot",
        "bfloat16",
        2,
        _as_it_is,
        numba_writers.write_lanes_16,
        multiplies_pairs=True,
        narrow=_narrow_to_bf16,
        runs_on=_where_pairs_are_multiplied,
    ),
    Mode(
        "f16",
        "float16",
        2,
        _read_f16,
        numba_writers.write_lanes_16,
        narrow=_narrow_to_f16,
        runs_on=_where_f16_is_widened,
    ),
    # whole numbers in [-128, 127]
    Mode("int8", "int8", 4, _read_int8, numba_codes.write_int8, encodes=True, num_scales=1),
    # two whole numbers in [0, 15] a byte, of component j and of j + half of all
    Mode("int4", "int4", 4, _read_int4, numba_codes.write_int4, encodes=True, parts=2, num_scales=2),
    # two floats of a sign, 2 bits of exponent and 1 of fraction a byte, as in int4
    Mode(
        "fp4",
        "fp4",
        4,
        numba_fp4.read_code,
        numba_codes.write_fp4,
        encodes=True,
        parts=2,
        block=numba_codes.BLOCK,
        unit=float(numba_codes.GLOBAL_SCALE) * numba_fp4.UNIT,
        runs_on=_where_f16_is_widened,
    ),
    # a sign, 4 bits of exponent and 3 of fraction
    Mode(
        "fp8_e4m3",
        "fp8_e4m3",
        4,
        _read_e4m3,
        numba_writers.write_lanes_8,
        unit=256.0,
        runs_on=_where_f16_is_widened,
    ),
    # the upper half of a float16
    Mode("fp8_e5m2", "fp8_e5m2", 4, _read_e5m2, numba_writers.write_lanes_8, runs_on=_where_f16_is_widened),
)

MODES: Mapping[str, Mode] = MappingProxyType({mode.name: mode for mode in _ROWS})
"""Every mode, by name. The order is part of `Tile.shape`."""


@cache
def mode_for(dtype: str) -> str | None:
    """The fastest mode for what is kept as `dtype`; None if this processor has none."""
    able = [mode for mode in _ROWS if mode.dtype == dtype and mode.runs_on(this_processor())]
    return max(able, key=lambda mode: mode.multiplies_pairs).name if able else None


class Tile(NamedTuple):
    """What is known of a tile at compile time.

    Compiled code gets it as `shape`: tuples whose lengths, and so whose types, are the numbers. (Functions that differ
    in a type are cached on disk; functions made in a function that differ in a value of its are not.)

    Attributes:
        rows: query rows, or rows of weights.
        groups: groups of 16 tokens, or tokens of a linear layer.
        vectors: vectors of V's components.
        mode: how K and V, or weights, are kept.
        sums: vectors of sums that stay in registers at once; rows that have more are taken in turns.
    """

    rows: int
    groups: int
    vectors: int
    mode: Mode
    sums: int

    @property
    def shape(self) -> tuple[tuple[int, ...], ...]:
        """As compiled code gets it."""
        numbers = (self.rows, self.groups, self.vectors, 1 + _ROWS.index(self.mode), self.sums)
        return tuple((0,) * number for number in numbers)

    @classmethod
    def of_type(cls, shape: Any) -> Tile:
        """From the Numba type of a shape."""
        rows, groups, vectors, mode, sums = (kind.count for kind in shape)
        return cls(rows, groups, vectors, _ROWS[mode - 1], sums)

    def turns(self, sums_of_row: int) -> list[range]:
        """The rows in turns, as even as can be, whose sums stay in registers, where each has so many.

        >>> Tile(8, 1, 1, MODES["f32"], sums=6).turns(1)
        [range(0, 4), range(4, 8)]
        """
        num_turns = -(-self.rows // max(self.sums // sums_of_row, 1))
        size = -(-self.rows // num_turns)
        return [range(first, min(first + size, self.rows)) for first in range(0, self.rows, size)]


@intrinsic
def in_4_bytes_of(typing, shape):  # type: ignore[no-untyped-def]
    """What the mode of a shape has for `in_4_bytes`: a constant of the compiled code."""
    value = Tile.of_type(shape).mode.in_4_bytes

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(I64, value)

    return types.int64(shape), codegen
