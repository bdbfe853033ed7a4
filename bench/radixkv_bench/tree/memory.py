"""What long paths and streams of requests cost a radix tree: matches against memcpy, bytes of metadata, time."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from radixkv import RadixTree
from radixkv.errors import MissingTokenizerError
from radixkv.replay.traces import BLOCKS, ExpandedBlocks, read_trace
from radixkv_bench.common.errors import BenchError
from radixkv_bench.tree.growth import CLOCK, SEED, VOCABULARY, Ints, OnStep, random_rows, seconds_a_call

NUM_PATHS = 8  # prompts that a race goes through
EDGE_TOKENS = 512
RACED_TOKENS = 2**19  # copied in one go

SYSTEM_PROMPTS = 16
SYSTEM_TOKENS = 1024
OWN_TOKENS = (64, 4096)
Floats: TypeAlias = NDArray[np.float64]

PAGE_IDS = CONSECUTIVE, SCATTERED = "consecutive", "scattered"
OPERATIONS = ("match", "lock", "evict", "insert", "unlock")
CLOCK_READINGS = 10_000


def read_prompts(trace: Path, limit: int) -> list[Ints]:
    """The first `limit` prompts of a trace of block ids or token ids, as token ids.

    Raises: InvalidRequestError for a malformed line; BenchError for a trace of texts.
    """
    try:
        read = read_trace(trace, limit=limit)
    except MissingTokenizerError:
        raise BenchError(f"{trace} is a trace of texts; --trace takes one of hash_ids or token_ids") from None
    requests = ExpandedBlocks(read.requests, read.key_tokens) if read.kind == BLOCKS else read.requests
    return [request.keys for request in requests]


def synthetic_prompts(num_tokens: int) -> list[Ints]:
    """Random prompts of `num_tokens` tokens or a little more in all.

    Each begins with one of a few system prompts; how many tokens of its own follow is uniform in `OWN_TOKENS`.
    """
    rng = np.random.default_rng(SEED)
    systems = rng.integers(0, VOCABULARY, (SYSTEM_PROMPTS, SYSTEM_TOKENS), dtype=np.int32)
    prompts: list[Ints] = []
    while num_tokens > 0:
        own = rng.integers(0, VOCABULARY, rng.integers(*OWN_TOKENS, endpoint=True), dtype=np.int32)
        prompts.append(np.concatenate((systems[rng.integers(SYSTEM_PROMPTS)], own)))
        num_tokens -= len(prompts[-1])
    return prompts


# -- a path against a memcpy -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CopyRace:
    """A match of a whole cached path of `tokens` tokens, in edges of `edge_tokens`, against a copy of these tokens.

    `ratio` is the median of the ratios within each round.
    """

    tokens: int
    edge_tokens: int
    match_us: float
    copy_us: float
    ratio: float

    @property
    def edges(self) -> int:
        """How many inserts brought the path, each its continuation."""
        return self.tokens // self.edge_tokens


def race_copies(lengths: Sequence[int], page_size: int, rounds: int, on_round: OnStep) -> list[CopyRace]:
    """Match paths of each length, and `ndarray.copy` the int32 tokens asked for, by turns.

    Both go through the same few prompts again and again: they come from the processor's caches as far as they fit.
    """
    paths = [Paths(length, edge, page_size) for length in lengths for edge in (length, EDGE_TOKENS)]
    times: list[list[tuple[float, float]]] = [[] for _ in paths]
    for number in range(rounds):
        for index in range(len(paths))[:: 1 if number % 2 == 0 else -1]:
            times[index].append(paths[index].race())
        on_round(1)
    return [
        CopyRace(
            path.tokens,
            path.edge_tokens,
            match_us=median(match_s for match_s, _ in race) * 1e6,
            copy_us=median(copy_s for _, copy_s in race) * 1e6,
            ratio=median(match_s / copy_s for match_s, copy_s in race),
        )
        for path, race in zip(paths, times, strict=True)
    ]


class Paths:
    """A tree of a few long prompts, inserted piece by piece."""

    def __init__(self, tokens: int, edge_tokens: int, page_size: int) -> None:
        self.tokens, self.edge_tokens = tokens, edge_tokens
        self.tree = RadixTree(page_size)
        prompts = list(random_rows(np.random.default_rng(SEED), NUM_PATHS, tokens))
        for number, prompt in enumerate(prompts):
            pages = np.arange(tokens // page_size, dtype=np.int32) + np.int32(number * tokens // page_size)
            for end in range(edge_tokens, tokens + 1, edge_tokens):
                self.tree.insert(prompt[:end], pages[: end // page_size])
        repeats = max(1, RACED_TOKENS // (tokens * NUM_PATHS))
        self.arguments = [(prompt,) for prompt in prompts] * (2 * repeats)

    def race(self) -> tuple[float, float]:
        """Seconds that a match and a copy take."""
        match_s = seconds_a_call(self.tree.match_prefix, self.arguments)
        return match_s, seconds_a_call(np.ndarray.copy, self.arguments)


# -- bytes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Metadata:
    """What a tree that holds `tokens` tokens in `nodes` nodes keeps for each of them.

    `bytes_per_token` is all that it asked for through Python's and numpy's allocators, as `tracemalloc` counts it,
    without what they round up; `key_bytes_per_token` and `page_bytes_per_token` are the part that are token ids and
    page ids.
    """

    page_size: int
    page_ids: str
    tokens: int
    nodes: int
    bytes_per_token: float
    key_bytes_per_token: float
    page_bytes_per_token: float


def measure_metadata(
    prompts: Sequence[Ints], capacity_tokens: int, page_sizes: Sequence[int], on_replay: OnStep
) -> list[Metadata]:
    """Run `prompts` through a tree of `capacity_tokens`, and see what it takes; once for each size and kind of page.

    Page ids are taken in turn from [0, capacity): in order (consecutive), or as a random permutation has them
    (scattered).

    Raises: BenchError if no prompt fills a page.
    """
    longest = max(map(len, prompts))
    if longest < max(page_sizes):
        raise BenchError(f"the longest prompt has {longest} tokens and fills no page of {max(page_sizes)}")
    measured: list[Metadata] = []
    for page_size, page_ids in product(page_sizes, PAGE_IDS):
        measured.append(_metadata(prompts, capacity_tokens, page_size, page_ids))
        on_replay(1)
    return measured


def num_replays(page_sizes: Sequence[int]) -> int:
    """How many replays `measure_metadata` tells of."""
    return len(page_sizes) * len(PAGE_IDS)


def _metadata(prompts: Sequence[Ints], capacity_tokens: int, page_size: int, page_ids: str) -> Metadata:
    pages = np.arange(max(capacity_tokens, *map(len, prompts)) // page_size, dtype=np.int32)
    if page_ids == SCATTERED:
        pages = np.random.default_rng(SEED).permutation(pages)
    ring = np.concatenate((pages, pages))  # what wraps around lies in one piece
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tree, next_page = RadixTree(page_size), 0
        for prompt in prompts:
            num_pages = len(prompt) // page_size
            hit_tokens = _serve(tree, prompt, ring[next_page : next_page + num_pages], capacity_tokens)
            next_page = (next_page + num_pages - hit_tokens // page_size) % len(pages)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    tokens, nodes = tree.total_size, [node for depth, node in tree.nodes() if depth]
    return Metadata(
        page_size,
        page_ids,
        tokens,
        len(nodes),
        bytes_per_token=(after - before) / tokens,
        key_bytes_per_token=sum(len(node.key) for node in nodes) / tokens,
        page_bytes_per_token=sum(len(node.pages) for node in nodes if isinstance(node.pages, bytes)) / tokens,
    )


def _serve(tree: RadixTree, prompt: Ints, pages: Ints, capacity_tokens: int) -> int:
    """What an engine asks of the tree for one request. Returns: the tokens that were found."""
    found = tree.match_prefix(prompt)
    tree.inc_lock_ref(found.node)
    excess = tree.total_size + len(prompt) - found.length - capacity_tokens
    if excess > 0:
        tree.evict(excess)
    tree.insert(prompt, pages)
    tree.dec_lock_ref(found.node)
    return found.length


# -- time ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Replay:
    """What a replay took, in microseconds a request.

    `us` has the time of each operation: the mean over the requests of the median over the rounds. Each includes one
    reading of the clock, which takes `clock_us`. `loop_us` is that of a whole loop in which nothing is timed.
    """

    page_size: int
    hit_rate: float
    us: dict[str, float]
    clock_us: float
    loop_us: float


def replay(
    prompts: Sequence[Ints], capacity_tokens: int, page_sizes: Sequence[int], rounds: int, on_round: OnStep
) -> list[Replay]:
    """Run `prompts` through trees of `capacity_tokens`, page size by page size in every round."""
    replays = [_Rounds(prompts, capacity_tokens, page_size) for page_size in page_sizes]
    for _ in range(rounds):
        for each in replays:
            each.run()
            on_round(1)
    return [each.result() for each in replays]


class _Rounds:
    """Replays of the same requests."""

    def __init__(self, prompts: Sequence[Ints], capacity_tokens: int, page_size: int) -> None:
        ids = np.arange(max(map(len, prompts)), dtype=np.int32)
        self._requests = [(prompt, ids[: len(prompt) // page_size]) for prompt in prompts]
        self._capacity_tokens, self._page_size = capacity_tokens, page_size
        self._hit_tokens = 0
        self._loop_s: list[float] = []
        self._split_s: list[Floats] = []

    def run(self) -> None:
        tree = RadixTree(self._page_size)
        start = CLOCK()
        self._hit_tokens = sum(_serve(tree, prompt, pages, self._capacity_tokens) for prompt, pages in self._requests)
        self._loop_s.append(CLOCK() - start)
        tree.clear()
        self._split_s.append(_replay_split(tree, self._requests, self._capacity_tokens))
        tree.clear()  # nodes point at each other, and the garbage collector may be off

    def result(self) -> Replay:
        split_us = np.median(self._split_s, axis=0).mean(axis=0) * 1e6
        return Replay(
            self._page_size,
            self._hit_tokens / sum(len(prompt) for prompt, _ in self._requests),
            dict(zip(OPERATIONS, split_us.tolist(), strict=True)),
            _clock_s() * 1e6,
            median(self._loop_s) * 1e6 / len(self._requests),
        )


def _replay_split(tree: RadixTree, requests: Sequence[tuple[Ints, Ints]], capacity_tokens: int) -> Floats:
    """Seconds of each operation of each request, [requests, operations]: `_serve` with a look at the clock after each.

    `perf_counter`: to read `process_time` takes longer than some of the operations.
    """
    now = time.perf_counter
    stamps: list[float] = []
    for prompt, pages in requests:
        start = now()
        found = tree.match_prefix(prompt)
        matched = now()
        tree.inc_lock_ref(found.node)
        locked = now()
        excess = tree.total_size + len(prompt) - found.length - capacity_tokens
        if excess > 0:
            tree.evict(excess)
        evicted = now()
        tree.insert(prompt, pages)
        inserted = now()
        tree.dec_lock_ref(found.node)
        stamps += (start, matched, locked, evicted, inserted, now())
    return np.diff(np.array(stamps).reshape(len(requests), -1))


def _clock_s() -> float:
    return median(after - before for before, after in pairwise(time.perf_counter() for _ in range(CLOCK_READINGS)))
