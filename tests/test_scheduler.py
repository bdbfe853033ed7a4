"""Scheduling under pressure: tiny pools, eviction and retraction all the time, and the same tokens all the same."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from oracles import GreedyOracle
from prompts import random_ids
from radixkv import Engine, EngineConfig, SamplingParams
from radixkv.engine.arguments import CacheOptions
from radixkv.engine.assembly import assemble
from radixkv.engine.core import EngineCore
from radixkv.engine.prompts_in_progress import WORTH_WAITING_TOKENS
from radixkv.engine.request import Request
from radixkv.engine.scheduler import Scheduler
from runners import checked
from tiny_models import served_model

MakeEngine = Callable[..., Engine]


def make_core(**settings: object) -> tuple[EngineCore, Callable[[list[int], SamplingParams], int]]:
    """A core of the tiny Llama, and what adds a request to it and returns its id."""
    config = EngineConfig(**{"page_size": 4, "kv_cache_tokens": 1024, **settings})
    parts = assemble(served_model("llama"), None, config)
    core, intake = EngineCore(parts), parts.new_intake()

    def submit(prompt: list[int], params: SamplingParams) -> int:
        (request,) = intake.make(intake.check(prompt, params), params, CacheOptions(), streams=False)
        core.add(request)
        return request.id

    return core, submit


@pytest.mark.parametrize(
    ("seed", "schedule_policy"),
    [
        pytest.param(seed, policy, marks=[] if (seed, policy) in ((0, "lpm"), (1, "fcfs")) else [pytest.mark.stress])
        for seed in range(4)
        for policy in ("lpm", "fcfs")
    ],
)
def test_tokens_are_equal_under_constant_eviction_and_retraction(
    make_engine: MakeEngine, oracle: GreedyOracle, seed: int, schedule_policy: str
) -> None:
    rng = random.Random(seed)
    page_size = rng.choice([1, 2, 4])
    engine = checked(
        make_engine(
            page_size=page_size,
            kv_cache_tokens=48,
            max_batch_tokens=rng.choice([6, 16, 64]),
            max_running_requests=6,
            schedule_policy=schedule_policy,
        )
    )
    heads = [random_ids(100 + i, 12) for i in range(3)]
    prompts = [rng.choice(heads)[: rng.randint(3, 12)] + random_ids(i, rng.randint(1, 9)) for i in range(24)]
    params = [SamplingParams(max_tokens=rng.randint(1, 14), ignore_eos=True) for _ in prompts]
    outputs = engine.generate(prompts, params)
    for output, prompt, p in zip(outputs, prompts, params, strict=True):
        assert output.token_ids == oracle.continuation(prompt, p.max_tokens)
    stats = engine.stats()
    assert stats.retractions > 0
    assert stats.cache.evicted_tokens > 0
    assert sum(output.metrics.retractions for output in outputs) == stats.retractions


def test_a_retracted_sampling_request_draws_the_same_tokens(make_engine: MakeEngine) -> None:
    params = [SamplingParams(max_tokens=20, temperature=2.0, seed=i, ignore_eos=True) for i in range(4)]
    prompts = [random_ids(i, 8) for i in range(4)]
    roomy = make_engine().generate(prompts, params)
    tight_engine = checked(make_engine(page_size=2, kv_cache_tokens=50))
    tight = tight_engine.generate(prompts, params)
    assert tight_engine.stats().retractions > 0
    assert [output.token_ids for output in tight] == [output.token_ids for output in roomy]


def test_retraction_takes_the_one_that_loses_least_and_spares_the_oldest(make_engine: MakeEngine) -> None:
    engine = checked(make_engine(page_size=1, kv_cache_tokens=52))
    long, short = random_ids(1, 20), random_ids(2, 5)
    outputs = engine.generate([short, long, short[:4]], SamplingParams(max_tokens=12, ignore_eos=True))
    assert outputs[0].metrics.retractions == 0, "the oldest runs through, though it would lose least"
    assert outputs[1].metrics.retractions == 0, "the long one would lose more than the last one"
    assert outputs[2].metrics.retractions > 0


@pytest.fixture
def order_of_starts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Request ids in the order in which they are admitted."""
    order: list[int] = []
    start = Scheduler._start

    def recorded(self: Scheduler, request: Request) -> bool:
        started = start(self, request)
        if started:
            order.append(request.id)
        return started

    monkeypatch.setattr(Scheduler, "_start", recorded)
    return order


def one_at_a_time(make_engine: MakeEngine, **settings: object) -> Engine:
    return checked(make_engine(max_running_requests=1, **settings))


def test_longest_prefix_first(make_engine: MakeEngine, order_of_starts: list[int]) -> None:
    engine = one_at_a_time(make_engine)
    head = random_ids(1, 40)
    engine.generate(head, SamplingParams(max_tokens=1))
    prompts = [random_ids(2, 10), [*head[:12], 5], [*head[:32], 5], [*head[:20], 5]]
    engine.generate(prompts, SamplingParams(max_tokens=1))
    assert order_of_starts[1:] == [3, 4, 2, 1]


def test_first_come_first_served(make_engine: MakeEngine, order_of_starts: list[int]) -> None:
    engine = one_at_a_time(make_engine, schedule_policy="fcfs")
    head = random_ids(1, 40)
    engine.generate(head, SamplingParams(max_tokens=1))
    engine.generate([random_ids(2, 10), [*head[:12], 5], [*head[:32], 5]], SamplingParams(max_tokens=1))
    assert order_of_starts == [0, 1, 2, 3]


def test_ageing_bounds_how_often_a_request_is_overtaken(make_engine: MakeEngine, order_of_starts: list[int]) -> None:
    engine = one_at_a_time(make_engine, max_skips=3)
    head = random_ids(1, 40)
    engine.generate(head, SamplingParams(max_tokens=1))
    stranger = random_ids(2, 10)
    engine.generate([stranger] + [[*head[:36], i] for i in range(10, 20)], SamplingParams(max_tokens=1))
    assert order_of_starts.index(1) == 1 + 3, "overtaken three times, then first"


def test_a_request_waits_for_the_one_that_computes_its_prefix(
    make_engine: MakeEngine, order_of_starts: list[int]
) -> None:
    engine = checked(make_engine(max_batch_tokens=40))
    head = random_ids(1, 30)
    other = random_ids(2, 6)
    outputs = engine.generate([[*head, 7, 8], [*head, 9, 10], other], SamplingParams(max_tokens=1))
    assert order_of_starts == [0, 2, 1], "the stranger does not wait"
    assert [output.cached_tokens for output in outputs] == [0, 30, 0]


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("spared_tokens", [WORTH_WAITING_TOKENS - 1, WORTH_WAITING_TOKENS])
def test_nobody_waits_to_be_spared_a_few_tokens(make_engine: MakeEngine, page_size: int, spared_tokens: int) -> None:
    engine = checked(make_engine(page_size=page_size))
    head = random_ids(1, spared_tokens)
    outputs = engine.generate([[*head, 7, 8], [*head, 9, 10]], SamplingParams(max_tokens=1))
    assert outputs[1].cached_tokens == (spared_tokens if spared_tokens >= WORTH_WAITING_TOKENS else 0)


def test_nobody_waits_where_nothing_is_shared() -> None:
    core, submit = make_core(prefix_cache=False)
    head = random_ids(1, 40)
    ids = [submit([*head, last], SamplingParams(max_tokens=2)) for last in (7, 8)]
    assert [progress.request_id for progress in core.step()] == ids, "both begin in one step"
    core.close()


def test_what_is_cached_already_is_not_waited_for(make_engine: MakeEngine, order_of_starts: list[int]) -> None:
    engine = checked(make_engine())
    head = random_ids(1, 40)
    params = SamplingParams(max_tokens=1)
    engine.generate(head[: 40 - WORTH_WAITING_TOKENS + 1], params)
    outputs = engine.generate([[*head, 7, 8], [*head, 9, 10]], params)
    assert order_of_starts == [0, 1, 2]
    assert [output.cached_tokens for output in outputs] == [25, 25]


def test_prompts_in_progress_are_shared_chunk_by_chunk() -> None:
    core, submit = make_core(max_batch_tokens=8)
    head = random_ids(1, 32)
    request_id = submit(head + random_ids(3, 20), SamplingParams(max_tokens=1))
    for _ in range(2):
        core.step()
    assert core.cache.peek(head) == 16
    core.abort(request_id)
    assert core.cache.peek(head) == 16, "what an aborted request computed stays"


def test_abort_while_waiting_and_while_running() -> None:
    core, submit = make_core(max_running_requests=1)
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    ids = [submit(random_ids(i, 10), params) for i in range(2)]
    (progress,) = core.step()
    assert (progress.request_id, len(progress.token_ids), progress.output) == (ids[0], 1, None)
    assert (core.stats().running, core.stats().waiting) == (1, 1)
    for request_id, num_tokens in zip(ids, (1, 0), strict=True):
        (last,) = core.abort(request_id)
        assert last.output is not None
        assert (last.token_ids, last.output.finish_reason) == ([], "abort")
        assert len(last.output.token_ids) == num_tokens
        assert core.abort(request_id) == [], "it has ended"
        core.check_invariants()
    assert (core.stats().running, core.stats().waiting) == (0, 0)
    assert core.step() == []


@pytest.mark.stress
def test_long_stress(make_engine: MakeEngine, oracle: GreedyOracle) -> None:
    """Thousands of requests through a pool that holds three of them, aborts among them."""
    rng = random.Random(7)
    engine = checked(make_engine(page_size=2, kv_cache_tokens=60, max_batch_tokens=24, max_running_requests=8))
    heads = [random_ids(100 + i, 16) for i in range(5)]
    for round_ in range(60):
        prompts = [rng.choice(heads)[: rng.randint(1, 16)] + random_ids(i, rng.randint(1, 9)) for i in range(30)]
        params = [SamplingParams(max_tokens=rng.randint(1, 16), ignore_eos=True) for _ in prompts]
        stream = engine.stream(random_ids(round_, 9), SamplingParams(max_tokens=9, ignore_eos=True))
        next(stream)
        outputs = engine.generate(prompts, params)
        for output, prompt, p in zip(outputs, prompts, params, strict=True):
            assert output.token_ids == oracle.continuation(prompt, p.max_tokens)
        stream.close()
