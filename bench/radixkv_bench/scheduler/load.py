"""A scheduler under load, over a model that costs nothing."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from radixkv import EngineConfig, Lease, PrefixCache, SamplingParams
from radixkv.engine.arguments import CacheOptions
from radixkv.engine.request import Request
from radixkv.engine.resolved_config import ResolvedConfig
from radixkv.engine.scheduler import Scheduler
from radixkv.engine.span import Span
from radixkv.memory.req_to_token import ReqToTokenPool

PAGE_SIZE = 16
SHARED_SHARE = 0.75  # of each prompt, which it shares with others
PROMPTS_A_HEAD = 8
UNTIMED_ADMISSIONS = 10
OUTPUT_TOKENS = 2048  # of a request at most, so --steps and --admissions together, too
VOCABULARY = 32_000


class Short(StrEnum):
    """What waiting requests wait for."""

    ROWS = "rows"  # as many run as may
    PAGES = "pages"  # more could run, but nothing fits: each step looks for one that does


@dataclass(frozen=True, slots=True)
class Load:
    """How many requests run and wait, how long their prompts are, and what those that wait lack."""

    running: int
    waiting: int
    prompt_tokens: int
    short: Short


@dataclass(frozen=True, slots=True)
class Costs:
    """Processor time, in µs.

    `steps`: of each step that gives every running request its next token. When one of them has ended and another takes
    its place, `admissions`: of choosing that step, less choosing the step before, in which nobody came; `shares`: of
    sharing what the ended one computed and what the step did, and of giving back. `matches`: of `cache.acquire` and
    `release` for such a prompt alone.
    """

    steps: list[float]
    admissions: list[float]
    shares: list[float]
    matches: list[float]


class LoadedScheduler:
    """A scheduler with as many requests running, all of them decoding, and waiting as a load says."""

    def __init__(self, load: Load, seed: int) -> None:
        self.load = load
        prompts = _prompts(load.prompt_tokens, np.random.default_rng(seed))
        self._ids = itertools.count()
        self._filler: Lease | None = None  # holds all other pages, where pages are short
        self._prompts = prompts
        pages = -(-(load.prompt_tokens + OUTPUT_TOKENS) // PAGE_SIZE)
        rows = load.running + (load.short is Short.PAGES)
        self._cache = PrefixCache((rows + 2) * pages, PAGE_SIZE, copy_page=lambda *_: None, diagnostics=False)
        self.scheduler = Scheduler(
            _config(load, rows, self._cache.num_pages),
            self._cache,
            ReqToTokenPool(max_requests=rows, max_tokens=pages * PAGE_SIZE, page_size=PAGE_SIZE),
        )
        for _ in range(load.running):
            self.scheduler.add(self._request())
        while any(r.num_pending > 1 for r in self.scheduler.running) or len(self.scheduler.running) < load.running:
            self.step()
        if load.short is Short.PAGES:
            self._take_all_pages()
        for _ in range(load.waiting):
            self.scheduler.add(self._request())

    def close(self) -> None:
        """Give back what running requests and the filler hold."""
        for request in self.scheduler.running:
            request.running()[0].release()
        if self._filler is not None:
            self._filler.release()

    def _take_all_pages(self) -> None:
        """Leave no page to those that wait, and to each running request what its next tokens need."""
        for request in self.scheduler.running:
            lease, _ = request.running()
            lease.grow(self.load.prompt_tokens + OUTPUT_TOKENS)
        self._filler = self._cache.acquire(range(self._cache.available_pages * PAGE_SIZE))

    def step(self) -> list[Span]:
        """Choose a step's tokens, and compute them in no time."""
        batch = self.scheduler.next_batch()
        self._compute(batch)
        return batch

    def _compute(self, batch: list[Span]) -> None:
        for span in batch:
            self.scheduler.computed(span)
            if span.samples:
                span.request.append(1)

    def timed_step(self) -> tuple[float, float]:
        """Processor time of choosing one step and of all else in it, in µs."""
        started = time.process_time_ns()
        batch = self.scheduler.next_batch()
        chosen = time.process_time_ns()
        self._compute(batch)
        return (chosen - started) / 1e3, (time.process_time_ns() - chosen) / 1e3

    def timed_admission(self) -> tuple[float, float]:
        """The same where the oldest running request has ended; all else is also to share it and give it back."""
        request = self.scheduler.running[0]
        request.finish("stop")
        started = time.process_time_ns()
        self.scheduler.release(request)
        released_us = (time.process_time_ns() - started) / 1e3
        choosing_us, computing_us = self.timed_step()
        return choosing_us, released_us + computing_us

    def settle(self) -> None:
        """Compute what was admitted, and let another wait in its place."""
        while any(request.num_pending > 1 for request in self.scheduler.running):
            self.step()
        self.scheduler.add(self._request())

    def timed_match(self) -> float:
        """Processor time of acquiring and releasing the pages of a prompt, in µs."""
        prompt = next(self._prompts)
        started = time.process_time_ns()
        self._cache.acquire(prompt).release()
        return (time.process_time_ns() - started) / 1e3

    def _request(self) -> Request:
        return Request(
            id=next(self._ids),
            prompt_ids=next(self._prompts),
            params=SamplingParams(max_tokens=OUTPUT_TOKENS),
            cache_options=CacheOptions(),
            max_new_tokens=OUTPUT_TOKENS,
            stop_ids=frozenset(),
            generator=None,
            tokenizer=None,
            detokenizer=None,
        )


def measure(load: Load, *, steps: int, admissions: int, seed: int) -> Costs:
    """Put a scheduler under `load` and time it, without Python's own garbage collection."""
    gc.collect()
    gc.disable()
    try:
        loaded = LoadedScheduler(load, seed)
        times = [loaded.timed_step() for _ in range(steps)]
        costs = Costs([choosing + computing for choosing, computing in times], [], [], [])
        if load.waiting and load.short is Short.ROWS:
            for _ in range(UNTIMED_ADMISSIONS):  # until each of those that compete was looked up, once in its life
                loaded.timed_admission()
                loaded.settle()
            for _ in range(admissions):
                usual, _ = loaded.timed_step()
                choosing, sharing = loaded.timed_admission()
                costs.admissions.append(choosing - usual)
                costs.shares.append(sharing)
                loaded.settle()
                costs.matches.append(loaded.timed_match())
        loaded.close()
        return costs
    finally:
        gc.enable()


def _prompts(num_tokens: int, rng: np.random.Generator) -> Iterator[NDArray[np.int32]]:
    """Prompts of which every eight in a row share their first three quarters."""
    shared = int(num_tokens * SHARED_SHARE)
    while True:
        head = rng.integers(0, VOCABULARY, shared, dtype=np.int32)
        for _ in range(PROMPTS_A_HEAD):
            yield np.concatenate([head, rng.integers(0, VOCABULARY, num_tokens - shared, dtype=np.int32)])


def _config(load: Load, rows: int, num_pages: int) -> ResolvedConfig:
    config = EngineConfig(
        dtype="float32",
        device="cpu",
        page_size=PAGE_SIZE,
        kv_cache_tokens=num_pages * PAGE_SIZE,
        max_batch_tokens=load.prompt_tokens + rows,
        max_running_requests=rows,
        max_context_tokens=load.prompt_tokens + OUTPUT_TOKENS,
    )
    return ResolvedConfig.of(config, attention_backend="none")
