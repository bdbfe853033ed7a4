"""Cuts what a batch reads into tasks of the attention worker, compiled by Numba: each step of decoding waits for it.

Arrays are int64 where nothing else is said. What is returned is described in `radixkv.attention.numba_tasks`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba as nb
import numpy as np

from radixkv.kernels import numba_arguments, numba_emitter
from radixkv.kernels.compiling import cache_depends_on, can_cache, inner
from radixkv.kernels.numba_arguments import NO_ROW, NOT_SPLIT
from radixkv.kernels.numba_emitter import LANES

PARTS = (numba_arguments, numba_emitter)
FEW_READERS = 4  # tasks of the same KV: up to so many it pays to fetch it ahead for each, as measured


@cache
def reads_cutter() -> Any:
    """The compiled function `cut_reads`, cached on disk."""
    sources = cache_depends_on(*PARTS)

    @nb.njit(cache=can_cache())
    def cut_reads(page_lists, counts, tokens, starts, ends, heads, num_rows, rows_of, min_split, at_once, merge_all):
        """Tables of tasks, for reads of few rows and for the others, and how their parts are merged.

        Args:
            page_lists, counts: [reads], where the list of pages of each begins, and how many tokens it is for.
            tokens, starts, ends: [tokens of all reads], in the order of the reads.
            heads: (query heads, KV heads).
            num_rows: query rows of the batch; those from there on are parts of those so many before.
            rows_of: rows of a task of (few rows, others).
            min_split, at_once: there are about `at_once` tasks, but none is split into less than `min_split` tokens.

        Returns: (table of few rows, of others, partial rows, tokens that all tasks read, merged rows, their indptr,
            their partials); a table is (tasks, row_ids, row_starts, row_ends, whether few tasks read the same).
        """
        _ = sources
        num_q_heads, num_kv_heads = heads
        group = num_q_heads // num_kv_heads
        is_large = (counts > 1) & (counts * group >= rows_of[1])
        few = _tiles(counts, tokens, starts, ends, num_q_heads, group, ~is_large, rows_of[0])
        others = _tiles(counts, tokens, starts, ends, num_q_heads, group, is_large, rows_of[1])
        num_read = num_kv_heads * (np.sum(few[2] - few[1]) + np.sum(others[2] - others[1]))
        split = max(min_split, _ceil_div(_ceil_div(num_read, at_once), LANES) * LANES)
        few_table = _split(page_lists, few, split, num_kv_heads, group)
        others_table = _split(page_lists, others, split, num_kv_heads, group)
        parts = np.zeros(num_rows, np.int64)
        _count_parts(few_table[1], parts)
        _count_parts(others_table[1], parts)
        begins = np.zeros(num_rows + 1, np.int32)  # partials of each row, one place further
        num_partials = _number_partials(few_table, parts, begins, 0, merge_all)
        num_partials = _number_partials(others_table, parts, begins, num_partials, merge_all)
        rows, indptr, partials = _merges(few_table, others_table, begins)
        return few_table, others_table, num_partials, num_read, rows, indptr, partials

    return cut_reads


@inner
def _ceil_div(a, b):
    return -(-a // b)


@inner
def _tiles(counts, tokens, starts, ends, num_q_heads, group, chosen, rows):
    """Rows that are taken together, for the first KV head: (read, start, end, row_ids, row_starts, row_ends)."""
    num_tiles = 0
    for r in range(len(counts)):
        if chosen[r]:
            num_tiles += _ceil_div(counts[r] * group, rows)
    read, start, end = np.empty(num_tiles, np.int64), np.empty(num_tiles, np.int64), np.empty(num_tiles, np.int64)
    row_ids = np.full((num_tiles, rows), NO_ROW, np.int32)
    row_starts, row_ends = np.zeros((num_tiles, rows), np.int32), np.zeros((num_tiles, rows), np.int32)
    tile = first_token = 0
    for r in range(len(counts)):
        num_places = counts[r] * group if chosen[r] else 0
        for first_place in range(0, num_places, rows):
            read[tile], start[tile], end[tile] = r, np.iinfo(np.int64).max, 0
            for place in range(first_place, min(first_place + rows, num_places)):
                token, row = first_token + place // group, place - first_place
                row_ids[tile, row] = tokens[token] * num_q_heads + place % group
                row_starts[tile, row], row_ends[tile, row] = starts[token], ends[token]
                start[tile], end[tile] = min(start[tile], starts[token]), max(end[tile], ends[token])
            start[tile] = start[tile] // LANES * LANES
            tile += 1
        first_token += counts[r]
    return read, start, end, row_ids, row_starts, row_ends


@inner
def _split(page_lists, tiles, split_tokens, num_kv_heads, group):
    """Tasks for every KV head and part of the tokens; partial results are numbered later.

    Tiles of one read over the same part go one after another: the part is in the cache then.
    """
    read, start, end, row_ids, row_starts, row_ends = tiles
    num_tasks, rows = 0, row_ids.shape[1]
    for tile in range(len(read)):
        num_tasks += num_kv_heads * _ceil_div(end[tile] - start[tile], split_tokens)
    tasks = np.empty((num_tasks, 5), np.int64)
    task_ids, task_starts, task_ends = (
        np.empty((num_tasks, rows), np.int32),
        np.empty((num_tasks, rows), np.int32),
        np.empty((num_tasks, rows), np.int32),
    )
    task = first = 0
    from_memory = True
    while first < len(read):
        last = first + 1
        while last < len(read) and read[last] == read[first]:
            last += 1
        from_memory &= last - first <= FEW_READERS
        most_splits = 0
        for tile in range(first, last):
            most_splits = max(most_splits, _ceil_div(end[tile] - start[tile], split_tokens))
        for head in range(num_kv_heads):
            for part in range(most_splits):
                for tile in range(first, last):
                    part_start = start[tile] + part * split_tokens
                    if part_start >= end[tile]:
                        continue
                    tasks[task, 0], tasks[task, 1] = head, page_lists[read[tile]]
                    tasks[task, 2], tasks[task, 3] = part_start, min(part_start + split_tokens, end[tile])
                    tasks[task, 4] = NOT_SPLIT
                    for row in range(rows):
                        row_id = row_ids[tile, row]
                        task_ids[task, row] = row_id + head * group if row_id >= 0 else NO_ROW
                        task_starts[task, row], task_ends[task, row] = row_starts[tile, row], row_ends[tile, row]
                    task += 1
        first = last
    return tasks, task_ids, task_starts, task_ends, from_memory


@inner
def _count_parts(task_ids, parts):
    for row_id in task_ids.ravel():
        if row_id >= 0:
            parts[row_id % len(parts)] += 1


@inner
def _number_partials(table, parts, begins, num_partials, merge_all):
    """Number the partial rows of tasks whose rows have several parts: all rows of a task, or none."""
    tasks, task_ids = table[0], table[1]
    num_rows, rows = len(parts), task_ids.shape[1]
    for task in range(len(tasks)):
        is_partial = merge_all
        for row in range(rows):
            row_id = task_ids[task, row]
            is_partial |= row_id >= num_rows or (row_id >= 0 and parts[row_id] > 1)
        if is_partial:
            tasks[task, 4] = num_partials
            num_partials += rows
            for row in range(rows):
                if task_ids[task, row] >= 0:
                    begins[task_ids[task, row] % num_rows + 1] += 1
    return num_partials


@inner
def _merges(few_table, others_table, begins):
    """Which rows are merged, and of which partial rows: (rows, indptr, partials), all int32."""
    num_rows = len(begins) - 1
    num_merged = 0
    for row in range(num_rows):
        num_merged += begins[row + 1] > 0
    rows, indptr = np.empty(num_merged, np.int32), np.zeros(num_merged + 1, np.int32)
    place = 0
    for row in range(num_rows):
        if begins[row + 1] > 0:
            rows[place], indptr[place + 1] = row, indptr[place] + begins[row + 1]
            place += 1
        begins[row + 1] += begins[row]
    partials = np.empty(begins[num_rows], np.int32)
    _list_partials(few_table, begins, partials)
    _list_partials(others_table, begins, partials)
    return rows, indptr, partials


@inner
def _list_partials(table, begins, partials):
    tasks, task_ids = table[0], table[1]
    for task in range(len(tasks)):
        for row in range(task_ids.shape[1]):
            if tasks[task, 4] != NOT_SPLIT and task_ids[task, row] >= 0:
                row_id = task_ids[task, row] % (len(begins) - 1)
                partials[begins[row_id]] = tasks[task, 4] + row
                begins[row_id] += 1
