"""The table of tasks that the compiled CPU kernel works off: which query rows read which tokens of which pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from radixkv.kernels import numba_task_tables
from radixkv.kernels.numba_cpu import MAX_ROWS

MIN_SPLIT_TOKENS = 256  # shorter parts cost more in merging than they bring
TASKS_PER_THREAD = 6  # threads take tasks as they can: another one may be kept from its core


class Reads(NamedTuple):
    """Which tokens of a batch read which pages; those of one read have one list of pages. All int64.

    Attributes:
        page_lists: [reads], the first entry of each in the array of pages.
        counts: [reads], how many tokens each is for; at least one.
        tokens: places in the flattened batch; one beyond it stands for the token so many before, with another query.
        starts, ends: the positions that each of them sees, [start, end).
    """

    page_lists: NDArray[np.int64]
    counts: NDArray[np.int64]
    tokens: NDArray[np.int64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]

    @classmethod
    def joined(cls, parts: Sequence[Reads]) -> Reads:
        """Those of all `parts`."""
        return cls(*map(np.concatenate, zip(*parts, strict=True)))


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
    from_memory: bool  # few tasks read the same KV

    @property
    def rows(self) -> int:
        """Query rows of a task."""
        return int(self.row_ids.shape[1])

    @cached_property  # layers share a table
    def fields(self) -> dict[str, int]:
        """Its size and the addresses of its arrays, as `numba_arguments.ATTENTION` names them."""
        return {
            "num_tasks": len(self.tasks),
            "from_memory": self.from_memory,
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
    reads: Reads,
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
    few, others, num_partials, num_read, rows, indptr, partials = numba_task_tables.reads_cutter()(
        *reads,
        (heads.num_q_heads, heads.num_kv_heads),
        num_tokens * heads.num_q_heads,
        (min(heads.group, MAX_ROWS), rows_of_extends),
        MIN_SPLIT_TOKENS,
        num_threads * TASKS_PER_THREAD,
        merge_all,
    )
    tables = [TaskTable(*table) for table in (few, others) if len(table[0])]
    return Work(tables, num_partials, rows, indptr, partials, num_read)


def compile_planner() -> None:
    """Compile what `plan_work` calls, or load it from disk."""
    one, none = np.ones(1, np.int64), np.zeros(1, np.int64)
    plan_work(Reads(none, one, none, none, one), Heads(1, 1), num_tokens=1, num_threads=1, merge_all=False)
