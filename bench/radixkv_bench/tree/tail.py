"""The slowest calls of a radix tree under a mixed load: what a median does not show.

Each call is timed by itself, in the processor's time of its thread, with Python's collector off: its pauses are
measured apart, since they depend on all of the process. A call that took long by the clock alone was interrupted: the
system gave the processor to others.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from radixkv_bench.tree.growth import (
    CLOCK,
    ELSEWHERE,
    FULL_HIT,
    INSERT,
    LEAF_TOKENS,
    LOCK,
    MISS,
    PARTIAL_HIT,
    SEED,
    GrownTree,
    OnStep,
    Shape,
    Stock,
)

EVICT_LEAF, EVICT_PAGE = f"evict {LEAF_TOKENS} tokens", "evict a page"
SLOW_US = 1000.0
STEP = 1000  # turns between two reports of progress


@dataclass(frozen=True, slots=True)
class Tail:
    """Microseconds a call of one operation in a tree of `leaves` leaves, over `calls` calls.

    `slow_calls` took more than a millisecond of the processor, `waited_calls` by the clock.
    """

    leaves: int
    operation: str
    calls: int
    median_us: float
    p99_us: float
    p999_us: float
    max_us: float
    slow_calls: int
    waited_calls: int


@dataclass(frozen=True, slots=True)
class Pause:
    """Milliseconds of a full collection with a tree of `leaves` leaves in memory, and after `gc.freeze()`."""

    leaves: int
    collect_ms: float
    frozen_ms: float


def measure_tails(
    leaves: Sequence[int], page_size: int, calls: int, on_built: OnStep, on_turn: OnStep
) -> tuple[list[Tail], list[Pause]]:
    """Build a tree of each size, and call each operation `calls` times, taking turns."""
    tails, pauses = [], []
    for size in leaves:
        grown = GrownTree(Shape.SHARED, size, page_size, Stock(size + 2 * calls), on_built)
        for operation, seconds in _mixed_load(grown, calls, on_turn).items():
            us, waited_us = np.array(seconds).T * 1e6
            median, p99, p999 = np.percentile(us, [50, 99, 99.9]).tolist()
            slow = [int((times > SLOW_US).sum()) for times in (us, waited_us)]
            tails.append(Tail(size, operation, calls, median, p99, p999, float(us.max()), *slow))
        pauses.append(_pause(size))
    return tails, pauses


def _pause(leaves: int) -> Pause:
    start = CLOCK()
    gc.collect()
    collect_s = CLOCK() - start
    gc.freeze()
    start = CLOCK()
    gc.collect()
    frozen_s = CLOCK() - start
    gc.unfreeze()
    return Pause(leaves, collect_s * 1e3, frozen_s * 1e3)


def _mixed_load(grown: GrownTree, calls: int, on_turn: OnStep) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each call, of the processor and by the clock.

    What is evicted makes room for what is inserted, so the tree keeps its size.
    """
    tree, rng = grown.tree, np.random.default_rng(SEED)
    rows = rng.integers(0, grown.num_leaves, (calls, 4)).tolist()
    seconds: dict[str, list[tuple[float, float]]] = {}

    def timed(operation: str, call: Callable[..., Any], *arguments: Any) -> Any:
        waited, start = time.perf_counter(), CLOCK()
        result = call(*arguments)
        taken = CLOCK() - start
        seconds.setdefault(operation, []).append((taken, time.perf_counter() - waited))
        return result

    def lock_and_unlock(node: Any) -> None:
        tree.inc_lock_ref(node)
        tree.dec_lock_ref(node)

    for turn, (hit, partial, miss, locked) in enumerate(rows):
        timed(FULL_HIT, tree.match_prefix, grown.prompt(hit))
        prompt = grown.prompt(partial)
        prompt[-LEAF_TOKENS // 2 :] += ELSEWHERE
        timed(PARTIAL_HIT, tree.match_prefix, prompt)
        timed(MISS, tree.match_prefix, grown.prompt(miss) + np.int32(ELSEWHERE))
        timed(LOCK, lock_and_unlock, tree.match_prefix(grown.prompt(locked)).node)
        timed(INSERT, tree.insert, *grown.insertion(grown.num_leaves + turn))
        timed(EVICT_PAGE, tree.evict, 1)
        timed(EVICT_LEAF, tree.evict, LEAF_TOKENS - tree.page_size)
        if turn % STEP == STEP - 1:
            on_turn(STEP)
    on_turn(calls % STEP)
    return seconds
