"""The inner loop of linear layers over a few tokens, as a Numba intrinsic that keeps all its sums in registers."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from radixkv.kernels.numba_emitter import F32, IVEC, LANES, VEC, Emitter
from radixkv.kernels.numba_modes import Mode, Tile


@intrinsic
def product_tile(typing, w, w_stride, x, x_stride, num_steps, out, shape):  # type: ignore[no-untyped-def]
    """out[c, r] = <w_r, x_c> for ROWS rows r of weights and GROUPS rows c of inputs, of one dtype.

    w, x: addresses of the first rows; the strides are bytes from one row to the next
    num_steps: how many times 64 bytes of each row; a row ends with a whole step
    out: float32 [GROUPS, ROWS], in memory for a multiple of 16 numbers

    A sum is kept in a vector of 16 lanes cut into VECTORS parts, which are added up as they come: where registers hold
    8 lanes, two parts let as many sums stay in registers as there are registers.
    """
    tile = Tile.of_type(shape)
    num_rows, num_columns, parts, mode = tile.rows, tile.groups, tile.vectors, tile.mode

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        w_address, w_row, x_address, x_row, steps, out_address = args[:6]
        acc = _sums(e, num_rows * num_columns, LANES // parts)

        def load_values(address: Any, stride: Any, row: int, at: Any) -> list[Any]:
            raw = e.load(address, builder.add(builder.mul(stride, e.const(row)), at), mode.lanes)
            return [mode.read(e, raw, i) for i in range(mode.values)]

        with e.loop(steps) as step:
            at = builder.mul(step, e.const(64))
            weights = [load_values(w_address, w_row, r, at) for r in range(num_rows)]
            # Those of the next tile; a single row is read in order, which the processor foresees itself.
            for r in range(num_rows if num_rows > 1 else 0):
                e.prefetch(w_address, builder.add(builder.mul(w_row, e.const(num_rows + r)), at), 3)
            for c in range(num_columns):
                inputs = load_values(x_address, x_row, c, at)
                for r in range(num_rows):
                    for weight, value in zip(weights[r], inputs, strict=True):
                        _add_product(e, mode, acc[c * num_rows + r], weight, value, parts)
        for first in range(0, len(acc), LANES):
            sums = e.sums([_widened(e, builder.load(slot), parts) for slot in acc[first : first + LANES]])
            e.store(sums, out_address, e.const(4 * first))
        return context.get_dummy_value()

    return types.void(w, w_stride, x, x_stride, num_steps, out, shape), codegen


def _sums(e: Emitter, count: int, lanes: int) -> list[Any]:
    """Slots for sums of `lanes` lanes, which are zero."""
    kind = ir.VectorType(F32, lanes)
    slots = [cgutils.alloca_once(e.b, kind) for _ in range(count)]
    for slot in slots:
        e.b.store(ir.Constant(kind, [0.0] * lanes), slot)
    return slots


def _add_product(e: Emitter, mode: Mode, slot: Any, weight: Any, value: Any, parts: int) -> None:
    """slot += weight * value, part by part."""
    if parts == 1:
        mode.add_product(e, slot, weight, value)
        return
    lanes = LANES // parts
    for part in range(parts):
        pick = ir.Constant(ir.VectorType(ir.IntType(32), lanes), list(range(part * lanes, (part + 1) * lanes)))
        one, other = (e.b.shuffle_vector(x, ir.Constant(VEC, ir.Undefined), pick) for x in (weight, value))
        e.b.store(e.call(f"llvm.fma.v{lanes}f32", one.type, one, other, e.b.load(slot)), slot)


def _widened(e: Emitter, x: Any, parts: int) -> Any:
    """x in 16 lanes, the others of which are zero."""
    if parts == 1:
        return x
    lanes = LANES // parts
    zeros = ir.Constant(x.type, [0.0] * lanes)
    return e.b.shuffle_vector(x, zeros, ir.Constant(IVEC, [i if i < lanes else lanes for i in range(LANES)]))
