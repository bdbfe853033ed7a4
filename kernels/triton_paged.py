"""Paged attention in Triton: decodes split along their tokens, tiles of many query rows, and the merge of parts.

Attention over a set of tokens is an output and a log-sum-exp; two of them merge into the attention over both sets
(Dao et al., "Flash-Decoding", 2023; Ye et al., "Cascade Inference", FlashInfer, 2024). So a part of a sequence that is
read by a program of its own, or once for many sequences, leaves a *partial*: a float32 output and the natural log of
its softmax's denominator, which `merge` adds up.

    decode   one query token a sequence; a program reads one split of its tokens for the query heads of one KV head
    attend   tiles: a block of query rows over a range of tokens of one list of pages. Extends, and prefixes that many
             decodes share
    merge    the partials of each query token -> its output

Query head h reads KV head h // group, and a tile's rows run over queries and the heads of a group alike: row r is query
r // group, head r % group. Slots that hold no visible token are never read: they may hold NaN.

Under `TRITON_INTERPRET=1`, set before Triton is first imported, all of it runs on the CPU, in float32: Triton's
interpreter has no bfloat16 arithmetic.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from radixkv.kernels.triton_device import (
    PACKED,
    PACKED_E2M1,
    PLAIN,
    decode_kernel,
    merge_kernel,
    tile_kernel,
    write_kernel,
)

INTERPRETED: bool = triton.knobs.runtime.interpret


class PagedKV(NamedTuple):
    """The KV of one layer.

    Attributes:
        k, v: contiguous [num_pages, page_size, num_kv_heads, head_dim]; int8 codes if there are scales, or uint8 with
            two codes of 4 bits in a byte, head_dim / 2 of them: byte j holds components j and j + head_dim / 2.
        k_scale, v_scale: contiguous [num_pages, page_size, num_kv_heads]; a value is its code times its scale. Of 4
            bits [num_pages, page_size, num_kv_heads, 2], a scale and a zero, which is added; where the codes are E2M1
            uint8 [num_pages, page_size, num_kv_heads, head_dim / 16], scales of blocks in e4m3.
        float8: E4M3 or E5M2 if k and v are uint8 and each byte is such a float.
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    float8: tl.constexpr | None = None

    @property
    def is_packed(self) -> bool:
        """Whether two codes share a byte."""
        return self.k_scale is not None and self.k_scale.dim() == 4

    @property
    def k_dim(self) -> int:
        """Values of a head of K."""
        return self.k.shape[3] * (2 if self.is_packed else 1)

    @property
    def v_dim(self) -> int:
        """Values of a head of V."""
        return self.v.shape[3] * (2 if self.is_packed else 1)


class Rule(NamedTuple):
    """The tokens that a query sees, and how scores become weights; the options are as in `torch_reference`.

    `key_bias` is float32 and contiguous.
    """

    scale: float
    sliding_window: int | None = None
    chunk_size: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    key_bias: Tensor | None = None

    @property
    def bias_tokens(self) -> int:
        """Positions that `key_bias` has."""
        return 0 if self.key_bias is None else self.key_bias.shape[1]


class Partials(NamedTuple):
    """Attention over parts of the sequences.

    Attributes:
        out: float32 [num_partials, num_q_heads, v_head_dim], unset where lse is -inf.
        lse: float32 [num_partials, num_q_heads], natural; -inf where nothing was visible.
        indptr: int32 [num_queries + 1]; query i has the partials [indptr[i], indptr[i + 1]).
    """

    out: Tensor
    lse: Tensor
    indptr: Tensor


class Decodes(NamedTuple):
    """Sequences that compute one token each; all int32 on the device.

    Attributes:
        rows: [n], places of the queries in the flattened batch.
        first_pages: [n]; the pages of sequence i are kv_indices[first_pages[i]], and those after it.
        kv_indices: page ids.
        kv_starts, kv_lens: [n]; sequence i reads its tokens [kv_starts[i], kv_lens[i]), of which the query sees those
            that the rule lets it; none where kv_lens[i] is 0, and the output is 0.
    """

    rows: Tensor
    first_pages: Tensor
    kv_indices: Tensor
    kv_starts: Tensor
    kv_lens: Tensor


class Tiles(NamedTuple):
    """Blocks of query rows over ranges of tokens; all on the device.

    Attributes:
        table: int32 [num_tiles, 8], each (first, count, first_row, first_page, start, end, split, 0): rows from
            first_row on, of the `count` queries from `first` on, over the tokens [start, end) that lie in the pages
            kv_indices[first_page], and those after it. No row sees past its own position.
        block_rows: rows of a tile, a power of two and at least 16.
        kv_indices: int32 page ids.
        positions: int64 [num_tokens], place of each flattened query in its sequence.
        members: int32; where given, the queries are members[first : first + count], else first, first + 1, ...
        slots: int32; where given, the partial of a tile's query i is slots[first + i] + split.
    """

    table: Tensor
    block_rows: int
    kv_indices: Tensor
    positions: Tensor
    members: Tensor | None = None
    slots: Tensor | None = None


class _Launch(NamedTuple):
    """How a kernel runs; tokens and rows are those of a block."""

    block_tokens: int
    num_warps: int
    num_stages: int


def decode(q: Tensor, kv: PagedKV, decodes: Decodes, rule: Rule, out: Tensor) -> None:
    """Attention of one token of each sequence, in one pass; for batches that fill the device without splits.

    Args:
        q: [num_tokens, num_q_heads, k_head_dim]
        out: [num_tokens, num_q_heads, v_head_dim], rows `decodes.rows` are written
    """
    _launch_decode(q, kv, decodes, rule, rule.sinks, 1, out, None, None)


def decode_parts(q: Tensor, kv: PagedKV, decodes: Decodes, rule: Rule, num_splits: int, partials: Partials) -> None:
    """The same in `num_splits` parts: the first partials of each sequence.

    How the tokens are cut is computed on the device, so the launch depends on no length.
    """
    _launch_decode(q, kv, decodes, rule, None, num_splits, partials.out, partials.lse, partials.indptr)


def attend(q: Tensor, kv: PagedKV, tiles: Tiles, rule: Rule, out: Tensor) -> None:
    """Attention of tiles that hold all that their queries read. Shapes as in `decode`."""
    _launch_tiles(q, kv, tiles, rule, rule.sinks, out, None)


def attend_parts(q: Tensor, kv: PagedKV, tiles: Tiles, rule: Rule, partials: Partials) -> None:
    """Attention of tiles that hold parts: the partials `tiles.slots`, `tiles.split` further each."""
    assert tiles.slots is not None
    _launch_tiles(q, kv, tiles, rule, None, partials.out, partials.lse)


def merge(partials: Partials, rows: Tensor, sinks: Tensor | None, out: Tensor, lse: Tensor | None = None) -> None:
    """Add up the partials of each query.

    Args:
        rows: int32 [num_queries], their places in `out`
        sinks: logits [num_q_heads] that join the denominators
        out: [num_tokens, num_q_heads, v_head_dim], rows `rows` are written; 0 where nothing was visible
        lse: float32 [num_tokens, num_q_heads], written in the same rows: the natural logs of the denominators
    """
    num_q_heads, v_dim = out.shape[1:]
    merge_kernel[(num_q_heads, len(rows))](
        partials.out,
        partials.lse,
        partials.indptr,
        rows,
        sinks,
        out,
        lse,
        num_q_heads=num_q_heads,
        v_dim=v_dim,
        block_v=_padded(v_dim),
        num_warps=2 if v_dim <= 128 else 4,
        enable_fp_fusion=True,
    )


def write(k: Tensor, v: Tensor, slots: Tensor, kv: PagedKV) -> None:
    """Store the KV of tokens in their slots, in one launch; a negative slot drops its token.

    Args:
        k, v: [tokens, num_kv_heads, head_dim], of any strides
        slots: int64 [tokens]
    """
    num_kv_heads, k_dim = kv.k.shape[2:]
    v_dim = kv.v.shape[3]
    write_kernel[(len(slots),)](
        k,
        v,
        slots,
        kv.k,
        kv.v,
        *k.stride(),
        *v.stride(),
        num_kv_heads=num_kv_heads,
        k_dim=k_dim,
        v_dim=v_dim,
        block_k=triton.next_power_of_2(num_kv_heads * k_dim),
        block_v=triton.next_power_of_2(num_kv_heads * v_dim),
        enable_fp_fusion=True,
    )


def decode_programs(group: int, num_kv_heads: int) -> int:
    """Programs of one split of one sequence."""
    return num_kv_heads * -(-group // _head_rows(group))


def tile_rows(num_rows: int, head_dim: int, dtype: torch.dtype) -> int:
    """Rows of the tiles for sequences of at most `num_rows` rows of `head_dim` values, as many as registers hold.

    A matrix unit takes 16 or, from 64 on, 64 at a time; float32 has none.
    """
    if INTERPRETED or head_dim > 256:
        return 16
    if dtype == torch.float32:
        return 32 if head_dim <= 128 else 16
    return next(rows for rows in (16, 64, 128) if num_rows <= rows or rows == 128)


# -- launches ------------------------------------------------------------------------------------------------------


def _launch_decode(
    q: Tensor,
    kv: PagedKV,
    decodes: Decodes,
    rule: Rule,
    sinks: Tensor | None,
    num_splits: int,
    out: Tensor,
    lse: Tensor | None,
    part_indptr: Tensor | None,
) -> None:
    group = q.shape[1] // kv.k.shape[2]
    launch = _decode_launch(q, kv)
    grid = (decode_programs(group, kv.k.shape[2]), num_splits, len(decodes.rows))
    decode_kernel[grid](
        q,
        *_strides(q),
        *kv[:4],
        decodes.rows,
        decodes.first_pages,
        decodes.kv_indices,
        decodes.kv_starts,
        decodes.kv_lens,
        part_indptr,
        sinks,
        rule.key_bias,
        rule.bias_tokens,
        out,
        lse,
        num_splits,
        rule.scale,
        **_constants(q, kv, rule),
        head_rows=_head_rows(group),
        block_tokens=launch.block_tokens,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        enable_fp_fusion=True,
    )


def _launch_tiles(
    q: Tensor, kv: PagedKV, tiles: Tiles, rule: Rule, sinks: Tensor | None, out: Tensor, lse: Tensor | None
) -> None:
    launch = _tile_launch(q, kv, tiles.block_rows)
    tile_kernel[(kv.k.shape[2] * len(tiles.table),)](
        q,
        *_strides(q),
        *kv[:4],
        tiles.table,
        tiles.kv_indices,
        tiles.positions,
        tiles.members,
        tiles.slots,
        sinks,
        rule.key_bias,
        rule.bias_tokens,
        out,
        lse,
        rule.scale,
        **_constants(q, kv, rule),
        block_rows=tiles.block_rows,
        block_tokens=launch.block_tokens,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        enable_fp_fusion=True,
    )


def _constants(q: Tensor, kv: PagedKV, rule: Rule) -> dict[str, object]:
    """The constants that kernels are compiled for: the shapes of the heads and the rule."""
    assert kv.k.is_contiguous()
    assert kv.v.is_contiguous()
    page_size, num_kv_heads = kv.k.shape[1:3]
    k_dim, v_dim = kv.k_dim, kv.v_dim
    return {
        "group": q.shape[1] // num_kv_heads,
        "num_kv_heads": num_kv_heads,
        "page_size": page_size,
        "k_dim": k_dim,
        "v_dim": v_dim,
        "block_k": _padded(k_dim),
        "block_v": _padded(v_dim),
        "window": rule.sliding_window or 0,
        "chunk": rule.chunk_size or 0,
        "softcap": float(rule.softcap or 0.0),
        "coding": _coding(kv).value,
        "dot_dtype": tl.float32 if INTERPRETED else _TL_DTYPE[q.dtype],
    }


def _coding(kv: PagedKV) -> tl.constexpr:
    if kv.k_scale is not None and kv.is_packed:
        return PACKED_E2M1 if kv.k_scale.dtype == torch.uint8 else PACKED
    return kv.float8 or PLAIN


_TL_DTYPE = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def _strides(q: Tensor) -> tuple[int, int]:
    assert q.stride(2) == 1, "the values of a head lie side by side"
    return q.stride(0), q.stride(1)


def _padded(dim: int) -> int:
    """Head sizes of blocks: powers of two that a matrix product takes."""
    return max(16, int(triton.next_power_of_2(dim)))


def _head_rows(group: int) -> int:
    """Rows of a decode's block, over the heads of a group: a matrix unit takes 16; groups of more than 64 are cut."""
    return min(64, max(16, int(triton.next_power_of_2(group))))


def _decode_launch(q: Tensor, kv: PagedKV) -> _Launch:
    """Decodes wait for memory: blocks of 16 KiB of K and as many of V on their way, in four programs a multiprocessor.

    Triton has (num_stages - 1) // 2 blocks on their way, since the page ids of a block are loaded ahead of it; codes
    of 8 bits take half the bytes.
    """
    if INTERPRETED:
        return _Launch(32, 4, 1)
    row_bytes = _padded(_head_dim(kv)) * q.element_size()  # in registers
    block_tokens = min(128, max(16, 16384 // row_bytes))
    return _Launch(block_tokens, 8 if q.dtype == torch.float32 else 4, 5 if kv.k_scale is not None else 3)


def _tile_launch(q: Tensor, kv: PagedKV, block_rows: int) -> _Launch:
    """Tiles compute: eight warps for 128 rows; as many tokens a block as registers hold."""
    if INTERPRETED:
        return _Launch(32, 4, 1)
    if q.dtype == torch.float32:
        return _Launch(16, 8, 2)
    large = _head_dim(kv) > 128
    return _Launch(32 if large else 64, 8 if block_rows == 128 else 4, 2 if large else 3)


def _head_dim(kv: PagedKV) -> int:
    return max(kv.k_dim, kv.v_dim)
