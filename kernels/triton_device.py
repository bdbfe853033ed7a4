"""The Triton programs that `triton_paged` launches; it says what their arguments are.

A program is one function with all its arguments: Triton compiles it as a whole, and has no records to pass them in.

Scores are in base 2, since a GPU has an instruction for powers of 2: a weight is 2 ** score. A mask of None stands for
none; what is None is known when a kernel is compiled, and so is all that is a `constexpr`.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
TILE_COLUMNS = tl.constexpr(8)  # of the table of tiles
PARTIALS_AT_ONCE = tl.constexpr(8)

# how K and V are kept, `coding` below
PLAIN = tl.constexpr(0)  # as values; or as codes of 8 bits, which are whole numbers, where there are scales
PACKED = tl.constexpr(1)  # two codes of 4 bits in a byte
E4M3 = tl.constexpr(2)  # bytes that are floats of 8 bits
E5M2 = tl.constexpr(3)
PACKED_E2M1 = tl.constexpr(4)  # two floats of 4 bits in a byte, and scales of e4m3 for each BLOCK of components

BLOCK = tl.constexpr(16)
GLOBAL_SCALE = tl.constexpr(0.25)


@triton.jit(do_not_specialize=["num_splits"])
def decode_kernel(
    q,
    q_token_stride,
    q_head_stride,
    k_pages,
    v_pages,
    k_scales,
    v_scales,
    rows,
    first_pages,
    kv_indices,
    kv_starts,
    kv_lens,
    part_indptr,
    sinks,
    key_bias,
    bias_tokens,
    out,
    lse,
    num_splits,
    scale,
    group: tl.constexpr,
    num_kv_heads: tl.constexpr,
    page_size: tl.constexpr,
    k_dim: tl.constexpr,
    v_dim: tl.constexpr,
    block_k: tl.constexpr,
    block_v: tl.constexpr,
    window: tl.constexpr,
    chunk: tl.constexpr,
    softcap: tl.constexpr,
    coding: tl.constexpr,
    dot_dtype: tl.constexpr,
    head_rows: tl.constexpr,
    block_tokens: tl.constexpr,
):
    """Program (heads, split, sequence): KV heads vary fastest, so programs that run together read whole tokens."""
    head_blocks: tl.constexpr = (group + head_rows - 1) // head_rows
    kv_head = tl.program_id(0) // head_blocks
    split = tl.program_id(1)
    i = tl.program_id(2)
    row = tl.load(rows + i).to(tl.int64)
    page_list = kv_indices + tl.load(first_pages + i)
    kv_len = tl.load(kv_lens + i)
    start = _first_visible(tl.load(kv_starts + i), kv_len - 1, window, chunk)
    # whole blocks a split, and at least two, lest many programs each read next to nothing
    split_blocks = tl.maximum(tl.cdiv(tl.cdiv(kv_len - start, block_tokens), num_splits), 2)
    lo = start + split * split_blocks * block_tokens
    hi = tl.minimum(lo + split_blocks * block_tokens, kv_len)

    of_group = tl.program_id(0) % head_blocks * head_rows + tl.arange(0, head_rows)
    in_group = of_group < group
    head = kv_head * group + of_group
    q_rows = _load_rows(q, row * q_token_stride + head * q_head_stride, in_group, k_dim, block_k, dot_dtype)
    position = tl.zeros([head_rows], tl.int32) + tl.maximum(kv_len - 1, 0)
    bias_rows = _bias_rows(key_bias, bias_tokens, tl.where(in_group, head, 0))
    own_bias = _own_bias(bias_rows, position)
    highest = tl.full([head_rows], float("-inf"), tl.float32)  # of the scores, in base 2
    denominator = tl.zeros([head_rows], tl.float32)
    acc = tl.zeros([head_rows, block_v], tl.float32)
    for t in range(lo, hi, block_tokens):
        tokens = t + tl.arange(0, block_tokens)
        inside = tokens < hi
        kv_rows = _kv_rows(page_list, tokens, inside, kv_head, num_kv_heads, page_size)
        k = _load_kv(k_pages, k_scales, kv_rows, inside, k_dim, block_k, coding, dot_dtype)
        bias = _bias(bias_rows, own_bias, tokens, inside)
        scores = _scores(q_rows, k, k_scales, kv_rows, inside, scale, bias, softcap, coding)
        scores = tl.where(inside[None, :], scores, float("-inf"))
        v = _load_kv(v_pages, v_scales, kv_rows, inside, v_dim, block_v, coding, dot_dtype)
        highest, denominator, acc = _add(highest, denominator, acc, scores, v, v_scales, kv_rows, inside, False, coding)

    if part_indptr is None:
        highest, denominator, acc = _add_sinks(highest, denominator, acc, sinks, head, in_group)
        _store_rows(out, (row * num_kv_heads * group + head) * v_dim, acc, denominator, in_group, v_dim, block_v)
    else:
        part = (tl.load(part_indptr + i) + split).to(tl.int64) * num_kv_heads * group + head
        in_use = of_group < tl.where(lo < hi, group, 0)
        _store_rows(out, part * v_dim, acc, denominator, in_use, v_dim, block_v)
        tl.store(lse + part, _natural_lse(highest, denominator), mask=in_group)


@triton.jit
def tile_kernel(
    q,
    q_token_stride,
    q_head_stride,
    k_pages,
    v_pages,
    k_scales,
    v_scales,
    table,
    kv_indices,
    positions,
    members,
    slots,
    sinks,
    key_bias,
    bias_tokens,
    out,
    lse,
    scale,
    group: tl.constexpr,
    num_kv_heads: tl.constexpr,
    page_size: tl.constexpr,
    k_dim: tl.constexpr,
    v_dim: tl.constexpr,
    block_k: tl.constexpr,
    block_v: tl.constexpr,
    window: tl.constexpr,
    chunk: tl.constexpr,
    softcap: tl.constexpr,
    coding: tl.constexpr,
    dot_dtype: tl.constexpr,
    block_rows: tl.constexpr,
    block_tokens: tl.constexpr,
):
    """Program (tile, KV head), the heads varying fastest."""
    kv_head = tl.program_id(0) % num_kv_heads
    tile = table + tl.program_id(0) // num_kv_heads * TILE_COLUMNS
    first = tl.load(tile)
    count = tl.load(tile + 1)
    row = tl.load(tile + 2) + tl.arange(0, block_rows)
    page_list = kv_indices + tl.load(tile + 3)
    start = tl.load(tile + 4)
    end = tl.load(tile + 5)

    valid = row < count * group
    member = first + tl.minimum(row // group, count - 1)
    query = member if members is None else tl.load(members + member)
    position = tl.load(positions + query).to(tl.int32)
    lowest = tl.min(position, 0)
    lo = _first_visible(start, lowest, window, chunk)
    hi = tl.minimum(end, tl.max(position, 0) + 1)

    head = kv_head * group + row % group
    query = query.to(tl.int64)
    q_rows = _load_rows(q, query * q_token_stride + head * q_head_stride, valid, k_dim, block_k, dot_dtype)
    bias_rows = _bias_rows(key_bias, bias_tokens, head)
    own_bias = _own_bias(bias_rows, position)
    highest = tl.full([block_rows], float("-inf"), tl.float32)
    denominator = tl.zeros([block_rows], tl.float32)
    acc = tl.zeros([block_rows, block_v], tl.float32)
    # blocks that every row sees whole, then those that need a mask
    whole = lo
    if window == 0 and chunk == 0:
        whole = lo + tl.maximum(tl.minimum(end, lowest + 1) - lo, 0) // block_tokens * block_tokens
        for t in range(lo, whole, block_tokens):
            tokens = t + tl.arange(0, block_tokens)
            kv_rows = _kv_rows(page_list, tokens, None, kv_head, num_kv_heads, page_size)
            k = _load_kv(k_pages, k_scales, kv_rows, None, k_dim, block_k, coding, dot_dtype)
            bias = _bias(bias_rows, own_bias, tokens, None)
            scores = _scores(q_rows, k, k_scales, kv_rows, None, scale, bias, softcap, coding)
            v = _load_kv(v_pages, v_scales, kv_rows, None, v_dim, block_v, coding, dot_dtype)
            highest, denominator, acc = _add(
                highest, denominator, acc, scores, v, v_scales, kv_rows, None, False, coding
            )
    for t in range(whole, hi, block_tokens):
        tokens = t + tl.arange(0, block_tokens)
        inside = tokens < hi
        kv_rows = _kv_rows(page_list, tokens, inside, kv_head, num_kv_heads, page_size)
        k = _load_kv(k_pages, k_scales, kv_rows, inside, k_dim, block_k, coding, dot_dtype)
        bias = _bias(bias_rows, own_bias, tokens, inside)
        scores = _scores(q_rows, k, k_scales, kv_rows, inside, scale, bias, softcap, coding)
        visible = inside[None, :] & (tokens[None, :] <= position[:, None])
        if window > 0:
            visible = visible & (tokens[None, :] > position[:, None] - window)
        if chunk > 0:
            visible = visible & (tokens[None, :] // chunk == position[:, None] // chunk)
        scores = tl.where(visible, scores, float("-inf"))
        v = _load_kv(v_pages, v_scales, kv_rows, inside, v_dim, block_v, coding, dot_dtype)
        highest, denominator, acc = _add(highest, denominator, acc, scores, v, v_scales, kv_rows, inside, True, coding)

    if slots is None:
        highest, denominator, acc = _add_sinks(highest, denominator, acc, sinks, head, valid)
        _store_rows(out, (query * num_kv_heads * group + head) * v_dim, acc, denominator, valid, v_dim, block_v)
    else:
        part = (tl.load(slots + member) + tl.load(tile + 6)).to(tl.int64) * num_kv_heads * group + head
        _store_rows(out, part * v_dim, acc, denominator, valid, v_dim, block_v)
        tl.store(lse + part, _natural_lse(highest, denominator), mask=valid)


@triton.jit
def merge_kernel(
    part_out,
    part_lse,
    part_indptr,
    rows,
    sinks,
    out,
    lse,
    num_q_heads: tl.constexpr,
    v_dim: tl.constexpr,
    block_v: tl.constexpr,
):
    """Program (query head, query)."""
    head = tl.program_id(0)
    i = tl.program_id(1)
    row = tl.load(rows + i).to(tl.int64) * num_q_heads + head
    last = tl.load(part_indptr + i + 1)
    dims = tl.arange(0, block_v)
    highest = tl.full([1], float("-inf"), tl.float32)
    denominator = tl.zeros([1], tl.float32)
    if sinks is not None:
        highest = tl.full([1], 0.0, tl.float32) + tl.load(sinks + head).to(tl.float32) * LOG2_E
        denominator = tl.full([1], 1.0, tl.float32)
    acc = tl.zeros([block_v], tl.float32)
    for first in range(tl.load(part_indptr + i), last, PARTIALS_AT_ONCE):
        parts = first + tl.arange(0, PARTIALS_AT_ONCE)
        part_rows = parts.to(tl.int64) * num_q_heads + head
        part = tl.load(part_lse + part_rows, mask=parts < last, other=float("-inf")) * LOG2_E
        new_highest = tl.maximum(highest, tl.max(part, 0))
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp2(part - base)
        mask = (part > float("-inf"))[:, None] & (dims < v_dim)[None, :]
        outs = tl.load(part_out + part_rows[:, None] * v_dim + dims[None, :], mask=mask, other=0.0)
        shrink = tl.exp2(highest - base)
        acc = acc * shrink + tl.sum(outs * weights[:, None], 0)
        denominator = denominator * shrink + tl.sum(weights, 0)
        highest = new_highest
    acc = acc / tl.where(denominator > 0, denominator, 1.0)
    tl.store(out + row * v_dim + dims, acc.to(out.dtype.element_ty), mask=dims < v_dim)
    if lse is not None:
        tl.store(lse + row + tl.arange(0, 1), _natural_lse(highest, denominator))


@triton.jit
def write_kernel(
    k,
    v,
    slots,
    k_pages,
    v_pages,
    k_token_stride,
    k_head_stride,
    k_dim_stride,
    v_token_stride,
    v_head_stride,
    v_dim_stride,
    num_kv_heads: tl.constexpr,
    k_dim: tl.constexpr,
    v_dim: tl.constexpr,
    block_k: tl.constexpr,
    block_v: tl.constexpr,
):
    """Program (token): all its heads, which lie side by side in the page."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    k_at = tl.arange(0, block_k)
    k_mask = k_at < tl.where(slot >= 0, num_kv_heads * k_dim, 0)
    k_from = k + token * k_token_stride + k_at // k_dim * k_head_stride + k_at % k_dim * k_dim_stride
    k_values = tl.load(k_from, mask=k_mask, other=0.0)
    v_at = tl.arange(0, block_v)
    v_mask = v_at < tl.where(slot >= 0, num_kv_heads * v_dim, 0)
    v_from = v + token * v_token_stride + v_at // v_dim * v_head_stride + v_at % v_dim * v_dim_stride
    v_values = tl.load(v_from, mask=v_mask, other=0.0)
    tl.store(k_pages + slot * (num_kv_heads * k_dim) + k_at, k_values.to(k_pages.dtype.element_ty), mask=k_mask)
    tl.store(v_pages + slot * (num_kv_heads * v_dim) + v_at, v_values.to(v_pages.dtype.element_ty), mask=v_mask)


# -- parts of kernels ----------------------------------------------------------------------------------------------


@triton.jit
def _first_visible(start, position, window: tl.constexpr, chunk: tl.constexpr):
    """The first of the tokens from `start` on that a query at `position` sees."""
    if window > 0:
        start = tl.maximum(start, position - window + 1)
    if chunk > 0:
        start = tl.maximum(start, position // chunk * chunk)
    return start


@triton.jit
def _kv_rows(page_list, tokens, inside, kv_head, num_kv_heads: tl.constexpr, page_size: tl.constexpr):
    """Where the KV of `tokens` lies, in head vectors from the pool's begin, int64."""
    pages = _load(page_list + tokens // page_size, inside)
    return (pages.to(tl.int64) * page_size + tokens % page_size) * num_kv_heads + kv_head


@triton.jit
def _load_rows(base, offsets, inside, dim: tl.constexpr, block_dim: tl.constexpr, dtype: tl.constexpr):
    """Vectors of `dim` values at `offsets`, [rows, block_dim]; zeros outside."""
    dims = tl.arange(0, block_dim)
    mask = inside
    if inside is not None:
        mask = inside[:, None]
    if block_dim > dim:
        in_dim = (dims < dim)[None, :]
        mask = in_dim if mask is None else mask & in_dim
    return _load(base + offsets[:, None] + dims[None, :], mask).to(dtype)


@triton.jit
def _load_kv(
    base,
    scales,
    kv_rows,
    inside,
    dim: tl.constexpr,
    block_dim: tl.constexpr,
    coding: tl.constexpr,
    dtype: tl.constexpr,
):
    """Vectors of `dim` values, [rows, block_dim]; zeros outside.

    Codes of 8 bits come as they are. Of two that are packed in a byte, byte j holds components j and j + dim / 2; these
    are scaled here, for each vector has a zero besides its scale, or several scales.
    """
    if coding == PACKED:
        codes, mask = _load_packed(base, kv_rows, inside, dim, block_dim)
        scale = _load(scales + kv_rows * 2, inside).to(tl.float32)
        zero = _load(scales + kv_rows * 2 + 1, inside).to(tl.float32)
        values = tl.where(mask, codes.to(tl.float32) * scale[:, None] + zero[:, None], 0.0).to(dtype)
    elif coding == PACKED_E2M1:
        codes, mask = _load_packed(base, kv_rows, inside, dim, block_dim)
        scale_at = kv_rows[:, None] * (dim // BLOCK) + (tl.arange(0, block_dim) // BLOCK)[None, :]
        scale = _e4m3(tl.load(scales + scale_at, mask=mask, other=0)) * GLOBAL_SCALE
        values = (_e2m1(codes) * scale).to(dtype)
    elif coding == E4M3:
        bits = _load_rows(base, kv_rows * dim, inside, dim, block_dim, tl.uint8)
        values = bits.to(tl.float8e4nv, bitcast=True).to(tl.float32).to(dtype)
    elif coding == E5M2:
        bits = _load_rows(base, kv_rows * dim, inside, dim, block_dim, tl.uint8)
        values = bits.to(tl.float8e5, bitcast=True).to(tl.float32).to(dtype)
    else:
        values = _load_rows(base, kv_rows * dim, inside, dim, block_dim, dtype)
    return values


@triton.jit
def _load_packed(base, kv_rows, inside, dim: tl.constexpr, block_dim: tl.constexpr):
    """Codes of 4 bits, int32 [rows, block_dim], and where there are any; zeros outside."""
    half: tl.constexpr = dim // 2
    dims = tl.arange(0, block_dim)
    mask = (dims < dim)[None, :]
    if inside is not None:
        mask = mask & inside[:, None]
    codes = tl.load(base + kv_rows[:, None] * half + (dims % half)[None, :], mask=mask, other=0).to(tl.int32)
    return (codes >> (dims // half * 4)[None, :]) & 15, mask


@triton.jit
def _e2m1(codes):
    """The float32 of floats of a sign, 2 bits of exponent and 1 of fraction, in int32."""
    magnitude = codes & 7
    normal = (((magnitude & 1) | 2) << (magnitude >> 1)) >> 1  # twice the value
    twice = tl.where(magnitude < 2, magnitude, normal).to(tl.float32)
    return tl.where(codes < 8, twice, -twice) * 0.5


@triton.jit
def _e4m3(bits):
    """The float32 of floats of 8 bits that are not negative; as float16 the bits are 1 / 256 of that."""
    halves = (bits.to(tl.int16) << 7).to(tl.float16, bitcast=True)
    return tl.where(bits == 0x7F, float("nan"), halves.to(tl.float32) * 256.0)


@triton.jit
def _load(at, mask):
    """Zeros where the mask, if there is one, hides a value: what lies there may be NaN."""
    return tl.load(at) if mask is None else tl.load(at, mask=mask, other=0)


@triton.jit
def _bias_rows(key_bias, bias_tokens, head):
    """Where the biases of each row's head begin; None if there are none. Alone: Triton makes no tuple of None."""
    rows = key_bias
    if key_bias is not None:
        rows = key_bias + head.to(tl.int64) * bias_tokens
    return rows


@triton.jit
def _own_bias(rows, position):
    """The bias at each row's own position; None if there are none."""
    own = rows
    if rows is not None:
        own = tl.load(rows + position)
    return own


@triton.jit
def _bias(rows, own, tokens, inside):
    """What is added to the scores of `tokens`, [rows, tokens]."""
    bias = rows
    if rows is not None:
        mask = inside
        if inside is not None:
            mask = inside[None, :]
        bias = _load(rows[:, None] + tokens[None, :], mask) - own[:, None]
    return bias


@triton.jit
def _scores(q_rows, k, k_scales, kv_rows, inside, scale, bias, softcap: tl.constexpr, coding: tl.constexpr):
    """[rows, tokens], in base 2: a weight is 2 ** score. Codes are multiplied as they are, their scales come after."""
    scores = tl.dot(q_rows, tl.trans(k), input_precision="ieee") * scale
    if k_scales is not None and coding == PLAIN:
        scores = scores * _load(k_scales + kv_rows, inside).to(tl.float32)[None, :]
    if bias is not None:
        scores = scores + bias
    if softcap > 0:
        # tanh(x) = 1 - 2 / (e ** 2x + 1), right at both ends
        scores = softcap - 2 * softcap / (tl.exp2(scores * (2 * LOG2_E / softcap)) + 1)
    return scores * LOG2_E


@triton.jit
def _add(
    highest,
    denominator,
    acc,
    scores,
    v,
    v_scales,
    kv_rows,
    inside,
    may_be_blind: tl.constexpr,
    coding: tl.constexpr,
):
    """One step of the online softmax (Milakov and Gimelshein, 2018); a blind row has seen nothing yet."""
    new_highest = tl.maximum(highest, tl.max(scores, 1))
    base = new_highest
    if may_be_blind:
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(highest - base)
    denominator = denominator * shrink + tl.sum(weights, 1)
    if v_scales is not None and coding == PLAIN:
        weights = weights * _load(v_scales + kv_rows, inside).to(tl.float32)[None, :]
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return new_highest, denominator, acc


@triton.jit
def _add_sinks(highest, denominator, acc, sinks, head, valid):
    """Let each head's sink, if there are any, join the denominator."""
    if sinks is not None:
        sink = tl.load(sinks + head, mask=valid, other=0.0).to(tl.float32) * LOG2_E
        new_highest = tl.maximum(highest, sink)
        shrink = tl.exp2(highest - new_highest)
        denominator = denominator * shrink + tl.exp2(sink - new_highest)
        acc = acc * shrink[:, None]
        highest = new_highest
    return highest, denominator, acc


@triton.jit
def _store_rows(out, offsets, acc, denominator, valid, v_dim: tl.constexpr, block_v: tl.constexpr):
    """The outputs of rows at `offsets`; 0 for a row that saw nothing."""
    dims = tl.arange(0, block_v)
    values = acc / tl.where(denominator > 0, denominator, 1.0)[:, None]
    mask = valid[:, None] & (dims < v_dim)[None, :]
    tl.store(out + offsets[:, None] + dims[None, :], values.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _natural_lse(highest, denominator):
    """-inf for a row that saw nothing."""
    return (highest + tl.log2(tl.where(denominator > 0, denominator, 1.0))) * LN_2
