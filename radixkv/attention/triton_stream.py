"""Layers that see a window and the first tokens (StreamingLLM) by the Triton kernels: two reads, merged.

What a query sees of the window and what it sees of the sinks, which have a query of their own, are parts of one
attention as splits are. So each query has a partial for its sinks behind those of its window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixkv.attention.metadata import AttentionMetadata, concatenated_ranges
from radixkv.attention.triton_plan import extend_table, upload

if TYPE_CHECKING:
    from radixkv.kernels.triton_paged import Decodes, PagedKV, Rule, Tiles


class _Decodes(NamedTuple):
    """Sequences that compute one token; partials [i * (num_splits + 1), ...) are those of the i-th."""

    rows: Tensor
    window: Decodes
    sinks: Decodes
    num_splits: int
    indptr: Tensor
    sink_slots: Tensor  # where the partial of each one's sinks lies


class _Extends(NamedTuple):
    """Sequences that compute several; two partials a token."""

    rows: Tensor
    indptr: Tensor
    window: dict[int, Tiles]  # by the size of a group
    sinks: dict[int, Tiles]


class StreamStep(NamedTuple):
    """A planned batch."""

    decodes: _Decodes | None
    extends: _Extends | None

    @classmethod
    def plan(
        cls,
        metadata: AttentionMetadata,
        sink_tokens: int,
        device: torch.device,
        *,
        num_splits: int,
        tile_rows: dict[int, int],
    ) -> StreamStep:
        """Args: `tile_rows`, the rows of a tile for each size of a group. O(tiles + pages)."""
        (kv_indices,) = upload([metadata.kv_indices], device)
        decodes = np.flatnonzero(metadata.qo_lens == 1)
        extends = np.flatnonzero(metadata.qo_lens > 1)
        return cls(
            _plan_decodes(metadata, decodes, kv_indices, sink_tokens, num_splits) if len(decodes) else None,
            _plan_extends(metadata, extends, kv_indices, sink_tokens, tile_rows) if len(extends) else None,
        )

    def run(self, kv: PagedKV, q: Tensor, sink_q: Tensor, rule: Rule, group: int, out: Tensor) -> None:
        """Attention of one layer into `out`. Shapes as in `triton_paged.decode`; `sink_q` is like q."""
        from radixkv.kernels.triton_paged import Partials, attend_parts, decode_parts, merge

        on_sinks = rule._replace(sliding_window=None, chunk_size=None)
        for step in (self.decodes, self.extends):
            if step is None:
                continue
            num_partials = len(step.rows) * (step.num_splits + 1 if isinstance(step, _Decodes) else 2)
            partials = Partials(
                out.new_empty(num_partials, *out.shape[1:], dtype=torch.float32),
                out.new_empty(num_partials, out.shape[1], dtype=torch.float32),
                step.indptr,
            )
            if isinstance(step, _Decodes):
                decode_parts(q, kv, step.window, rule, step.num_splits, partials)
                decode_parts(sink_q, kv, step.sinks, on_sinks, 1, partials._replace(indptr=step.sink_slots))
            else:
                attend_parts(q, kv, step.window[group], rule, partials)
                attend_parts(sink_q, kv, step.sinks[group], on_sinks, partials)
            merge(partials, step.rows, rule.sinks, out)


def _plan_decodes(
    metadata: AttentionMetadata, decodes: NDArray[np.intp], kv_indices: Tensor, sink_tokens: int, num_splits: int
) -> _Decodes:
    from radixkv.kernels.triton_paged import Decodes

    kv_lens = metadata.kv_lens[decodes]
    indptr = np.arange(len(decodes) + 1, dtype=np.int32) * np.int32(num_splits + 1)
    rows, first_pages, starts, lens, nothing, sink_lens, indptr_there, sink_slots = upload(
        [
            metadata.qo_indptr[decodes],
            metadata.kv_indptr[decodes],
            np.minimum(sink_tokens, kv_lens),
            kv_lens,
            np.zeros_like(kv_lens),
            np.minimum(sink_tokens, kv_lens),
            indptr,
            indptr[:-1] + np.int32(num_splits),
        ],
        kv_indices.device,
    )
    return _Decodes(
        rows,
        Decodes(rows, first_pages, kv_indices, starts, lens),
        Decodes(rows, first_pages, kv_indices, nothing, sink_lens),
        num_splits,
        indptr_there,
        sink_slots,
    )


def _plan_extends(
    metadata: AttentionMetadata,
    extends: NDArray[np.intp],
    kv_indices: Tensor,
    sink_tokens: int,
    tile_rows: dict[int, int],
) -> _Extends:
    from radixkv.kernels.triton_paged import Tiles

    qo_lens = metadata.qo_lens[extends]
    tokens = concatenated_ranges(metadata.qo_indptr[extends], qo_lens)
    indptr = np.arange(len(tokens) + 1, dtype=np.int32) * np.int32(2)
    slots = np.zeros(metadata.num_tokens, np.int32)
    slots[tokens] = indptr[:-1]
    tables = []
    for group, block_rows in tile_rows.items():
        whole = extend_table(metadata, extends, group, block_rows, 1)
        window, sinks = whole.copy(), whole.copy()
        window[:, 4] = np.minimum(sink_tokens, window[:, 5])
        sinks[:, 5], sinks[:, 6] = np.minimum(sinks[:, 5], sink_tokens), 1
        tables += [window, sinks]
    rows, indptr_there, token_slots, *there = upload(
        [tokens.astype(np.int32), indptr, slots, *tables], kv_indices.device
    )

    def tiles(table: Tensor, group: int) -> Tiles:
        return Tiles(table.view(-1, 8), tile_rows[group], kv_indices, metadata.positions, slots=token_slots)

    groups = list(tile_rows)
    return _Extends(
        rows,
        indptr_there,
        {group: tiles(table, group) for group, table in zip(groups, there[::2], strict=True)},
        {group: tiles(table, group) for group, table in zip(groups, there[1::2], strict=True)},
    )
