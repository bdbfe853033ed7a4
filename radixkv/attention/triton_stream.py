"""Layers that see a window and the first tokens (StreamingLLM) by the Triton kernels: two reads, merged.

What a query sees of the window and what it sees of the sinks, which have a query of their own, are parts of one
attention as splits are. So each query has a partial for its sinks behind those of its window.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixkv.attention.metadata import AttentionMetadata, concatenated_ranges
from radixkv.attention.triton_launches import Launches
from radixkv.attention.triton_plan import extend_table, upload
from radixkv.attention.triton_steps import Merging
from radixkv.kernels.triton_paged import Decodes, PagedKV, Rule, Tiles, attend_parts, decode_parts, merge


class _Decodes(NamedTuple):
    """Sequences that compute one token; partials [i * (num_splits + 1), ...) are those of the i-th."""

    merging: Merging
    window: Decodes
    sinks: Decodes
    num_splits: int
    sink_slots: Tensor  # where the partial of each one's sinks lies

    def run(self, kv: PagedKV, q: Tensor, sink_q: Tensor, rule: Rule, group: int, out: Tensor) -> None:
        """As `StreamStep.run`."""
        partials = self.merging.partials(out)
        decode_parts(q, kv, self.window, rule, self.num_splits, partials)
        decode_parts(sink_q, kv, self.sinks, _on_sinks(rule), 1, partials._replace(indptr=self.sink_slots))
        merge(partials, self.merging.rows, rule.sinks, out)


class _Extends(NamedTuple):
    """Sequences that compute several; two partials a token."""

    merging: Merging
    window: dict[int, Tiles]  # by the size of a group
    sinks: dict[int, Tiles]

    def run(self, kv: PagedKV, q: Tensor, sink_q: Tensor, rule: Rule, group: int, out: Tensor) -> None:
        """As `StreamStep.run`."""
        partials = self.merging.partials(out)
        attend_parts(q, kv, self.window[group], rule, partials)
        attend_parts(sink_q, kv, self.sinks[group], _on_sinks(rule), partials)
        merge(partials, self.merging.rows, rule.sinks, out)


class StreamStep(NamedTuple):
    """A planned batch: what there is of its decodes and of its extends."""

    parts: list[_Decodes | _Extends]

    @classmethod
    def plan(
        cls, metadata: AttentionMetadata, sink_tokens: int, launches: Launches, device: torch.device
    ) -> StreamStep:
        """Get ready for a batch. O(tiles + pages)."""
        (kv_indices,) = upload([metadata.kv_indices], device)
        decodes = np.flatnonzero(metadata.qo_lens == 1)
        extends = np.flatnonzero(metadata.qo_lens > 1)
        parts: list[_Decodes | _Extends] = []
        if len(decodes):
            num_splits = launches.decode_splits(len(decodes))
            parts.append(_plan_decodes(metadata, decodes, kv_indices, sink_tokens, num_splits))
        if len(extends):
            tile_rows = launches.tile_rows(int(metadata.qo_lens.max()))
            parts.append(_plan_extends(metadata, extends, kv_indices, sink_tokens, tile_rows))
        return cls(parts)

    def run(self, kv: PagedKV, q: Tensor, sink_q: Tensor, rule: Rule, group: int, out: Tensor) -> None:
        """Attention of one layer into `out`. Shapes as in `triton_paged.decode`; `sink_q` is like q."""
        for part in self.parts:
            part.run(kv, q, sink_q, rule, group, out)


def _on_sinks(rule: Rule) -> Rule:
    return rule._replace(sliding_window=None, chunk_size=None)


def _plan_decodes(
    metadata: AttentionMetadata, decodes: NDArray[np.intp], kv_indices: Tensor, sink_tokens: int, num_splits: int
) -> _Decodes:
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
        Merging(rows, indptr_there, int(indptr[-1])),
        Decodes(rows, first_pages, kv_indices, starts, lens),
        Decodes(rows, first_pages, kv_indices, nothing, sink_lens),
        num_splits,
        sink_slots,
    )


def _plan_extends(
    metadata: AttentionMetadata,
    extends: NDArray[np.intp],
    kv_indices: Tensor,
    sink_tokens: int,
    tile_rows: dict[int, int],
) -> _Extends:
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
        Merging(rows, indptr_there, int(indptr[-1])),
        {group: tiles(table, group) for group, table in zip(groups, there[::2], strict=True)},
        {group: tiles(table, group) for group, table in zip(groups, there[1::2], strict=True)},
    )
