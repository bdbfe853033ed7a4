"""The inner loops of attention on the CPU, as Numba intrinsics that say which sums stay in registers.

All addresses are int64. "Groups" are 16 tokens of a page, as `LaneKVPool` lays them out; `ROWS` are query rows. A
`shape` is that of a `Tile`, whose mode says what is in the 4 bytes of a lane.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from radixkv.kernels.numba_block_scales import KeyScales, ValueScales
from radixkv.kernels.numba_emitter import F32, I32, I64, LANES, VEC, Emitter
from radixkv.kernels.numba_modes import Mode, Tile

NO_SCORE = np.float32(-1e30)  # of a token that a row does not see

CodeGenerator = Callable[[Any, Any, Any, Any], Any]  # what an intrinsic is emitted by


@intrinsic
def score_tile(  # type: ignore[no-untyped-def]
    typing, k, k_next, k_step, v, v_lines, q, scores, scores_stride, num_steps, scales, shape
):
    """scores[r, 16 * p + lane] = <q_r, k of that token>, for the tile's groups p of 16 tokens.

    k, k_next, v: addresses of the groups' K, and of K that comes next and of V, to be prefetched, int64 [GROUPS]
    v_lines: lines of 64 bytes of V to be prefetched with each step
    k_step: bytes from one step to the next of K; a step is 4 bytes of each of 16 tokens
    q: the rows' queries [num_steps, values, ROWS], 4 bytes each: a float32, or a pair where pairs are multiplied
    scales: where blocks of components are scaled, addresses of the groups' scales of K, int64 [GROUPS]
    """
    tile = Tile.of_type(shape)
    num_rows, num_groups, mode = tile.rows, tile.groups, tile.mode

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        k_array, k_next_array, step, v_array, lines, q_address, out, out_stride, steps, scales_array = args[:10]
        k_at = [e.load(k_array, e.const(8 * p), I64, 8) for p in range(num_groups)]
        next_at = [e.load(k_next_array, e.const(8 * p), I64, 8) for p in range(num_groups)]
        v_at = [e.load(v_array, e.const(8 * p), I64, 8) for p in range(num_groups)]
        key_scales = KeyScales(e, mode, step, steps, scales_array)

        def prefetch(d: Any, at: Any) -> None:
            first_line = builder.mul(d, lines)
            with e.loop(lines) as line:
                v_offset = builder.mul(builder.add(first_line, line), e.const(64))
                for p in range(num_groups):
                    e.prefetch(v_at[p], v_offset, 2)
            for p in range(num_groups):
                e.prefetch(next_at[p], at, 3)

        for rows in tile.turns(num_groups):
            acc = {(r, p): e.variable(e.vec(0.0)) for r in rows for p in range(num_groups)}
            with e.loop(steps) as d:
                at = builder.mul(d, step)
                q_at = builder.mul(d, e.const(4 * num_rows * mode.values))
                if rows.start == 0:
                    prefetch(d, at)
                raw = [e.load(address, at, mode.lanes) for address in k_at]
                for i in range(mode.values):
                    keys = [mode.read(e, lanes, i) for lanes in raw]
                    keys = key_scales.scale(keys, i // mode.in_4_bytes, d)
                    for r in rows:
                        offset = builder.add(q_at, e.const(4 * (i * num_rows + r)))
                        query = e.splat(e.load(q_address, offset, mode.factor))
                        for p in range(num_groups):
                            mode.add_product(e, acc[r, p], keys[p], query)
            for (r, p), total in acc.items():
                row = builder.mul(out_stride, e.const(r))
                e.store(builder.load(total), out, builder.add(row, e.const(64 * p)))
        return context.get_dummy_value()

    return types.void(k, k_next, k_step, v, v_lines, q, scores, scores_stride, num_steps, scales, shape), codegen


@intrinsic
def value_tile(  # type: ignore[no-untyped-def]
    typing, v, v_step, num_tokens, p, p_stride, acc, acc_stride, rescale, scales, scales_step, first, k_next, shape
):
    """acc[r, :] = acc[r, :] * rescale[r] + sum over tokens t of p[r, t] * v[t, :], for 16 * VECTORS components.

    v: addresses of the groups' V, int64 [ceil(num_tokens / 16)]
    v_step: bytes from the tokens that share 4 bytes to the next
    p: float32 [ROWS, ...], or bfloat16 where pairs are multiplied, rows `p_stride` bytes apart
    acc: float32 [ROWS, parts, ...], rows `acc_stride` bytes apart; the components of all parts are added to
    rescale: float32 [ROWS]
    scales: where blocks of components are scaled, addresses of the groups' scales of V, int64 [ceil(num_tokens / 16)]
    scales_step: bytes from the scales of one block to those of the next
    first: the first component, of the first part
    k_next: K that is prefetched meanwhile: the address of its groups' addresses, int64 [ceil(num_tokens / 16)], from
        which byte of each group on, and how many lines of 64 bytes with each word of V
    """
    tile = Tile.of_type(shape)
    mode = tile.mode

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        acc_address, acc_row, rescale_address = args[5:8]
        first_byte = builder.mul(args[10], e.const(4))

        def accumulator(r: int, part: int, c: int) -> tuple[Any, Any]:
            part_bytes = builder.sdiv(acc_row, e.const(mode.parts))
            at_part = builder.add(builder.mul(acc_row, e.const(r)), builder.mul(part_bytes, e.const(part)))
            return acc_address, builder.add(at_part, builder.add(first_byte, e.const(64 * c)))

        def start(place: tuple[int, int, int]) -> Any:
            factor = e.splat(e.load(rescale_address, e.const(4 * place[0]), F32))
            return builder.fmul(e.load(*accumulator(*place), VEC), factor)

        for rows in tile.turns(tile.vectors * mode.parts):
            places = itertools.product(rows, range(mode.parts), range(tile.vectors))
            sums = {place: e.variable(start(place)) for place in places}
            ahead = cgutils.unpack_tuple(builder, args[11]) if rows.start == 0 else None
            _add_tokens(e, tile, sums, (*args[:5], first_byte), ValueScales(e, mode, args[1], *args[8:11]), ahead)
            for place, total in sums.items():
                e.store(builder.load(total), *accumulator(*place))
        return context.get_dummy_value()

    addresses_and_steps = (v, v_step, num_tokens, p, p_stride, acc, acc_stride, rescale, scales, scales_step)
    return types.void(*addresses_and_steps, first, k_next, shape), codegen


Sums = dict[tuple[int, int, int], Any]  # of a row, a part of the components and a vector of the tile


def _add_tokens(e: Emitter, tile: Tile, sums: Sums, args: Any, scales: ValueScales, ahead: Any | None) -> None:
    """Add all tokens to `sums`, which are of some rows.

    args: as `value_tile` has them, up to `p_stride`, and the byte of a token's V where the components begin
    ahead: the parts of `k_next` of `value_tile`; None prefetches nothing
    """
    builder, mode, width = e.b, tile.mode, tile.mode.in_4_bytes
    v_array, step, tokens, p_address, p_row, first_byte = args

    def v_of(group: Any) -> Any:
        return builder.add(e.load(v_array, builder.mul(group, e.const(8)), I64, 8), first_byte)

    fetches_by_word = mode.values == 1  # else what is made of a word takes all registers, and a loop in it would spill

    def fetch(group: Any, word: Any | None) -> None:
        """Prefetch the lines that go with a word of V, or with all of a group."""
        if ahead is not None and fetches_by_word == (word is not None):
            k_array, at, lines = ahead
            address = builder.add(e.load(k_array, builder.mul(group, e.const(8)), I64, 8), at)
            if word is None:
                lines = builder.mul(lines, e.const(LANES // width))
            else:
                address = builder.add(address, builder.mul(builder.mul(word, lines), e.const(64)))
            with e.loop(lines) as line:
                e.prefetch(address, builder.mul(line, e.const(64)), 2)

    def add(v_at: Any, word: Any, first_token: Any, keep: Any | None = None) -> None:
        """Add the tokens of one word of V, from `first_token` on; of them, those whose bits `keep` has."""
        offset, p_offset = builder.mul(word, step), builder.mul(first_token, e.const(mode.bytes_of_weight))
        raw = [e.load(v_at, builder.add(offset, e.const(64 * c)), mode.lanes) for c in range(tile.vectors)]
        raw = raw if keep is None else [builder.and_(lanes, keep) for lanes in raw]
        of_word = [builder.add(first_token, e.const(i)) for i in range(width)]
        if keep is not None:  # what lies after the last token may be scaled by NaN
            of_word = [e.smaller(token, builder.sub(tokens, e.const(1))) for token in of_word]
        _add_weighted(e, mode, sums, raw, (p_address, p_row, p_offset), scales, of_word)

    with e.loop(builder.sdiv(builder.add(tokens, e.const(LANES - 1)), e.const(LANES))) as group:
        fetch(group, None)
        v_at = v_of(group)
        first = builder.mul(group, e.const(LANES))
        left = builder.sub(tokens, first)
        is_last = builder.icmp_signed("<", left, e.const(LANES))
        with e.loop(builder.sdiv(builder.select(is_last, left, e.const(LANES)), e.const(width))) as word:
            fetch(group, word)
            add(v_at, word, builder.add(first, builder.mul(word, e.const(width))))
    if width > 1:
        rest = builder.srem(tokens, e.const(width))
        with builder.if_then(builder.icmp_signed("!=", rest, e.const(0)), likely=False):  # a word that is not full
            first = builder.sub(tokens, rest)
            v_at = v_of(builder.sdiv(first, e.const(LANES)))
            word = builder.sdiv(builder.srem(first, e.const(LANES)), e.const(width))
            bits = builder.mul(builder.trunc(rest, I32), ir.Constant(I32, 32 // width))
            keep = builder.sub(builder.shl(ir.Constant(I32, 1), bits), ir.Constant(I32, 1))
            add(v_at, word, first, e.splat(keep))


def _add_weighted(
    e: Emitter,
    mode: Mode,
    sums: Sums,
    raw: list[Any],
    weights: tuple[Any, Any, Any],
    scales: ValueScales,
    tokens: list[Any],
) -> None:
    """Add V of the `tokens` of one word, in `raw` vectors, to each row's sums.

    weights: the address of all weights, bytes from one row to the next, and from a row's first to that of the word
    """
    b, (address, row_bytes, offset) = e.b, weights
    rows = sorted({r for r, _, _ in sums})
    for i in range(mode.values):
        part, token = divmod(i, mode.in_4_bytes)
        values = [mode.read(e, lanes, i) for lanes in raw]
        values = scales.scale(values, part, tokens[token])
        for r in rows:
            at = b.add(b.add(b.mul(row_bytes, e.const(r)), offset), e.const(4 * token))
            weight = e.splat(e.load(address, at, mode.factor))
            for c, vector in enumerate(values):
                mode.add_product(e, sums[r, part, c], vector, weight)


@intrinsic
def limit_row(typing, scores, num_vectors, low, high, factor, softcap, inverse_softcap):  # type: ignore[no-untyped-def]
    """Scale (and cap) a row of scores in place, -1e30 outside [low, high); returns the largest.

    score * factor, or softcap * tanh(score * factor * inverse_softcap) where softcap > 0
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        address, count, first, last, scale, cap, inverse_cap = args
        largest = e.variable(e.vec(float(NO_SCORE)))
        factor_vec, cap_vec = e.splat(scale), e.splat(cap)
        inverse_vec = e.splat(inverse_cap)
        has_cap = builder.fcmp_ordered(">", cap, ir.Constant(F32, 0.0))

        def finish(offset: Any, token: Any, value: Any) -> None:
            value = builder.select(e.inside(token, first, last), value, e.vec(float(NO_SCORE)))
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
def bias_row(typing, scores, biases, num_vectors, own, factor):  # type: ignore[no-untyped-def]
    """scores += (biases - own) * factor, for a row of scores; both are addresses of float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        address, biases_address, count, own_bias, scale = args
        own_vec, factor_vec = e.splat(own_bias), e.splat(scale)
        with e.loop(count) as i:
            offset = builder.mul(i, e.const(64))
            bias = builder.fsub(e.load(biases_address, offset, VEC), own_vec)
            e.store(e.fma(bias, factor_vec, e.load(address, offset, VEC)), address, offset)
        return context.get_dummy_value()

    return types.void(scores, biases, num_vectors, own, factor), codegen


@intrinsic
def exp2_row(typing, scores, weights, num_vectors, largest):  # type: ignore[no-untyped-def]
    """weights = 2**(scores - largest); returns their sum. May be in place."""
    return types.float32(scores, weights, num_vectors, largest), _emit_exp2_row(to_bf16=False)


@intrinsic
def exp2_row_to_bf16(typing, scores, weights, num_vectors, largest):  # type: ignore[no-untyped-def]
    """The same, with weights in bfloat16, for pairs that are multiplied."""
    return types.float32(scores, weights, num_vectors, largest), _emit_exp2_row(to_bf16=True)


def _emit_exp2_row(*, to_bf16: bool) -> CodeGenerator:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        source, target, count, maximum = args[:4]
        maximum_vec = e.splat(maximum)
        total = e.variable(e.vec(0.0))
        with e.loop(count) as i:
            value = e.exp2(builder.fsub(e.load(source, builder.mul(i, e.const(64)), VEC), maximum_vec))
            if to_bf16:
                bits = e.round_to_bf16(value)
                short = builder.trunc(builder.lshr(bits, e.ivec(16)), ir.VectorType(ir.IntType(16), LANES))
                e.store(short, target, builder.mul(i, e.const(32)), 2)
                value = builder.bitcast(builder.and_(bits, e.ivec(-65536)), VEC)  # the sum is of what is multiplied
            else:
                e.store(value, target, builder.mul(i, e.const(64)))
            builder.store(builder.fadd(builder.load(total), value), total)
        return e.sum_lanes(builder.load(total))

    return codegen


@intrinsic
def scale_scores(typing, scores, scales, num_vectors):  # type: ignore[no-untyped-def]
    """scores = scores * scale, for a row of scores of codes.

    scales: addresses of the scales of each group of 16 tokens, bfloat16 [16], int64 [num_vectors]
    """
    return types.void(scores, scales, num_vectors), _emit_scale_scores(has_zeros=False)


@intrinsic
def scale_scores_and_zeros(typing, scores, scales, num_vectors, to_zeros, query_sum):  # type: ignore[no-untyped-def]
    """scores = scores * scale + zero * query_sum; the zeros are `to_zeros` bytes after the scales."""
    return types.void(scores, scales, num_vectors, to_zeros, query_sum), _emit_scale_scores(has_zeros=True)


def _emit_scale_scores(*, has_zeros: bool) -> CodeGenerator:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        address, scales_array, count, *zeros = args
        with e.loop(count) as i:
            at = e.load(scales_array, builder.mul(i, e.const(8)), I64, 8)
            offset = builder.mul(i, e.const(64))
            value = builder.fmul(e.load(address, offset, VEC), e.load_bf16(at, e.const(0)))
            if has_zeros:
                zeros_offset, query_sum = zeros
                value = e.fma(e.load_bf16(at, zeros_offset), e.splat(query_sum), value)
            e.store(value, address, offset)
        return context.get_dummy_value()

    return codegen


@intrinsic
def scale_weights(typing, weights, scales, low, high, num_vectors):  # type: ignore[no-untyped-def]
    """weights = weights * scale within [low, high), 0 outside.

    Arguments as of `scale_scores`. The scales of tokens outside may be anything.
    """
    return types.void(weights, scales, low, high, num_vectors), _emit_scale_weights(has_zeros=False)


@intrinsic
def scale_weights_and_zeros(typing, weights, scales, low, high, num_vectors, to_zeros):  # type: ignore[no-untyped-def]
    """The same; returns the sum of weight * zero within [low, high)."""
    return types.float32(weights, scales, low, high, num_vectors, to_zeros), _emit_scale_weights(has_zeros=True)


def _emit_scale_weights(*, has_zeros: bool) -> CodeGenerator:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder)
        address, scales_array, first, last, count, *to_zeros = args
        total = e.variable(e.vec(0.0))
        with e.loop(count) as i:
            at = e.load(scales_array, builder.mul(i, e.const(8)), I64, 8)
            offset = builder.mul(i, e.const(64))
            weight = e.load(address, offset, VEC)
            inside = e.inside(builder.mul(i, e.const(LANES)), first, last)
            scaled = builder.fmul(weight, e.load_bf16(at, e.const(0)))
            e.store(builder.select(inside, scaled, e.vec(0.0)), address, offset)
            if has_zeros:
                product = builder.fmul(weight, e.load_bf16(at, *to_zeros))
                product = builder.select(inside, product, e.vec(0.0))
                builder.store(builder.fadd(builder.load(total), product), total)
        return e.sum_lanes(builder.load(total)) if has_zeros else context.get_dummy_value()

    return codegen
