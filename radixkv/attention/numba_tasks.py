"""The table of tasks that the compiled CPU kernel works off: which query rows read which tokens of which pages."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from radixkv.kernels.numba_cpu import MAX_ROWS, NOT_SPLIT
from radixkv.kernels.numba_emitter import LANES

MIN_SPLIT_TOKENS = 256  # shorter parts cost more in merging than they bring
TASKS_PER_THREAD = 6  # threads take tasks as they can: another one may be kept from its core


class Read(NamedTuple):
    """Tokens of a batch that read one list of pages together.

    Attributes:
        page_list: its first entry in the array of pages.
        tokens: places in the flattened batch; one beyond it stands for the token so many before, with another query.
        starts, ends: the positions that each of them sees, [start, end).
    """

    page_list: int
    tokens: NDArray[np.int64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Heads:
    """Query and KV heads of a layer."""

    num_q_heads: int
    num_kv_heads: int

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.num_q_heads // self.num_kv_heads


@dataclass(frozen=True)
class TaskTable:
    """Tasks of equally many rows, as `numba_arguments.ATTENTION` says."""

    tasks: NDArray[np.int64]  # [num_tasks, 5]
    row_ids: NDArray[np.int32]  # [num_tasks, rows]
    row_starts: NDArray[np.int32]
    row_ends: NDArray[np.int32]
    reads_once: bool  # no two tasks read the same KV

    @property
    def rows(self) -> int:
        """Query rows of a task."""
        return int(self.row_ids.shape[1])

    @cached_property  # layers share a table
    def fields(self) -> dict[str, int]:
        """Its size and the addresses of its arrays, as `numba_arguments.ATTENTION` names them."""
        return {
            "num_tasks": len(self.tasks),
            "reads_once": self.reads_once,
            "tasks": self.tasks.ctypes.data,
            "row_ids": self.row_ids.ctypes.data,
            "row_starts": self.row_starts.ctypes.data,
            "row_ends": self.row_ends.ctypes.data,
        }


class Work(NamedTuple):
    """All tasks of a layer, and which rows are merged of which partial rows (int32; `merged_indptr` as in CSR)."""

    tables: list[TaskTable]
    num_partials: int
    merged_rows: NDArray[np.int32]
    merged_indptr: NDArray[np.int32]
    merged_partials: NDArray[np.int32]
    num_tokens: int  # that all tasks read, to judge how many threads pay


def plan_work(
    reads: Sequence[Read],
    heads: Heads,
    *,
    num_tokens: int,
    num_threads: int,
    merge_all: bool,
    rows_of_extends: int = MAX_ROWS,
) -> Work:
    """Cut `reads` of a batch of `num_tokens` into tasks. O(rows of all tasks).

    Every token's positions are covered once; where several reads or splits cover them, its rows are merged. `merge_all`
    merges every row, which is where sinks join. Tasks have the rows of one token, or `rows_of_extends` where there are
    more.
    """
    is_large = [len(read.tokens) > 1 and len(read.tokens) * heads.group >= rows_of_extends for read in reads]
    small = [read for read, large in zip(reads, is_large, strict=True) if not large]
    large = list(itertools.compress(reads, is_large))
    kinds = [(min(heads.group, MAX_ROWS), small), (rows_of_extends, large)]
    tiles = [_tiles(chosen, rows, heads) for rows, chosen in kinds if chosen]
    num_read = sum(int(tile.lengths.sum()) for tile in tiles) * heads.num_kv_heads
    split_tokens = max(MIN_SPLIT_TOKENS, -(-num_read // (num_threads * TASKS_PER_THREAD) // LANES) * LANES)
    tables = [_split(tile, split_tokens, heads) for tile in tiles]
    return _with_merges(tables, num_read, num_rows=num_tokens * heads.num_q_heads, merge_all=merge_all)


class _Tiles(NamedTuple):
    """Rows that are taken together, for the first KV head; -1 where a tile is not full."""

    reads: NDArray[np.int64]  # [num_tiles]
    page_lists: NDArray[np.int64]
    starts: NDArray[np.int64]  # of the tile
    ends: NDArray[np.int64]
    row_ids: NDArray[np.int64]  # [num_tiles, rows]
    row_starts: NDArray[np.int64]
    row_ends: NDArray[np.int64]

    @property
    def lengths(self) -> NDArray[np.int64]:
        return self.ends - self.starts


def _tiles(reads: Sequence[Read], rows: int, heads: Heads) -> _Tiles:
    sizes = np.array([len(read.tokens) for read in reads])
    tokens, token_starts, token_ends = (
        np.concatenate([getattr(read, name) for read in reads]).astype(np.int64)
        for name in ("tokens", "starts", "ends")
    )
    counts = -(-sizes * heads.group // rows)  # tiles of each read
    read_of = np.repeat(np.arange(len(reads)), counts)
    tile_in_read = np.arange(len(read_of)) - np.repeat(np.cumsum(counts) - counts, counts)
    place = tile_in_read[:, None] * rows + np.arange(rows)  # in the read's rows: its tokens' heads, token by token
    filled = place < (sizes * heads.group)[read_of][:, None]
    token = np.where(filled, place // heads.group, 0) + (np.cumsum(sizes) - sizes)[read_of][:, None]
    row_starts, row_ends = np.where(filled, token_starts[token], 0), np.where(filled, token_ends[token], 0)
    return _Tiles(
        reads=read_of,
        page_lists=np.array([read.page_list for read in reads])[read_of],
        starts=np.where(filled, row_starts, np.iinfo(np.int64).max).min(axis=1) // LANES * LANES,
        ends=row_ends.max(axis=1),
        row_ids=np.where(filled, tokens[token] * heads.num_q_heads + place % heads.group, -1),
        row_starts=row_starts,
        row_ends=row_ends,
    )


def _split(tiles: _Tiles, split_tokens: int, heads: Heads) -> TaskTable:
    """Tasks for every KV head and part of the tokens; partial results are numbered later."""
    num_splits = -(-tiles.lengths // split_tokens)
    tile = np.repeat(np.arange(len(num_splits)), num_splits)
    split = np.arange(len(tile)) - np.repeat(np.cumsum(num_splits) - num_splits, num_splits)
    # tiles of one read over the same part go one after another: the part is in the cache then
    tile, split, head = (
        values.ravel()
        for values in np.broadcast_arrays(tile[:, None], split[:, None], np.arange(heads.num_kv_heads)[None, :])
    )
    order = np.lexsort((tile, split, head, tiles.reads[tile]))
    tile, split, head = tile[order], split[order], head[order]
    starts = tiles.starts[tile] + split * split_tokens
    ends = np.minimum(starts + split_tokens, tiles.ends[tile])
    row_ids = tiles.row_ids[tile]
    row_ids = np.where(row_ids >= 0, row_ids + (head * heads.group)[:, None], -1)
    partial = np.full(len(tile), NOT_SPLIT)
    return TaskTable(
        tasks=np.stack([head, tiles.page_lists[tile], starts, ends, partial], axis=1).astype(np.int64),
        row_ids=row_ids.astype(np.int32),
        row_starts=tiles.row_starts[tile].astype(np.int32),
        row_ends=tiles.row_ends[tile].astype(np.int32),
        reads_once=len(np.unique(tiles.reads)) == len(tiles.reads),
    )


def _with_merges(tables: list[TaskTable], num_tokens: int, *, num_rows: int, merge_all: bool) -> Work:
    """Number the partial rows of tasks whose rows have several parts, and say which rows they make up.

    Rows from `num_rows` on are parts of those so many before.
    """
    all_ids = np.concatenate([table.row_ids.ravel() for table in tables])
    parts = np.bincount(all_ids[all_ids >= 0] % num_rows)
    rows: list[NDArray[np.int32]] = []
    partials: list[NDArray[np.int64]] = []
    num_partials = 0
    first: NDArray[np.int64]
    for table in tables:
        is_split = (parts[np.maximum(table.row_ids, 0) % num_rows] > 1) & (table.row_ids >= 0)
        is_partial = np.any(is_split | (table.row_ids >= num_rows), axis=1) | merge_all  # all rows of a task or none
        first = num_partials + (np.cumsum(is_partial) - is_partial) * table.rows
        table.tasks[:, 4] = np.where(is_partial, first, NOT_SPLIT)
        num_partials += int(is_partial.sum()) * table.rows
        places = (first[:, None] + np.arange(table.rows))[is_partial]
        ids = table.row_ids[is_partial]
        rows.append(ids[ids >= 0] % num_rows)
        partials.append(places[ids >= 0])
    row, partial = np.concatenate(rows), np.concatenate(partials)
    order = np.argsort(row, kind="stable")
    merged_rows, first_of = np.unique(row[order], return_index=True)
    return Work(
        tables,
        num_partials,
        merged_rows.astype(np.int32),
        np.append(first_of, len(row)).astype(np.int32),
        partial[order].astype(np.int32),
        num_tokens,
    )
