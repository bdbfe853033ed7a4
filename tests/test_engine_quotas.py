"""Quotas in an engine: tenants that flood it, and tenants that are guaranteed a share."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest

from oracles import GreedyOracle
from prompts import random_ids
from radixkv import AsyncEngine, CacheQuota, Engine, EngineConfig, SamplingParams
from radixkv.engine.arguments import CacheOptions
from radixkv.engine.assembly import assemble
from radixkv.engine.core import EngineCore
from radixkv.engine.outputs import Progress
from radixkv.errors import ConfigError, PromptTooLongError
from runners import checked
from tiny_models import served_model

MakeEngine = Callable[..., Engine]
PAGE = 4


def quotas(**tokens: int) -> dict[str, CacheQuota]:
    return {name: CacheQuota(pool_tokens=number) for name, number in tokens.items()}


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True)


class Tenants:
    """An engine's core, stepped by hand, and requests of several tenants in it."""

    def __init__(self, model: str = "llama", **settings: Any) -> None:
        config = EngineConfig(**{"page_size": PAGE, "kv_cache_tokens": 64, **settings})
        parts = assemble(served_model(model), None, config)
        self.core, self._intake = EngineCore(parts), parts.new_intake()
        self.outputs: dict[int, Progress] = {}

    def ask(self, tenant: str, prompt: list[int], max_tokens: int) -> int:
        """Add a request; returns its id."""
        options, params = CacheOptions(extra_key=tenant), greedy(max_tokens)
        ids = self._intake.check(prompt, params, options.namespace)
        (request,) = self._intake.make(ids, params, options, streams=False)
        self.core.add(request)
        return request.id

    def step(self) -> None:
        for progress in self.core.step():
            if progress.output is not None:
                self.outputs[progress.request_id] = progress
        self.core.check_invariants()

    def run(self, most_steps: int = 500) -> None:
        """Step until everything has ended."""
        for _ in range(most_steps):
            if not self.core.requests:
                return
            self.step()
        raise AssertionError(f"requests did not end in {most_steps} steps: {self.core.requests}")

    def running(self) -> set[int]:
        return {request.id for request in self.core.requests if request.lease is not None}

    def used_tokens(self) -> list[int]:
        return [use.used_tokens for use in self.core.stats().cache.namespaces]


def test_a_tenants_prefix_survives_another_ones_flood_and_the_flood_is_served(
    make_engine: MakeEngine, oracle: GreedyOracle
) -> None:
    engine = checked(make_engine(page_size=PAGE, kv_cache_tokens=128))
    engine.set_quotas(quotas(anna=40))
    prompt = random_ids(1, 36)
    engine.generate(prompt, greedy(1), extra_key="anna")
    flood = [random_ids(100 + number, 50) for number in range(6)]
    outputs = engine.generate(flood, greedy(8), extra_key="flood")
    for ids, output in zip(flood, outputs, strict=True):
        assert output.token_ids == oracle.continuation(ids, 8)
    assert engine.stats().cache.evicted_tokens > 0
    (again,) = engine.generate(prompt, greedy(1), extra_key="anna")
    assert again.cached_tokens == 35
    engine.set_quotas({})
    engine.generate(flood, greedy(8), extra_key="flood")
    (without,) = engine.generate(prompt, greedy(1), extra_key="anna")
    assert without.cached_tokens < 35, "or else the quota would not have been what kept it"


def test_who_claims_its_share_gets_it_from_running_requests_beyond_theirs() -> None:
    tenants = Tenants()
    tenants.core.set_quotas(quotas(anna=24))
    flood = [tenants.ask("flood", random_ids(number, 12), 8) for number in range(3)]
    for _ in range(3):
        tenants.step()
    assert tenants.running() == set(flood)
    anna = tenants.ask("anna", random_ids(9, 20), 2)
    tenants.step()
    assert anna in tenants.running()
    assert flood[0] in tenants.running(), "the oldest of all never gives way"
    assert tenants.core.stats().retractions > 0
    tenants.run()
    assert {tenants.outputs[request_id].output.finish_reason for request_id in [*flood, anna]} == {"length"}


def test_who_claims_its_share_overtakes_those_that_wait_for_more_than_theirs() -> None:
    tenants = Tenants()
    tenants.core.set_quotas(quotas(anna=24))
    first = tenants.ask("flood", random_ids(1, 30), 10)
    tenants.step()
    waiting = [tenants.ask("flood", random_ids(number, 30), 4) for number in (2, 3)]
    anna = [tenants.ask("anna", random_ids(number, 10), 2) for number in (4, 5)]
    tenants.step()
    assert tenants.running() == {first, *anna}
    tenants.run()
    assert set(tenants.outputs) == {first, *waiting, *anna}
    assert tenants.core.stats().retractions == 0


def test_requests_within_their_share_are_not_retracted_for_those_beyond_theirs() -> None:
    tenants = Tenants()
    tenants.core.set_quotas(quotas(anna=24))
    flood = [tenants.ask("flood", random_ids(number, 4), 30) for number in range(3)]
    for _ in range(9):
        tenants.step()
    anna = tenants.ask("anna", random_ids(9, 8), 12)
    tenants.run()
    retractions = {number: progress.output.metrics.retractions for number, progress in tenants.outputs.items()}
    assert retractions[anna] == 0, "though it had computed least"
    assert sum(retractions[request_id] for request_id in flood) > 0


def test_a_request_that_could_never_run_beside_what_others_are_guaranteed_is_refused(make_engine: MakeEngine) -> None:
    engine = make_engine(page_size=PAGE, kv_cache_tokens=64)
    engine.set_quotas(quotas(anna=24, berta=16))
    for tenant, most in (("flood", 24), ("anna", 48), ("berta", 40), (None, 24)):
        (output,) = engine.generate(random_ids(1, most - 2), greedy(100), extra_key=tenant)
        assert (len(output.token_ids), output.finish_reason) == (2, "length")
        with pytest.raises(
            PromptTooLongError, match=rf"may have {most}, as the KV pool has room for beside what quotas"
        ):
            engine.generate(random_ids(1, most), greedy(1), extra_key=tenant)
    engine.set_quotas(quotas(anna=64))
    with pytest.raises(PromptTooLongError, match="may have 0, as the KV pool has room for beside"):
        next(engine.stream(random_ids(1, 1), greedy(1), extra_key="flood"))
    engine.set_quotas({})
    (output,) = engine.generate(random_ids(1, 60), greedy(100))
    assert len(output.token_ids) == 4


def test_the_largest_requests_that_are_accepted_run_beside_full_shares_of_others(make_engine: MakeEngine) -> None:
    engine = checked(make_engine(page_size=PAGE, kv_cache_tokens=64))
    engine.set_quotas(quotas(anna=24, berta=16))
    for name, size in (("anna", 20), ("berta", 12)):
        engine.generate(random_ids(size, size), greedy(4), extra_key=name)
    outputs = engine.generate([random_ids(number, 12) for number in range(4)], greedy(12), extra_key="flood")
    assert {output.finish_reason for output in outputs} == {"length"}
    assert [len(output.token_ids) for output in outputs] == [12] * 4


@pytest.mark.parametrize("seed", [0, 1, 2, *(pytest.param(n, marks=pytest.mark.stress) for n in range(3, 20))])
def test_everything_that_is_accepted_ends_with_the_right_tokens(oracle: GreedyOracle, seed: int) -> None:
    rng = random.Random(seed)
    tenants = Tenants(
        kv_cache_tokens=64,
        page_size=rng.choice([1, 2, 4]),
        max_batch_tokens=rng.choice([8, 16, 64]),
        max_running_requests=8,
        schedule_policy=rng.choice(["lpm", "fcfs"]),
        eviction_policy=rng.choice(["lru", "slru", "adaptive", "cost"]),
    )
    shares = rng.choice([{"anna": 24}, {"anna": 32, "berta": 16}, {"anna": 20, "berta": 20}])
    tenants.core.set_quotas(quotas(**shares))
    heads = [random_ids(100 + number, 8) for number in range(3)]
    asked = {}
    for number in range(40):
        prompt = rng.choice(heads)[: rng.randint(1, 8)] + random_ids(number, rng.randint(1, 5))
        max_tokens = rng.randint(1, 3)
        asked[tenants.ask(rng.choice(["anna", "berta", "flood"]), prompt, max_tokens)] = prompt, max_tokens
        for _ in range(rng.randint(0, 1)):
            tenants.step()
    tenants.run()
    for request_id, (prompt, max_tokens) in asked.items():
        assert tenants.outputs[request_id].output.token_ids == oracle.continuation(prompt, max_tokens)


@pytest.mark.parametrize("seed", range(2))
def test_the_same_where_layers_see_a_window(seed: int) -> None:
    rng = random.Random(seed)
    tenants = Tenants("mistral", page_size=2, kv_cache_tokens=96, max_running_requests=8, max_batch_tokens=16)
    tenants.core.set_quotas(quotas(anna=40, berta=16))
    roomy = Engine(served_model("mistral"), None, EngineConfig(page_size=2, kv_cache_tokens=1024))
    asked = {}
    for number in range(20):
        prompt = random_ids(100 + rng.randint(0, 4), 10) + random_ids(number, rng.randint(1, 10))
        max_tokens = rng.randint(1, 8)
        asked[tenants.ask(rng.choice(["anna", "berta", "flood"]), prompt, max_tokens)] = prompt, max_tokens
        for _ in range(rng.randint(0, 2)):
            tenants.step()
    tenants.run()
    for request_id, (prompt, max_tokens) in asked.items():
        (expected,) = roomy.generate(prompt, greedy(max_tokens))
        assert tenants.outputs[request_id].output.token_ids == expected.token_ids


def test_requests_that_quotas_came_too_late_to_refuse_end() -> None:
    tenants = Tenants()
    ids = [tenants.ask("flood", random_ids(number, 40), 10) for number in range(2)]
    tenants.step()
    tenants.core.set_quotas(quotas(anna=48))
    anna = [tenants.ask("anna", random_ids(number, 20), 4) for number in range(4, 8)]
    tenants.run()
    assert {tenants.outputs[request_id].output.finish_reason for request_id in anna} == {"length"}
    assert set(ids) < set(tenants.outputs)


def test_quotas_that_are_wrong_change_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine(page_size=PAGE, kv_cache_tokens=64)
    engine.set_quotas(quotas(anna=24))
    with pytest.raises(ConfigError, match="more than the pool's 64 tokens"):
        engine.set_quotas(quotas(anna=65))
    assert [use.guaranteed_tokens for use in engine.stats().cache.namespaces] == [24, 0]


def test_an_async_engine_takes_quotas_while_it_runs() -> None:
    async def use() -> None:
        parts = assemble(served_model("llama"), None, EngineConfig(page_size=PAGE, kv_cache_tokens=64))
        async with AsyncEngine.from_parts(parts) as engine:
            await engine.set_quotas(quotas(anna=40))
            with pytest.raises(PromptTooLongError, match="may have 24, as"):
                await engine.generate(random_ids(1, 30), greedy(1))
            await engine.generate(random_ids(1, 30), greedy(2), extra_key="anna")
            uses = (await engine.stats()).cache.namespaces
        assert [use.used_tokens for use in uses] == [32, 0]

    asyncio.run(use())
