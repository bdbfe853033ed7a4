"""The scales that blocks of components share, where the tiles of attention multiply them in; other modes have none.

They lie [blocks, page_size] for each head of a page, a byte each. Byte j of a vector holds one component of each part:
those numbered j, j + dim / parts, ...
"""

from __future__ import annotations

from typing import Any

from radixkv.kernels.numba_emitter import I64, LANES, Emitter
from radixkv.kernels.numba_fp4 import read_scale, read_scales
from radixkv.kernels.numba_modes import Mode


class KeyScales:
    """Those of K, for a tile's groups of 16 tokens.

    Args:
        step: bytes from one step of K to the next; a step is 4 bytes of each token of a page.
        num_steps: of a vector.
        groups: address of the addresses of each group's scales.
    """

    def __init__(self, e: Emitter, mode: Mode, step: Any, num_steps: Any, groups: Any) -> None:
        self._e, self._mode, self._step, self._num_steps, self._groups = e, mode, step, num_steps, groups

    def scale(self, keys: list[Any], part: int, step: Any) -> list[Any]:
        """Vectors of one component of each group, in step number `step`, times their scales."""
        e, b, mode = self._e, self._e.b, self._mode
        if not mode.block:
            return keys
        component = b.mul(b.add(step, b.mul(self._num_steps, e.const(part))), e.const(mode.in_4_bytes))
        offset = b.mul(_block_of(e, mode, component), b.sdiv(self._step, e.const(4)))
        groups = [e.load(self._groups, e.const(8 * p), I64, 8) for p in range(len(keys))]
        return [b.fmul(key, read_scales(e, group, offset)) for key, group in zip(keys, groups, strict=True)]


class ValueScales:
    """Those of V, for one token after another.

    Args:
        v_step: bytes from the tokens that share 4 bytes to the next.
        groups: address of the addresses of each group's scales.
        block_bytes: from the scales of one block to those of the next.
        first: the tile's first component, of the first part.
    """

    def __init__(self, e: Emitter, mode: Mode, v_step: Any, groups: Any, block_bytes: Any, first: Any) -> None:
        self._e, self._mode, self._groups, self._block_bytes, self._first = e, mode, groups, block_bytes, first
        self._v_step = v_step

    def scale(self, vectors: list[Any], part: int, token: Any) -> list[Any]:
        """Vectors of the tile's components, times the scales of a token. Each half of a vector is of one block."""
        e, b, mode = self._e, self._e.b, self._mode
        if not mode.block:
            return vectors
        of_part = b.sdiv(self._v_step, e.const(4))  # components
        start = b.add(self._first, b.mul(of_part, e.const(part)))
        last = b.sub(_block_of(e, mode, b.mul(of_part, e.const(mode.parts))), e.const(1))
        group = e.load(self._groups, b.mul(b.sdiv(token, e.const(LANES)), e.const(8)), I64, 8)
        at = b.add(group, b.srem(token, e.const(LANES)))

        def scale_from(component: int) -> Any:
            block = _block_of(e, mode, b.add(start, e.const(component)))
            return read_scale(e, at, b.mul(e.smaller(block, last), self._block_bytes))  # vectors reach beyond the last

        halves = [[scale_from(c * LANES + half) for half in (0, LANES // 2)] for c in range(len(vectors))]
        return [b.fmul(vector, e.halves(*scales)) for vector, scales in zip(vectors, halves, strict=True)]


def _block_of(e: Emitter, mode: Mode, component: Any) -> Any:
    return e.b.sdiv(component, e.const(mode.block))
