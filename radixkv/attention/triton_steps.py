"""The decodes and the extends of a batch as the Triton kernels run them: in one pass, or in parts that are merged."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from radixkv.attention.metadata import AttentionMetadata, concatenated_ranges
from radixkv.attention.shared_prefix import CascadePlan
from radixkv.attention.triton_launches import Launches
from radixkv.attention.triton_plan import (
    PartialSlots,
    SplitPart,
    concatenated,
    extend_splits,
    extend_table,
    extend_tiles,
    shared_table,
    upload,
)
from radixkv.kernels import triton_paged
from radixkv.kernels.triton_paged import Decodes, PagedKV, Partials, Rule, Tiles


class Merging(NamedTuple):
    """Queries that are computed in parts: their rows, and where their partials lie (see `Partials`)."""

    rows: Tensor
    indptr: Tensor
    num_partials: int

    def partials(self, out: Tensor) -> Partials:
        """Room for the partials of a layer whose output is like `out`."""
        return Partials(
            out.new_empty(self.num_partials, *out.shape[1:], dtype=torch.float32),
            out.new_empty(self.num_partials, out.shape[1], dtype=torch.float32),
            self.indptr,
        )


class DecodeStep(NamedTuple):
    """Sequences that compute one token; where they run in one pass there is nothing to merge."""

    decodes: Decodes
    num_splits: int
    merging: Merging | None
    shared: dict[int, Tiles]  # by the size of a group; empty where nothing is read once

    @classmethod
    def plan(
        cls, metadata: AttentionMetadata, cascade: CascadePlan, launches: Launches, kv_indices: Tensor
    ) -> DecodeStep | None:
        """The decodes of a batch; None if it has none. `kv_indices` are those of the batch, on the device."""
        decodes = np.flatnonzero(metadata.qo_lens == 1)
        if not len(decodes):
            return None
        num_splits = launches.decode_splits(len(decodes))
        parts = [SplitPart.cut(metadata, part, launches.part_splits(len(part.sequences))) for part in cascade.parts]
        block_rows = launches.tile_rows(max((len(part.sequences) for part in parts), default=0))
        slots = PartialSlots.number(decodes, parts, num_splits)
        rows, first_pages, starts, kv_lens, indptr, members, member_slots, *tables = upload(
            [
                metadata.qo_indptr[decodes],
                metadata.kv_indptr[decodes],
                cascade.private_starts[decodes],
                metadata.kv_lens[decodes],
                slots.indptr,
                concatenated([metadata.qo_indptr[part.sequences] for part in parts]),
                slots.of_members,
                *(shared_table(parts, group, block_rows[group]) for group in launches.groups),
            ],
            kv_indices.device,
        )
        return cls(
            Decodes(rows, first_pages, kv_indices, starts, kv_lens),
            num_splits,
            Merging(rows, indptr, int(slots.indptr[-1])) if num_splits > 1 or parts else None,
            {
                group: Tiles(
                    table.view(-1, 8), block_rows[group], kv_indices, metadata.positions, members, member_slots
                )
                for group, table in zip(launches.groups, tables, strict=True)
                if parts
            },
        )

    def run(self, kv: PagedKV, q: Tensor, rule: Rule, group: int, out: Tensor) -> None:
        """Attention of one layer into `out`; shapes as in `triton_paged.decode`."""
        if self.merging is None:
            triton_paged.decode(q, kv, self.decodes, rule, out)
            return
        partials = self.merging.partials(out)
        triton_paged.decode_parts(q, kv, self.decodes, rule, self.num_splits, partials)
        if self.shared:
            triton_paged.attend_parts(q, kv, self.shared[group], rule, partials)
        triton_paged.merge(partials, self.merging.rows, rule.sinks, out)


class ExtendStep(NamedTuple):
    """Sequences that compute several tokens, likewise."""

    tiles: dict[int, Tiles]  # by the size of a group
    merging: Merging | None

    @classmethod
    def plan(cls, metadata: AttentionMetadata, launches: Launches, kv_indices: Tensor) -> ExtendStep | None:
        """The extends of a batch; None if it has none. `kv_indices` are those of the batch, on the device."""
        extends = np.flatnonzero(metadata.qo_lens > 1)
        if not len(extends):
            return None
        qo_lens = metadata.qo_lens[extends]
        block_rows = launches.tile_rows(int(qo_lens.max()))
        smallest = launches.groups[0]
        num_tiles = int(extend_tiles(metadata, extends, smallest, block_rows[smallest]).sum())
        num_splits = extend_splits(metadata, extends, launches.num_programs(num_tiles), launches.num_wanted_tiles)
        tokens = concatenated_ranges(metadata.qo_indptr[extends], qo_lens)
        first_slots = np.arange(len(tokens) + 1, dtype=np.int32) * np.int32(num_splits)
        slots = np.zeros(metadata.num_tokens, np.int32)
        slots[tokens] = first_slots[:-1]
        tables = [extend_table(metadata, extends, group, block_rows[group], num_splits) for group in launches.groups]
        arrays = [tokens.astype(np.int32), first_slots, slots, *tables]
        rows, indptr, token_slots, *tables_there = upload(arrays, kv_indices.device)
        merged = num_splits > 1
        return cls(
            {
                group: Tiles(
                    table.view(-1, 8),
                    block_rows[group],
                    kv_indices,
                    metadata.positions,
                    slots=token_slots if merged else None,
                )
                for group, table in zip(launches.groups, tables_there, strict=True)
            },
            Merging(rows, indptr, int(first_slots[-1])) if merged else None,
        )

    def run(self, kv: PagedKV, q: Tensor, rule: Rule, group: int, out: Tensor) -> None:
        """As `DecodeStep.run`."""
        tiles = self.tiles[group]
        if self.merging is None:
            triton_paged.attend(q, kv, tiles, rule, out)
            return
        partials = self.merging.partials(out)
        triton_paged.attend_parts(q, kv, tiles, rule, partials)
        triton_paged.merge(partials, self.merging.rows, rule.sinks, out)
