"""How long the operations of a radix tree take: by the number of leaves, and after many probes.

All of it is timed as `timeit` does, with the garbage collector off, and by the processor's time where the system counts
it finely enough: what others take from the processor is not the tree's.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import product, starmap
from statistics import median
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from radixkv import RadixTree
from radixkv.cache.tree.node import InsertResult, TreeNode

CLOCK_NAME = "thread_time" if time.get_clock_info("thread_time").resolution <= 1e-6 else "perf_counter"
CLOCK: Callable[[], float] = getattr(time, CLOCK_NAME)

SEED = 0
VOCABULARY = 128_000
ELSEWHERE = 2**30  # added to a token id, this makes one that is in no tree
SYSTEM_TOKENS = 256
LEAF_TOKENS = 64
FEW_SYSTEMS = 10
LEAVES_A_TENANT = 100
MOST_CALLS = 250  # timed together
BYTES_A_LEAF = 1400  # a generous estimate of what a leaf takes, with its part of the prompts

PROBED_PROMPTS = 256
PROBED_TOKENS = 2048
PINNED = 8  # at a time

FULL_HIT, PARTIAL_HIT, MISS = "match, full hit", "match, partial hit", "match, miss"
INSERT = f"insert of {LEAF_TOKENS} tokens"
EVICT_UNMATCHED, EVICT_MATCHED = "evict, never matched", "evict, matched before"
EVICT_FIRST, LOCK = "evict, first after matches", "lock and unlock"
OPERATIONS = (FULL_HIT, PARTIAL_HIT, MISS, INSERT, EVICT_UNMATCHED, EVICT_MATCHED, EVICT_FIRST, LOCK)
UNLIMITED = (EVICT_FIRST, LOCK)  # no target says how they may grow

Ints: TypeAlias = NDArray[np.int32]
OnStep: TypeAlias = Callable[[int], object]
"""Hears of steps done."""


def seconds_a_call(call: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], results: Any = None) -> float:
    """How long a call takes, on average over the second half of `arguments`.

    The first half warms up: what fits the processor's caches is in them then. Results go to the deque `results`, and
    are dropped without one.
    """
    kept = deque[Any](maxlen=0) if results is None else results
    half = len(arguments) // 2
    timed = arguments[half:]
    kept.extend(starmap(call, arguments[:half]))
    start = CLOCK()
    kept.extend(starmap(call, timed))
    return (CLOCK() - start) / len(timed)


# -- growth ----------------------------------------------------------------------------------------------------------


class Shape(StrEnum):
    """What hangs where."""

    SHARED = "shared"
    TENANTS = "tenants"
    FLAT = "flat"


SHAPES = {
    Shape.SHARED: f"leaves of {LEAF_TOKENS} tokens below {FEW_SYSTEMS} system prompts of {SYSTEM_TOKENS}",
    Shape.TENANTS: f"the same, a system prompt to every {LEAVES_A_TENANT} leaves",
    Shape.FLAT: f"all leaves of {LEAF_TOKENS} tokens below one root",
}


class Stock:
    """The tokens of leaves and system prompts, the same for all trees.

    No two leaves and no two system prompts begin with the same token, so that trees of every page size branch only
    where they are meant to.
    """

    def __init__(self, num_rows: int) -> None:
        rng = np.random.default_rng(SEED)
        self.leaves = random_rows(rng, num_rows, LEAF_TOKENS)
        self.systems = random_rows(rng, max(FEW_SYSTEMS, -(-num_rows // LEAVES_A_TENANT)), SYSTEM_TOKENS)


def random_rows(rng: np.random.Generator, num_rows: int, num_tokens: int) -> Ints:
    """Random tokens, [num_rows, num_tokens], no two rows with the same first one."""
    tokens = rng.integers(0, VOCABULARY, (num_rows, num_tokens), dtype=np.int32)
    tokens[:, 0] = rng.permutation(num_rows)
    return tokens


def num_systems(shape: Shape, num_leaves: int) -> int:
    """How many system prompts a tree of that shape has."""
    if shape is Shape.TENANTS:
        return max(1, num_leaves // LEAVES_A_TENANT)
    return FEW_SYSTEMS if shape is Shape.SHARED else 0


class GrownTree:
    """A tree whose first `num_leaves` rows of the stock are its leaves; rows beyond are for inserts.

    Neighbouring rows lie below different system prompts. The page ids of a row descend and are its own: so they can
    be told apart, and are kept as bytes, as ids are that come from a pool in use.
    """

    def __init__(self, shape: Shape, num_leaves: int, page_size: int, stock: Stock, on_step: OnStep) -> None:
        self.shape, self.num_leaves = shape, num_leaves
        self.tree = RadixTree(page_size)
        self._stock = stock
        self._num_systems = num_systems(shape, num_leaves)
        self.nodes: list[TreeNode] = []
        for row in range(num_leaves):
            self.nodes.append(self.tree.insert(*self.insertion(row)).node)
            if row % 1000 == 999:
                on_step(1000)
        on_step(num_leaves % 1000)

    def prompt(self, row: int) -> Ints:
        """A copy of the tokens from the root to the end of a leaf."""
        leaf: Ints = self._stock.leaves[row]
        if not self._num_systems:
            return leaf.copy()
        return np.concatenate((self._stock.systems[row % self._num_systems], leaf))

    def insertion(self, row: int) -> tuple[Ints, Ints]:
        """The arguments of the insert that brings a leaf."""
        leaf_pages = LEAF_TOKENS // self.tree.page_size
        pages = np.arange((row + 1) * leaf_pages - 1, row * leaf_pages - 1, -1, dtype=np.int32)
        if self._num_systems:
            system_pages = SYSTEM_TOKENS // self.tree.page_size
            first = len(self._stock.leaves) * leaf_pages + row % self._num_systems * system_pages
            pages = np.concatenate((np.arange(first, first + system_pages, dtype=np.int32)[::-1], pages))
        return self.prompt(row), pages

    def restore(self, freed: Iterable[Ints]) -> list[int]:
        """Put leaves back that were evicted. Returns: their rows."""
        rows = [int(pages[-1]) * self.tree.page_size // LEAF_TOKENS for pages in freed]
        for row in rows:
            self.nodes[row] = self.tree.insert(*self.insertion(row)).node
        return rows

    def match_in_random_order(self, rows: int | Sequence[int], seed: int) -> None:
        """Come back to each of these leaves once, or to each of the first `rows`."""
        for row in np.random.default_rng(seed).permutation(rows):
            self.tree.match_prefix(self.prompt(row))


Measure: TypeAlias = Callable[[GrownTree, "NDArray[np.int64]", int], dict[str, float]]
"""Seconds a call by operation, of calls with random rows as long as they are of use; the last argument is the round."""


def _evict_unmatched(grown: GrownTree, rows: NDArray[np.int64], number: int) -> dict[str, float]:
    freed = deque[Ints]()
    seconds = seconds_a_call(grown.tree.evict, [(LEAF_TOKENS,)] * len(rows), freed)
    grown.restore(freed)
    return {EVICT_UNMATCHED: seconds}


def _evict_and_insert(grown: GrownTree, rows: NDArray[np.int64], number: int) -> dict[str, float]:
    """As a full cache does it: what comes takes up the memory of what went."""
    first = grown.num_leaves + len(rows) * number
    inserted, freed = deque[InsertResult](), deque[Ints]()
    new = [grown.insertion(row) for row in range(first, first + len(rows))]
    seconds = {
        EVICT_MATCHED: seconds_a_call(grown.tree.evict, [(LEAF_TOKENS,)] * len(rows), freed),
        INSERT: seconds_a_call(grown.tree.insert, new, inserted),
    }
    for result in inserted:
        grown.tree.remove(result.node)
    grown.match_in_random_order(grown.restore(freed), seed=number)
    return seconds


def _match(grown: GrownTree, rows: NDArray[np.int64], number: int) -> dict[str, float]:
    prompts = [(grown.prompt(row),) for row in rows]
    return {FULL_HIT: seconds_a_call(grown.tree.match_prefix, prompts)}


def _match_in_part(grown: GrownTree, rows: NDArray[np.int64], number: int) -> dict[str, float]:
    """Each call cuts a leaf in the middle, and merges what the call before has cut."""
    prompts = [(grown.prompt(row),) for row in rows]
    for (prompt,) in prompts:
        prompt[-LEAF_TOKENS // 2 :] += ELSEWHERE
    return {PARTIAL_HIT: seconds_a_call(grown.tree.match_prefix, prompts)}


def _miss(grown: GrownTree, rows: NDArray[np.int64], number: int) -> dict[str, float]:
    prompts = [(grown.prompt(row) + np.int32(ELSEWHERE),) for row in rows]
    return {MISS: seconds_a_call(grown.tree.match_prefix, prompts)}


def _lock(grown: GrownTree, rows: NDArray[np.int64], number: int) -> dict[str, float]:
    lock, unlock = grown.tree.inc_lock_ref, grown.tree.dec_lock_ref

    def lock_and_unlock(node: TreeNode) -> None:
        lock(node)
        unlock(node)

    return {LOCK: seconds_a_call(lock_and_unlock, [(grown.nodes[row],) for row in rows])}


def _first_evict(grown: GrownTree, rows: NDArray[np.int64], number: int) -> dict[str, float]:
    """One call, after matches have put all leaves in a new order: it does what they may have left to do."""
    grown.match_in_random_order(grown.num_leaves, seed=number)
    start = CLOCK()
    freed = grown.tree.evict(LEAF_TOKENS)
    seconds = CLOCK() - start
    grown.restore([freed])
    return {EVICT_FIRST: seconds}


@dataclass(frozen=True, slots=True)
class Growth:
    """What one operation took, `us[i]` microseconds in a tree of `leaves[i]` leaves: medians over the rounds.

    `ratio` is the median of the ratios, within each round, of the largest tree's time to the smallest's.
    """

    shape: Shape
    operation: str
    leaves: list[int]
    us: list[float]
    ratio: float


def grow(leaves: Sequence[int], page_size: int, rounds: int, on_built: OnStep, on_round: OnStep) -> list[Growth]:
    """Build a tree of each shape and each number of `leaves`; time each operation in all of them, round by round.

    Every second round goes through the trees backwards. `leaves` ascend. `on_built` hears of leaves, `on_round` of the
    `num_rounds(rounds)` rounds.
    """
    calls = min(MOST_CALLS, leaves[0] // 8)
    stock = Stock(leaves[-1] + 2 * calls * rounds)
    trees = [GrownTree(shape, size, page_size, stock, on_built) for shape in Shape for size in leaves]
    times: dict[tuple[Shape, str], dict[int, list[float]]] = {}
    rng = np.random.default_rng(SEED)
    for measures, repeats in stages(rounds):
        for number in range(repeats):
            for measure, grown in product(measures, trees if number % 2 == 0 else trees[::-1]):
                rows = rng.integers(0, grown.num_leaves, 2 * calls)
                for operation, seconds in measure(grown, rows, number).items():
                    by_size = times.setdefault((grown.shape, operation), {})
                    by_size.setdefault(grown.num_leaves, []).append(seconds)
            on_round(1)
    return [
        growth_of(shape, operation, leaves, times[shape, operation]) for shape, operation in product(Shape, OPERATIONS)
    ]


def num_rounds(rounds: int) -> int:
    """How many rounds `grow` tells of."""
    return sum(repeats for _, repeats in stages(rounds))


def stages(rounds: int) -> list[tuple[tuple[Measure, ...], int]]:
    """What is timed one after the other, and how often."""
    matches = (_match, _match_in_part, _miss, _lock)
    return [((_evict_unmatched,), rounds), (matches, rounds), ((_first_evict,), 1), ((_evict_and_insert,), rounds)]


def growth_of(shape: Shape, operation: str, leaves: Sequence[int], by_size: dict[int, list[float]]) -> Growth:
    smallest, largest = by_size[leaves[0]], by_size[leaves[-1]]
    ratio = median(large / small for small, large in zip(smallest, largest, strict=True))
    return Growth(shape, operation, list(leaves), [median(by_size[size]) * 1e6 for size in leaves], ratio)


# -- after probes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Probed:
    """A tree after probes of one kind: nodes but the root, depth of the leaves, and what a match of a leaf takes.

    `probe_us` is what one probe took, on average.
    """

    probes: str
    nodes: int
    max_depth: int
    mean_depth: float
    probe_us: float
    match_us: float


def _nothing(tree: RadixTree, prompts: Sequence[Ints]) -> None:
    """What the others are compared with."""


def _match_each(tree: RadixTree, prompts: Sequence[Ints]) -> None:
    for prompt in prompts:
        tree.match_prefix(prompt)


def _lock_each(tree: RadixTree, prompts: Sequence[Ints]) -> None:
    """A few prefixes are pinned at a time, and unpinned in random order."""
    rng = np.random.default_rng(SEED)
    pinned: list[TreeNode] = []
    for prompt in prompts:
        node = tree.match_prefix(prompt).node
        tree.inc_lock_ref(node)
        pinned.append(node)
        if len(pinned) == PINNED:
            tree.dec_lock_ref(pinned.pop(rng.integers(PINNED)))
    for node in pinned:
        tree.dec_lock_ref(node)


def _branch_each(tree: RadixTree, prompts: Sequence[Ints]) -> None:
    """What continues the prefix in another way is evicted at once."""
    own = np.arange(ELSEWHERE, ELSEWHERE + LEAF_TOKENS, dtype=np.int32)
    for prompt in prompts:
        ids = np.concatenate((prompt, own))
        pages = np.arange(ELSEWHERE, ELSEWHERE + len(ids) // tree.page_size, dtype=np.int32)
        tree.remove(tree.insert(ids, pages).node)


NO_PROBES, BRANCHES = "none", "branch, evicted again"
LASTING = (BRANCHES, NO_PROBES)  # of which nobody says that they leave nothing
PROBES: dict[str, Callable[[RadixTree, Sequence[Ints]], None]] = {
    NO_PROBES: _nothing,
    "match": _match_each,
    "match, lock, unlock": _lock_each,
    BRANCHES: _branch_each,
}


def probe(num_probes: int, page_size: int, rounds: int, on_round: OnStep) -> list[Probed]:
    """Let equal trees see the same `num_probes` prefixes of random length, each by one kind of probe; compare them."""
    rng = np.random.default_rng(SEED)
    prompts = random_rows(rng, PROBED_PROMPTS, PROBED_TOKENS)
    pages = np.arange(prompts.size // page_size, dtype=np.int32).reshape(PROBED_PROMPTS, -1)
    cuts = rng.integers(1, PROBED_TOKENS // page_size, num_probes) * page_size
    asked = [prompts[row, :cut] for row, cut in zip(rng.integers(0, PROBED_PROMPTS, num_probes), cuts, strict=True)]
    trees = {name: RadixTree(page_size) for name in PROBES}
    probe_s: dict[str, float] = {}
    for name, tree in trees.items():
        for row in range(PROBED_PROMPTS):
            tree.insert(prompts[row], pages[row])
        start = CLOCK()
        PROBES[name](tree, asked)
        probe_s[name] = (CLOCK() - start) / num_probes
    match_s: dict[str, list[float]] = {name: [] for name in PROBES}
    for _ in range(rounds):
        arguments = [(prompts[row],) for row in rng.integers(0, PROBED_PROMPTS, 2 * MOST_CALLS)]
        for name, tree in trees.items():
            match_s[name].append(seconds_a_call(tree.match_prefix, arguments))
        on_round(1)
    return [_probed(name, tree, probe_s[name], median(match_s[name])) for name, tree in trees.items()]


def _probed(name: str, tree: RadixTree, probe_s: float, match_s: float) -> Probed:
    nodes = [(depth, node) for depth, node in tree.nodes() if depth]
    depths = [depth for depth, node in nodes if not node.children]
    return Probed(name, len(nodes), max(depths), sum(depths) / len(depths), probe_s * 1e6, match_s * 1e6)
