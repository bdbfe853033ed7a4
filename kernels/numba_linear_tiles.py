"""The inner loop of linear layers over a few tokens, as a Numba intrinsic that keeps all its sums in registers."""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic

from radixkv.kernels.numba_emitter import LANES, Emitter
from radixkv.kernels.numba_modes import Tile


@intrinsic
def product_tile(typing, w, w_stride, x, x_stride, num_steps, out, shape):  # type: ignore[no-untyped-def]
    """out[c, r] = <w_r, x_c> for ROWS rows r of weights and GROUPS rows c of inputs, of one dtype.

    w, x: addresses of the first rows; the strides are bytes from one row to the next
    num_steps: how many times 64 bytes of each row; a row ends with a whole step
    out: float32 [GROUPS, ROWS], in memory for a multiple of 16 numbers
    """
    tile = Tile.of_type(shape)
    num_rows, num_columns, mode = tile.rows, tile.groups, tile.mode

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        w_address, w_row, x_address, x_row, steps, out_address = args[:6]
        acc = [e.variable(e.vec(0.0)) for _ in range(num_rows * num_columns)]

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
                        mode.add_product(e, acc[c * num_rows + r], weight, value)
        for first in range(0, len(acc), LANES):
            sums = e.sums([builder.load(slot) for slot in acc[first : first + LANES]])
            e.store(sums, out_address, e.const(4 * first))
        return context.get_dummy_value()

    return types.void(w, w_stride, x, x_stride, num_steps, out, shape), codegen
