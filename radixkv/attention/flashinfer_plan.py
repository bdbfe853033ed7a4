"""What FlashInfer's kernels run in a batch: its decodes, its extends, and the levels of prefixes that decodes share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixkv.attention.metadata import AttentionMetadata, concatenated_ranges, indptr
from radixkv.attention.shared_prefix import CascadePlan, SharedPart
from radixkv.kernels.flashinfer_paged import (
    NO_WINDOW,
    AttentionKind,
    KVPages,
    PagedDecode,
    PagedPrefill,
    PageLists,
    PrefillBackend,
    merge_in_place,
)

Rows = slice | Tensor
"""Rows of a tensor: a slice where they lie side by side, else int64 indices on its device."""


class Share(NamedTuple):
    """Some sequences of the batch, ascending, and the rows of their tokens."""

    sequences: NDArray[np.intp]
    rows: Rows


class _Level(NamedTuple):
    """Shared parts that lie at the same depth, planned as one batch. `rows` are places among the decodes."""

    rows: Rows
    num_rows: int
    prefill: PagedPrefill


class KindPlan(NamedTuple):
    """What the layers of one kind run in the planned batch, by wrappers that are planned for it."""

    decode: PagedDecode
    extend: PagedPrefill
    decodes: Share | None
    extends: Share | None
    levels: list[_Level]

    def attend(self, q: Tensor, pages: KVPages) -> Tensor:
        """Attention of one layer over its pages. q is [tokens, num_q_heads, head_dim], in order; so is the result."""
        out = torch.empty_like(q)
        if self.extends is not None:
            rows = self.extends.rows
            part = _take(out, rows)
            self.extend.run(_take(q, rows), pages, part)
            _put(out, rows, part)
        if self.decodes is not None:
            rows = self.decodes.rows
            part = _take(out, rows)
            self._run_decodes(_take(q, rows), pages, part)
            _put(out, rows, part)
        return out

    def _run_decodes(self, q: Tensor, pages: KVPages, out: Tensor) -> None:
        if not self.levels:
            self.decode.run(q, pages, out)
            return
        lse = q.new_empty(q.shape[:2], dtype=torch.float32)
        self.decode.run(q, pages, out, lse)
        for level in self.levels:
            shared_out = q.new_empty(level.num_rows, *q.shape[1:])
            shared_lse = lse.new_empty(level.num_rows, lse.shape[1])
            level.prefill.run(_take(q, level.rows), pages, shared_out, shared_lse)
            part, part_lse = _take(out, level.rows), _take(lse, level.rows)
            merge_in_place(part, part_lse, shared_out, shared_lse)
            _put(out, level.rows, part)
            _put(lse, level.rows, part_lse)


class KindWrappers:
    """FlashInfer's wrappers for the layers of one kind; planning a batch overwrites what they knew of the last one."""

    def __init__(self, kind: AttentionKind, workspace: Tensor, prefill: PrefillBackend) -> None:
        self._kind = kind
        self._workspace = workspace
        self._decode = PagedDecode(kind, workspace)
        self._extend = PagedPrefill(kind, workspace, prefill)
        self._level_prefills: list[PagedPrefill] = []  # as many as ever were levels

    def plan(
        self, metadata: AttentionMetadata, decodes: Share | None, extends: Share | None, cascade: CascadePlan
    ) -> KindPlan:
        """Get ready for a batch. O(pages)."""
        levels: list[_Level] = []
        starts = first_tokens(metadata, self._kind.window_left)
        if extends is not None:
            qo_indptr = indptr(metadata.qo_lens[extends.sequences])
            self._extend.plan(qo_indptr, page_lists(metadata, extends.sequences, starts), causal=True)
        if decodes is not None:
            if cascade.parts and self._kind.window_left == NO_WINDOW:
                starts = cascade.private_starts
                levels = self._plan_levels(decodes.sequences, cascade.parts)
            self._decode.plan(page_lists(metadata, decodes.sequences, starts))
        return KindPlan(self._decode, self._extend, decodes, extends, levels)

    def _plan_levels(self, decodes: NDArray[np.intp], parts: Sequence[SharedPart]) -> list[_Level]:
        by_level = _by_level(parts)
        while len(self._level_prefills) < len(by_level):
            self._level_prefills.append(PagedPrefill(self._kind, self._workspace, "fa2"))
        return [
            self._plan_level(prefill, decodes, own_parts)
            for prefill, own_parts in zip(self._level_prefills, by_level, strict=False)
        ]

    def _plan_level(self, prefill: PagedPrefill, decodes: NDArray[np.intp], parts: Sequence[SharedPart]) -> _Level:
        """Each part is one sequence to FlashInfer, whose queries are those of all decodes that share it."""
        places = np.searchsorted(decodes, np.concatenate([part.sequences for part in parts]))
        pages = PageLists(
            indptr([len(part.pages) for part in parts]),
            np.concatenate([part.pages for part in parts]),
            np.full(len(parts), self._kind.page_size, np.int32),  # parts are whole pages
        )
        prefill.plan(indptr([len(part.sequences) for part in parts]), pages, causal=False)
        return _Level(_rows(places, self._workspace.device), len(places), prefill)


def first_tokens(metadata: AttentionMetadata, window_left: int) -> NDArray[np.int32]:
    """The first token of each sequence that any of its queries sees. FlashInfer masks by the distance from the end, so
    what lies before can be left out."""
    if window_left == NO_WINDOW:
        return np.zeros_like(metadata.kv_lens)
    first: NDArray[np.int32] = np.maximum(metadata.kv_lens - metadata.qo_lens - window_left, 0)
    return first


def page_lists(metadata: AttentionMetadata, sequences: NDArray[np.intp], starts: NDArray[np.int32]) -> PageLists:
    """The pages of `sequences` from those on that hold their tokens `starts` (of the whole batch). O(pages)."""
    first = metadata.kv_indptr[sequences] + starts[sequences] // metadata.page_size
    last = metadata.kv_indptr[sequences + 1]
    if np.array_equal(first[1:], last[:-1]):
        indices = metadata.kv_indices[first[0] : last[-1]]
    else:
        indices = metadata.kv_indices[concatenated_ranges(first, last - first)]
    return PageLists(indptr(last - first), indices, metadata.kv_last_page_len[sequences])


def share(metadata: AttentionMetadata, sequences: NDArray[np.intp], device: torch.device) -> Share | None:
    """Those sequences of the batch, if there are any."""
    if not len(sequences):
        return None
    tokens = concatenated_ranges(metadata.qo_indptr[sequences], metadata.qo_lens[sequences])
    return Share(sequences, _rows(tokens, device))


def _by_level(parts: Sequence[SharedPart]) -> list[list[SharedPart]]:
    """The parts by their depth: a sequence has at most one of each level. Parents come before children."""
    depth: dict[int, int] = {}
    levels: list[list[SharedPart]] = []
    for part in parts:
        level = depth.get(int(part.sequences[0]), 0)  # the same for all: they share every part above
        depth.update(dict.fromkeys(part.sequences.tolist(), level + 1))
        levels += [[]] if level == len(levels) else []
        levels[level].append(part)
    return levels


def _rows(indices: NDArray[np.integer], device: torch.device) -> Rows:
    """A slice if they are consecutive: the scheduler puts decodes first, so most are, and nothing is copied."""
    first, last = int(indices[0]), int(indices[-1]) + 1
    if last - first == len(indices) and np.all(np.diff(indices) == 1):
        return slice(first, last)
    return torch.from_numpy(indices.astype(np.int64)).to(device, non_blocking=True)


def _take(x: Tensor, rows: Rows) -> Tensor:
    """The rows: a view if they are a slice, else a copy."""
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


def _put(x: Tensor, rows: Rows, values: Tensor) -> None:
    """Write back what `_take` gave; a view needs nothing."""
    if not isinstance(rows, slice):
        x.index_copy_(0, rows, values)
