"""Stores that hang, fail, lie or are slow: they cost hits, never a request, and hold nobody up."""

# ruff: noqa: F811 — fixtures are imported from tier_cores, and named again as parameters

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from torch import Tensor

from oracles import GreedyOracle
from page_stores import Hanging, MemoryStore, failing
from prompts import random_ids
from radixkv import AsyncEngine, EngineConfig, RequestOutput, SamplingParams
from radixkv.cache.namespace import Namespace
from radixkv.engine.assembly import assemble
from radixkv.engine.step_input import StepInput
from radixkv.memory.page_bytes import PageBytes
from radixkv.tiers.arrivals import Arrivals
from radixkv.tiers.page_store import FoundPage, PageFacts
from radixkv.tiers.tier import MAX_PROBE_S, Tier
from radixkv.tiers.writer import Pace, PageRecord, PageWriter
from tier_cores import PARAMS, PROMPT, Clock, Core, clock, make_core, store  # noqa: F401
from tiny_models import served_model


@pytest.fixture
def filled(store: MemoryStore, make_core: Callable[..., Core]) -> MemoryStore:
    """A store that holds `PROMPT`."""
    core = make_core(store)
    core.generate(PROMPT, SamplingParams(max_tokens=1))
    assert core.core.flush_tiers(30)
    return store


MakeCore = Callable[..., Core]


def test_while_a_request_loads_others_run(
    make_core: MakeCore, filled: MemoryStore, oracle: GreedyOracle, clock: Clock
) -> None:
    filled.before_read = hanging = Hanging()
    core = make_core(filled)
    loads = core.add(PROMPT)
    core.step_until_it_waits()
    assert core.core.waits_for_tiers
    assert core.core.stats().loading == 1
    other = random_ids(2, 9)
    runs = core.add(other)
    core.step_until_it_waits()
    assert core.outputs[runs].token_ids == oracle.continuation(other, 4)
    assert loads not in core.outputs
    hanging.go_on.set()
    core.run()
    assert core.outputs[loads].token_ids == oracle.continuation(PROMPT, 4)
    assert core.outputs[loads].cached_by == {"pool": 0, "disk": 29}


def test_a_request_waits_no_longer_than_its_patience_for_a_store_that_hangs(
    make_core: MakeCore, filled: MemoryStore, oracle: GreedyOracle, clock: Clock
) -> None:
    filled.before_read = hanging = Hanging()
    core = make_core(filled)
    request_id = core.add(PROMPT)
    core.step_until_it_waits()
    wait_s = core.core.wait_s
    assert wait_s is not None
    assert 0 < wait_s <= 2
    clock.now_s += wait_s
    core.run()
    assert core.outputs[request_id].token_ids == oracle.continuation(PROMPT, 4)
    assert core.outputs[request_id].cached_tokens == 0
    again = core.generate([*PROMPT[:20], *random_ids(3, 9)])
    assert again.cached_tokens == 20, "in the pool by now"
    stats = core.core.stats().tiers[0]
    assert (stats.loads, stats.given_up) == (1, 1)
    hanging.go_on.set()


def test_while_a_store_hangs_it_is_asked_for_nothing_more(
    make_core: MakeCore, filled: MemoryStore, clock: Clock
) -> None:
    filled.before_read = hanging = Hanging()
    core = make_core(filled)
    core.add(PROMPT)
    core.step_until_it_waits()
    assert hanging.entered.wait(30)
    clock.now_s += 3
    core.run()
    core.core.reset_cache()
    assert core.generate(PROMPT).cached_tokens == 0
    stats = core.core.stats().tiers[0]
    assert (stats.loads, stats.given_up, stats.unavailable) == (1, 1, 1)
    hanging.go_on.set()


@pytest.mark.parametrize(
    ("change", "cached_tokens"),
    [
        (lambda payloads: [None] * len(payloads), 0),
        (lambda payloads: [*payloads[:3], None, *payloads[4:]], 12),
        (lambda payloads: [*payloads[:2], payloads[2][:-1], *payloads[3:]], 8),
        (lambda payloads: [*payloads[:2], b"", *payloads[3:]], 8),
        (lambda payloads: payloads[:-1], 0),
        (lambda payloads: [*payloads, payloads[0]], 0),
        (lambda payloads: [], 0),
    ],
)
def test_what_arrived_before_a_page_that_is_gone_is_used(
    make_core: MakeCore,
    filled: MemoryStore,
    oracle: GreedyOracle,
    change: Callable[[list[bytes]], list[bytes]],
    cached_tokens: int,
) -> None:
    filled.change_payloads = change  # type: ignore[assignment]
    core = make_core(filled)
    output = core.generate(PROMPT)
    assert output.token_ids == oracle.continuation(PROMPT, 4)
    assert output.cached_tokens == cached_tokens
    stats = core.core.stats().tiers[0]
    assert (stats.loads, stats.missed, stats.loaded_tokens) == (1, 1, cached_tokens)


def test_a_store_that_cannot_be_read_is_left_alone_for_a_time_twice_as_long_each_time(
    make_core: MakeCore,
    filled: MemoryStore,
    oracle: GreedyOracle,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    filled.before_read = failing
    core = make_core(filled)
    reads = []
    with caplog.at_level(logging.WARNING, "radixkv"):
        for _ in range(12):
            core.core.reset_cache()
            output = core.generate(PROMPT)
            assert (output.token_ids, output.cached_tokens) == (oracle.continuation(PROMPT, 4), 0)
            reads.append(filled.num_reads)
            clock.now_s += 1
    assert reads == [1, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 4]
    (said,) = [record.message for record in caplog.records]
    assert (
        said == "reading from the disk tier failed, and is tried again from time to time: TierError: the medium is gone"
    )
    stats = core.core.stats().tiers[0]
    assert (stats.read_errors, stats.last_error) == (4, "TierError: the medium is gone")
    filled.before_read = lambda: None
    clock.now_s += 8
    core.core.reset_cache()
    assert core.generate(PROMPT).cached_tokens == 29


def test_a_store_that_cannot_be_written_costs_hits_alone(
    make_core: MakeCore, store: MemoryStore, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    store.before_write = failing
    core = make_core(store)
    with caplog.at_level(logging.WARNING, "radixkv"):
        for seed in range(4):
            core.generate(random_ids(seed, 20))
            assert core.core.flush_tiers(30)
    assert (store.num_writes, len(caplog.records)) == (1, 1)
    stats = core.core.stats().tiers[0]
    assert stats.write_errors == 1
    assert (stats.written_pages, stats.queued_bytes, stats.dropped_pages) == (0, 0, 24)
    store.before_write = lambda: None
    clock.now_s += 1
    core.generate(random_ids(1, 20))
    assert core.core.flush_tiers(30)
    assert len(store.pages) == 6, "what was computed before is handed down as soon as it is used again"


@pytest.mark.parametrize(
    "lie",
    [
        lambda found: found[1:],
        lambda found: [found[1], found[0], *found[2:]],
        lambda found: [*found[:2], FoundPage(found[2].parent_key, found[3].tokens, 4), *found[3:]],
        lambda found: [FoundPage(found[0].parent_key, found[0].tokens, 9), *found[1:]],
        lambda found: [*found[:2], FoundPage(found[2].parent_key, found[2].tokens, 2), *found[3:]],
        lambda found: [FoundPage(found[0].parent_key, found[0].tokens, 0)],
    ],
)
def test_pages_that_are_not_those_of_the_prompt_are_not_read(
    make_core: MakeCore,
    filled: MemoryStore,
    oracle: GreedyOracle,
    lie: Callable[[list[FoundPage]], list[FoundPage]],
) -> None:
    find = filled.find
    filled.find = lambda parent_key, tokens: lie(find(parent_key, tokens))  # type: ignore[method-assign]
    core = make_core(filled)
    assert core.generate(PROMPT).token_ids == oracle.continuation(PROMPT, 4)
    assert core.core.stats().tiers[0].read_errors > 0


def test_an_index_that_fails_costs_hits_alone(make_core: MakeCore, filled: MemoryStore, oracle: GreedyOracle) -> None:
    filled.before_find = failing
    core = make_core(filled)
    assert core.generate(PROMPT).token_ids == oracle.continuation(PROMPT, 4)
    assert core.core.stats().tiers[0].read_errors == 1


def test_a_request_that_is_aborted_while_it_loads_gives_everything_back(
    make_core: MakeCore, filled: MemoryStore
) -> None:
    filled.before_read = hanging = Hanging()
    core = make_core(filled)
    request_id = core.add(PROMPT)
    core.step_until_it_waits()
    (progress,) = core.core.abort(request_id)
    assert progress.output is not None
    assert progress.output.finish_reason == "abort"
    core.core.check_invariants()
    stats = core.core.stats()
    assert (stats.loading, stats.cache.leased_pages, stats.cache.num_leases) == (0, 0, 0)
    hanging.go_on.set()


def test_a_request_that_loads_makes_way_for_one_that_runs(
    make_core: MakeCore, filled: MemoryStore, oracle: GreedyOracle
) -> None:
    filled.before_read = hanging = Hanging()
    core = make_core(filled, kv_cache_tokens=64)
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    other = random_ids(2, 20)
    runs = core.add(other, params)
    core.step()
    loads = core.add(PROMPT)
    core.step()
    assert core.core.stats().loading == 1
    while runs not in core.outputs:
        core.step()
    hanging.go_on.set()
    core.run()
    assert core.outputs[runs].token_ids == oracle.continuation(other, 30)
    assert core.outputs[loads].token_ids == oracle.continuation(PROMPT, 4)
    assert core.outputs[loads].metrics.retractions > 0
    assert core.outputs[runs].metrics.retractions == 0
    assert core.outputs[loads].cached_tokens in (0, 29), "as the store had come back or not when it was admitted again"


def test_an_engine_is_closed_while_a_request_loads(make_core: MakeCore, filled: MemoryStore) -> None:
    filled.before_read = hanging = Hanging()
    core = make_core(filled)
    core.add(PROMPT)
    core.step_until_it_waits()
    assert hanging.entered.wait(30)
    threading.Timer(0.05, hanging.go_on.set).start()
    (progress,) = core.core.close()
    assert progress.output is not None
    assert progress.output.finish_reason == "abort"
    assert filled.num_closed == 1


def test_an_engine_in_a_thread_waits_for_loads_and_wakes_with_them(filled: MemoryStore, oracle: GreedyOracle) -> None:
    parts = assemble(served_model("llama"), None, EngineConfig(page_size=4, kv_cache_tokens=256, warm_start_share=0))

    async def main() -> RequestOutput:
        async with AsyncEngine.from_parts(replace(parts, stores=(filled,))) as engine:
            (output,) = await engine.generate(PROMPT, PARAMS)
            await engine.check_invariants()
            return output

    output = asyncio.run(main())
    assert output.token_ids == oracle.continuation(PROMPT, 4)
    assert output.cached_by["disk"] == 29


def test_a_tier_slower_than_computing_turns_itself_off_until_a_probe_finds_it_faster(
    make_core: MakeCore, store: MemoryStore, clock: Clock
) -> None:
    """The clock moves while pages are read, and while tokens are computed."""

    def compute(step: StepInput, run: Callable[[], Tensor]) -> Tensor:
        clock.now_s += 0.001 * len(step.token_ids)
        return run()

    def read() -> None:
        clock.now_s += 0.2

    prompt, other = random_ids(1, 60), random_ids(2, 60)
    core = make_core(store, around=compute)
    core.generate(prompt)
    assert core.core.flush_tiers(30)
    core = make_core(store, around=compute)
    core.generate(other)
    store.before_read = read
    assert core.generate(prompt).cached_by["disk"] == 59, "nothing is known of its speed"
    for _ in range(2):
        core.core.reset_cache()
        assert core.generate(prompt).cached_tokens == 0
        stats = core.core.stats().tiers[0]
        assert stats.is_slow
        core.core.reset_cache()
        assert core.core.explain(prompt, Namespace()).below == (("disk", 60, "slower than computing"),)
    assert stats.slower == 2
    clock.now_s += 10
    store.before_read = lambda: None
    core.core.reset_cache()
    num_reads, seen = store.num_reads, core.core.arrivals.count
    assert core.generate(prompt).cached_tokens == 0, "nobody waits for a probe"
    core.core.arrivals.wait(seen, 30)
    assert store.num_reads == num_reads + 1
    core.core.reset_cache()
    core.step()  # takes note of it
    assert core.generate(prompt).cached_by["disk"] == 59
    assert not core.core.stats().tiers[0].is_slow


def test_a_writer_that_hangs_takes_no_more_than_its_queue_holds() -> None:
    store = MemoryStore(4, 64)
    store.before_write = hanging = Hanging()
    writer = PageWriter(store, max_queued_bytes=5 * 64)
    facts = PageFacts(0.0, 0, 0, None, (None, None))
    records = [PageRecord(bytes([number]), b"root", bytes([number] * 16), facts) for number in range(5)]
    assert writer.num_accepted() == 5
    writer.hand_down(records[:3], np.zeros((3, 64), np.uint8))
    assert hanging.entered.wait(30)
    assert writer.num_accepted() == 2
    assert writer.is_queued(records[0].key)
    assert not writer.is_queued(records[3].key)
    writer.hand_down(records[3:], np.ones((2, 64), np.uint8))
    assert (writer.num_accepted(), writer.queued_bytes) == (0, 5 * 64)
    assert not writer.flush(0)
    assert not writer.close(0)
    assert writer.num_accepted() == 0
    hanging.go_on.set()
    assert writer.close(30)
    assert len(store.pages) == 5


def test_a_pace_lets_so_many_bytes_through_a_second() -> None:
    pace = Pace(100.0, now=10.0)
    assert pace.delay_s(10.0) == 0
    pace.took(250, 10.0)
    assert pace.delay_s(10.0) == 2.5
    assert pace.delay_s(12.0) == 0.5
    pace.took(100, 20.0)
    assert pace.delay_s(20.0) == 1.0, "what was not used before is not saved up"
    free = Pace(None, now=0.0)
    free.took(1 << 40, 0.0)
    assert free.delay_s(0.0) == 0


def test_a_store_that_cannot_be_closed_does_not_keep_an_engine_from_it(
    make_core: MakeCore, filled: MemoryStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> None:
        raise OSError("the folder is gone")

    core = make_core(filled)
    assert core.generate(PROMPT).cached_by["disk"] == 29
    monkeypatch.setattr(filled, "close", fails)
    assert core.core.close() == []
    assert "the disk tier cannot be closed" in caplog.text


def test_a_store_that_hangs_is_left_open(caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore(4, 64)
    store.before_write = hanging = Hanging()
    tier = Tier(store, Arrivals())
    facts = PageFacts(0.0, 0, 0, None, (None, None))
    tier.writer.hand_down([PageRecord(bytes(1), b"root", bytes(16), facts)], np.zeros((1, 64), np.uint8))
    assert hanging.entered.wait(30)
    tier.close(0.0)
    assert "the disk tier hangs, and is left open" in caplog.text
    assert store.num_closed == 0
    hanging.go_on.set()
    tier.close(30)
    assert (store.num_closed, len(store.pages)) == (1, 1)


def test_what_comes_after_the_end_is_neither_written_nor_read() -> None:
    store = MemoryStore(4, 64)
    tier = Tier(store, Arrivals())
    tier.close(30)
    facts = PageFacts(0.0, 0, 0, None, (None, None))
    tier.writer.hand_down([PageRecord(bytes(1), b"root", bytes(16), facts)], np.zeros((1, 64), np.uint8))
    assert (tier.writer.pages_dropped, store.pages) == (1, {})
    load = tier.reader.start([FoundPage(b"root", bytes(16), 4)])
    assert load.missed == "closed"
    assert tier.reader.look_up(list).is_over
    assert store.num_reads == 0


def test_a_probe_that_hangs_says_that_the_tier_is_slow(clock: Clock) -> None:
    store = MemoryStore(4, 64)
    store.before_read = hanging = Hanging()
    tier = Tier(store, Arrivals(), clock=clock)
    tier.rate.record(64, 1.0)
    assert not tier.rate.is_faster(64, 0.1, clock.now_s)
    clock.now_s += 3600.0
    tier.probe([FoundPage(b"root", bytes(16), 4)])
    assert hanging.entered.wait(30)
    tier.poll()
    assert tier.rate.seconds(64) == 1.0, "nothing is known yet"
    clock.now_s += MAX_PROBE_S + 1
    tier.poll()
    assert tier.rate.seconds(64) == MAX_PROBE_S + 1, "which took so long at least"
    assert tier.rate.is_slow
    hanging.go_on.set()
    tier.close(30)


def test_pages_that_cannot_be_copied_out_are_lost_below_alone(
    make_core: MakeCore,
    store: MemoryStore,
    oracle: GreedyOracle,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    core = make_core(store)
    with monkeypatch.context() as patch:
        patch.setattr(PageBytes, "read", fails)
        assert core.generate(PROMPT).token_ids == oracle.continuation(PROMPT, 4)
    assert "computed cannot be handed down" in caplog.text
    assert store.pages == {}
    other = random_ids(2, 30)
    assert core.generate(other).token_ids == oracle.continuation(other, 4)
    assert core.core.flush_tiers(30)
    assert len(store.pages) > 0
