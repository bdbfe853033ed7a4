"""The tasks of the attention worker, against what they are to cover."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radixkv.attention.numba_tasks import MIN_SPLIT_TOKENS, TASKS_PER_THREAD, Heads, Reads, Work, plan_work
from radixkv.kernels.numba_arguments import NO_ROW, NOT_SPLIT
from radixkv.kernels.numba_cpu import MAX_ROWS
from radixkv.kernels.numba_emitter import LANES

Rows = list[tuple[int, int, int, int]]  # query row, page list, start, end


@st.composite
def batches(draw: st.DrawFn) -> tuple[Reads, int]:
    """What a batch of sequences reads, with prefixes that some share and with sinks, and how many tokens it has."""
    reads: list[tuple[int, list[int], list[int], list[int]]] = []
    num_tokens = 0
    for sequence in range(draw(st.integers(1, 6))):
        count = draw(st.sampled_from([1, 1, 1, 2, 5, 30]))
        last = draw(st.integers(1, 3000))
        start = min(draw(st.sampled_from([0, 0, 5, 100])), last - 1)
        tokens = list(range(num_tokens, num_tokens + count))
        reads.append((10 * sequence, tokens, [start] * count, [last + i for i in range(count)]))
        num_tokens += count
    for page_list in range(1, 1 + draw(st.integers(0, 2))):
        members = sorted(draw(st.sets(st.integers(0, num_tokens - 1), min_size=1)))
        last = draw(st.integers(1, 900))
        reads.append((page_list, members, [0] * len(members), [last] * len(members)))
    if draw(st.booleans()):
        page_list, tokens, _, ends = reads[0]
        reads.append(
            (page_list, [token + num_tokens for token in tokens], [0] * len(tokens), [min(e, 4) for e in ends])
        )
    arrays = [np.concatenate([read[i] for read in reads]).astype(np.int64) for i in (1, 2, 3)]
    page_lists, counts = np.array([read[0] for read in reads]), np.array([len(read[1]) for read in reads])
    return Reads(page_lists, counts, *arrays), num_tokens


def wanted_rows(reads: Reads, heads: Heads) -> Rows:
    """What each query row is to read."""
    page_lists = np.repeat(reads.page_lists, reads.counts)
    each = zip(page_lists.tolist(), *(values.tolist() for values in reads[2:]), strict=True)
    return [
        (token * heads.num_q_heads + head, page_list, start, end)
        for page_list, token, start, end in each
        for head in range(heads.num_q_heads)
    ]


def planned_rows(work: Work, heads: Heads) -> Rows:
    """What each row of each task reads, of the part that the task has."""
    found = []
    for table in work.tables:
        for task, *rows in zip(table.tasks.tolist(), table.row_ids, table.row_starts, table.row_ends, strict=True):
            head, page_list, first, last, _ = task
            assert first % LANES == 0
            for row, start, end in zip(*(values.tolist() for values in rows), strict=True):
                if row != NO_ROW:
                    assert row % heads.num_q_heads // heads.group == head, "another KV head's"
                    found.append((row, page_list, max(first, start), min(last, end)))
    return found


def joined(rows: Rows) -> Counter[tuple[int, int, int, int]]:
    """`rows`, with those that go on where another one ends as one."""
    whole: list[tuple[int, int, int, int]] = []
    for row, page_list, start, end in sorted(rows):
        if whole and whole[-1][:2] == (row, page_list) and whole[-1][3] == start:
            whole[-1] = (row, page_list, whole[-1][2], end)
        elif start < end:
            whole.append((row, page_list, start, end))
    return Counter(whole)


@given(
    batch=batches(),
    group=st.sampled_from([1, 2, 4, 7, 8, 12]),
    num_kv_heads=st.integers(1, 3),
    num_threads=st.sampled_from([1, 2, 8]),
    rows_of_extends=st.sampled_from([6, MAX_ROWS]),
    merge_all=st.booleans(),
)
@settings(max_examples=150)
def test_tasks_cover_what_is_to_be_read_once_and_say_what_is_merged(
    batch: tuple[Reads, int], group: int, num_kv_heads: int, num_threads: int, rows_of_extends: int, merge_all: bool
) -> None:
    reads, num_tokens = batch
    heads = Heads(group * num_kv_heads, num_kv_heads)
    options = {"num_tokens": num_tokens, "num_threads": num_threads, "rows_of_extends": rows_of_extends}
    work = plan_work(reads, heads, merge_all=merge_all, **options)
    planned = planned_rows(work, heads)
    assert joined(planned) == joined(wanted_rows(reads, heads))

    num_rows = num_tokens * heads.num_q_heads
    parts = Counter(row % num_rows for table in work.tables for row in table.row_ids.ravel().tolist() if row != NO_ROW)
    sinks = {row % num_rows for table in work.tables for row in table.row_ids.ravel().tolist() if row >= num_rows}
    merged = {
        row: set(work.merged_partials[first:last].tolist())
        for row, (first, last) in zip(work.merged_rows.tolist(), pairwise(work.merged_indptr.tolist()), strict=True)
    }
    assert set(merged) >= sinks | {row for row, count in parts.items() if count > 1}
    assert all(len(merged[row]) == parts[row] for row in merged), "all parts of a row, or none"
    places = [place for of_row in merged.values() for place in of_row]
    assert len(set(places)) == len(places)
    assert all(0 <= place < work.num_partials for place in places)
    for table in work.tables:
        for task, row_ids in zip(table.tasks.tolist(), table.row_ids.tolist(), strict=True):
            for place, row in enumerate(row_ids):
                if row != NO_ROW and task[4] != NOT_SPLIT:
                    assert task[4] + place in merged[row % num_rows]
                elif row != NO_ROW:
                    assert row not in merged
                    assert not merge_all


@pytest.mark.parametrize(("readers", "from_memory"), [(1, True), (4 * MAX_ROWS, True), (4 * MAX_ROWS + 1, False)])
def test_what_many_tasks_read_is_not_fetched_ahead_for_each(readers: int, from_memory: bool) -> None:
    tokens, ends = np.arange(readers), np.full(readers, 900)
    reads = Reads(np.zeros(1, np.int64), np.array([readers]), tokens, np.zeros_like(tokens), ends)
    work = plan_work(reads, Heads(1, 1), num_tokens=readers, num_threads=2, merge_all=False)
    assert [table.from_memory for table in work.tables] == [from_memory]


def test_long_reads_are_split_over_the_threads() -> None:
    one, none = np.ones(1, np.int64), np.zeros(1, np.int64)
    reads = Reads(none, one, none, none, 100_000 * one)
    work = plan_work(reads, Heads(4, 1), num_tokens=1, num_threads=2, merge_all=False)
    (table,) = work.tables
    assert len(table.tasks) == 2 * TASKS_PER_THREAD
    short = plan_work(
        reads._replace(ends=MIN_SPLIT_TOKENS * one), Heads(4, 1), num_tokens=1, num_threads=2, merge_all=False
    )
    assert len(short.tables[0].tasks) == 1
    assert short.num_partials == 0
