"""Cores over a store that a test steps, on a clock that it sets."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from page_stores import MemoryStore
from prompts import random_ids
from radixkv import EngineConfig, RequestOutput, SamplingParams
from radixkv.engine.arguments import CacheOptions
from radixkv.engine.assembly import EngineParts, assemble
from radixkv.engine.core import EngineCore
from radixkv.memory.page_bytes import PageBytes
from runners import Around, TamperedRunner
from tiny_models import served_model

PARAMS = SamplingParams(max_tokens=4, ignore_eos=True)
PROMPT = random_ids(1, 30)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Core:
    """A core over a store, stepped by the test; the invariants are proved after every step."""

    def __init__(self, parts: EngineParts) -> None:
        self.core, self._intake = EngineCore(parts), parts.new_intake()
        self.outputs: dict[int, RequestOutput] = {}

    def add(self, prompt: list[int], params: SamplingParams = PARAMS) -> int:
        (request,) = self._intake.make(self._intake.check(prompt, params), params, CacheOptions(), streams=False)
        self.core.add(request)
        return request.id

    def step(self) -> None:
        for progress in self.core.step():
            if progress.output is not None:
                self.outputs[progress.request_id] = progress.output
        self.core.check_invariants()

    def step_until_it_waits(self) -> None:
        while self.core.has_work:
            self.step()

    def run(self) -> None:
        """Step until all requests have ended; loads are waited for."""
        while self.core.requests:
            seen = self.core.arrivals.count
            if self.core.has_work:
                self.step()
            else:
                self.core.arrivals.wait(seen, 30)

    def generate(self, prompt: list[int], params: SamplingParams = PARAMS) -> RequestOutput:
        request_id = self.add(prompt, params)
        self.run()
        return self.outputs[request_id]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make_core(clock: Clock) -> Iterator[Callable[..., Core]]:
    """Makes cores over stores, and closes them in the end; then nothing may be left of them."""
    cores: list[Core] = []

    def make(*stores: MemoryStore, around: Around | None = None, **settings: object) -> Core:
        config = EngineConfig(**{"page_size": 4, "kv_cache_tokens": 256, "warm_start_share": 0, **settings})  # type: ignore[arg-type]
        parts = assemble(served_model("llama"), None, config)
        if around is not None:
            parts = replace(parts, runner=TamperedRunner(parts.runner, around))
        cores.append(Core(replace(parts, stores=stores, clock=clock)))
        return cores[-1]

    yield make
    for made in cores:
        stats = made.core.stats()
        assert stats.cache.leased_pages == stats.cache.num_leases == 0
        made.core.close()
        assert made.core.stats().free_pages == made.core.stats().cache.num_pages
    for thread in threading.enumerate():
        assert not thread.name.startswith("radixkv-"), f"{thread} is left"


@pytest.fixture
def store() -> MemoryStore:
    parts = assemble(served_model("llama"), None, EngineConfig(page_size=4, kv_cache_tokens=64))
    return MemoryStore(4, PageBytes(parts.pool).payload_bytes)  # type: ignore[arg-type]
