"""Simulated replicas: the figures against dull simulations."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from radixkv.cluster.router import ROUTERS, new_router
from radixkv.errors import ConfigError, NoReplicaError
from radixkv.replay.fleet import Fleet, FleetResult, Happening
from radixkv.replay.holders import PageHolders
from radixkv.replay.page_numbers import PagedTrace, number_pages
from radixkv.replay.replicas import LOAD_SHARE, arrival_times_s, simulate_fleet
from radixkv.replay.simulation import replay_trace
from radixkv.replay.traces import Request
from stress_cases import some_of

PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=25)


def requests_of(prompts: Sequence[Sequence[int]]) -> list[Request]:
    return [Request.of_tokens(prompt, [7, 8], time_s=float(number)) for number, prompt in enumerate(prompts)]


def conversations(num_requests: int, num_sessions: int, *, shared: bool = True, seed: int = 0) -> list[Request]:
    """Blocks of 100 tokens: a system prompt, and sessions that grow by up to 8 blocks a turn; unshared: all are new."""
    generator = random.Random(seed)
    histories: dict[int, list[int]] = {}
    fresh = iter(range(1, 10**9))
    requests = []
    for number in range(num_requests):
        session = generator.randrange(num_sessions)
        history = histories.setdefault(session, [0]) if shared else []
        history += [next(fresh) for _ in range(generator.randint(1, 8))]
        blocks = np.array(history, np.int32)
        requests.append(Request(blocks, blocks, 100 * len(blocks), float(number)))
        if len(history) > 60:
            del histories[session]
    return requests


def paged(requests: list[Request], key_tokens: int = 100) -> PagedTrace:
    return number_pages(requests, key_tokens=key_tokens)


def simulated(trace: PagedTrace, fleet: Fleet, router: str) -> FleetResult:
    return simulate_fleet(trace, fleet, new_router(router), router)


# -------------------------------------------------------------------------------------------------------------- parts


@given(PROMPTS, st.sampled_from([1, 2, 3]))
def test_numbers_of_pages(prompts: list[list[int]], page_size: int) -> None:
    requests = requests_of(prompts)
    trace = number_pages(requests, page_size)
    names: dict[tuple[int, ...], int] = {}  # of all that a page stands for
    for request, numbered in zip(requests, trace.requests, strict=True):
        ends = range(page_size, len(request.stored) + 1, page_size)
        spelled = [tuple(request.stored[:end].tolist()) for end in ends]
        assert numbered.pages.tolist() == [names.setdefault(prefix, len(names)) for prefix in spelled]
        assert numbered.num_looked_up == len(request.keys) // page_size
    assert (trace.num_pages, trace.num_tokens) == (len(names), sum(map(len, prompts)))


def test_what_all_share_tells_no_sessions_apart() -> None:
    requests = [Request.of_tokens(ids) for ids in ([0, 0, 1, 5], [0, 0, 2, 5], [0, 0, 1, 6])]
    first, second, third = [request.affinity for request in number_pages(requests).requests]
    assert first == third != second


def test_requests_come_in_order_of_time() -> None:
    requests = [Request.of_tokens([number], time_s=time_s) for number, time_s in enumerate([3.0, 1.0, 2.0])]
    assert [request.time_s for request in number_pages(requests).requests] == [1.0, 2.0, 3.0]


@given(st.lists(st.tuples(st.sampled_from("sreEf"), st.integers(0, 2), st.integers(0, 5), st.integers(1, 4))))
def test_holders(steps: list[tuple[str, int, int, int]]) -> None:
    holders = PageHolders(10)
    stored: set[tuple[int, int]] = set()
    expected: list[tuple[int, range]] = []
    for step, replica, first, number in steps:
        pages = range(first, first + number)
        pairs = {(replica, page) for page in pages}
        if step == "s":
            holders.store(replica, pages)
            stored |= pairs
        elif step == "r":
            holders.remove(replica, pages)
            stored -= pairs
        elif step == "e":
            holders.expect(replica, pages)
            expected.append((replica, pages))
        elif step == "E" and expected:
            holders.expect_no_more(*expected.pop())
        elif step == "f":
            holders.forget(replica)
            stored = {pair for pair in stored if pair[0] != replica}
            expected = [entry for entry in expected if entry[0] != replica]
        held = stored | {(replica, page) for replica, pages in expected for page in pages}
        for wanted in ([0, 1, 2, 3], [2], [], [4, 5, 6, 7, 8, 9]):
            leading = {}
            for replica in range(3):
                missing = [place for place, page in enumerate(wanted) if (replica, page) not in held]
                leading[replica] = missing[0] if missing else len(wanted)
            assert holders.leading(wanted) == {replica: pages for replica, pages in leading.items() if pages}


# --------------------------------------------------------------------------------------------------------- simulation


@given(PROMPTS, st.integers(1, 4), st.integers(1, 12), st.sampled_from([1, 2]))
def test_replicas_in_turn_are_caches_of_their_own(
    prompts: list[list[int]], num_replicas: int, pages: int, page_size: int
) -> None:
    """What each one hits is a replay of every so many-th request; waits are those of one queue each (Lindley)."""
    requests = requests_of(prompts)
    capacity = pages * page_size
    trace = number_pages(requests, page_size)
    fleet = Fleet(num_replicas, capacity * num_replicas, load=0.9, prefill_tokens_per_s=10.0)
    result = simulated(trace, fleet, "round-robin")
    arrivals = arrival_times_s(trace, fleet)
    hit_tokens = 0
    for replica in range(num_replicas):
        mine = requests[replica::num_replicas]
        free_at, work_s, hits = 0.0, 0.0, [0]
        for number, request in enumerate(mine):
            hits.append(replay_trace(mine[: number + 1], "lru", capacity, page_size).hit_tokens)
            took_s = max(1, request.num_tokens - (hits[-1] - hits[-2])) / 10
            arrival = arrivals[replica + number * num_replicas]
            free_at = max(free_at, arrival) + took_s
            work_s += took_s
            assert result.ttft_s[replica + number * num_replicas] == pytest.approx(free_at - arrival)
        hit_tokens += hits[-1]
        assert result.work_s[replica] == pytest.approx(work_s)
    assert result.hit_tokens == hit_tokens


@pytest.mark.parametrize("router", some_of(ROUTERS, {"cost", "random", "consistent-hash"}))
def test_one_replica_is_one_cache(router: str) -> None:
    requests = conversations(300, 20)
    result = simulated(paged(requests), Fleet(1, 20_000), router)
    assert result.hit_tokens == replay_trace(requests, "lru", 20_000, 1, key_tokens=100).hit_tokens
    assert result.max_over_mean_work == 1
    assert result.query_tokens == sum(request.num_tokens for request in requests)


@pytest.mark.parametrize("load", [0.3, 0.6])
def test_the_load_is_what_would_be_computed_without_hits(load: float) -> None:
    trace = paged(conversations(200, 20, shared=False))
    fleet = Fleet(4, 40_000, load=load)
    result = simulated(trace, fleet, "random")
    duration_s = arrival_times_s(trace, fleet)[-1]
    assert sum(result.work_s) / 4 / duration_s == pytest.approx(load)


def test_a_trace_without_times_has_gaps_of_the_same_load() -> None:
    requests = [request._replace(time_s=0.0) for request in conversations(200, 20)]
    times = arrival_times_s(paged(requests), Fleet(4, 40_000))
    assert times == sorted(set(times))
    assert times[-1] == pytest.approx(sum(request.num_tokens for request in requests) / 10_000 / 4 / 0.6)
    assert arrival_times_s(paged(requests[:1]), Fleet(1, 1000)) == [0.0]


def test_the_cost_router_keeps_the_hits_of_one_cache_and_shares_the_work() -> None:
    requests = conversations(1500, 60)
    trace, fleet = paged(requests), Fleet(8, 120_000)
    alone = replay_trace(requests, "lru", 120_000, 1, key_tokens=100).hit_rate
    cost, hashed, drawn = (simulated(trace, fleet, name) for name in ("cost", "consistent-hash", "random"))
    assert cost.hit_rate >= 0.9 * alone  # of 1,500 requests the price is learned on the first few hundred
    assert cost.max_over_mean_work <= 1.1
    assert cost.ttft_percentile_s(50) <= 1.05 * hashed.ttft_percentile_s(50)
    assert cost.ttft_percentile_s(99) <= 0.8 * hashed.ttft_percentile_s(99)
    assert drawn.hit_rate < 0.8 * alone


def test_without_shared_prefixes_it_is_no_worse_than_chance() -> None:
    trace, fleet = paged(conversations(600, 60, shared=False)), Fleet(8, 120_000)
    cost, drawn = simulated(trace, fleet, "cost"), simulated(trace, fleet, "random")
    assert cost.hit_tokens == drawn.hit_tokens == 0
    assert cost.max_over_mean_work <= drawn.max_over_mean_work
    for percent in (50, 99):
        assert cost.ttft_percentile_s(percent) <= drawn.ttft_percentile_s(percent)


def test_requests_that_decode_make_prompts_take_longer() -> None:
    requests = [Request.of_tokens([number] * 100, time_s=float(number)) for number in range(3)]
    trace = number_pages(requests, 10)
    fleet = Fleet(1, 1000, load=0.5, prefill_tokens_per_s=100.0, decode_s=4.5)  # arrivals after 0, 3 and 6 seconds
    assert simulated(trace, fleet, "cost").ttft_s == pytest.approx([1.0, 1.02, 1.02])  # the first has ended at 5.5
    assert simulated(trace, Fleet(1, 1000, load=0.5), "cost").ttft_s == pytest.approx([0.01] * 3)


def test_a_shared_tier_makes_any_router_hit_what_was_computed_before() -> None:
    requests = conversations(500, 40)
    trace = paged(requests)
    alone = replay_trace(requests, "lru", 10**7, 1, key_tokens=100)
    fleet = Fleet(4, 16_000, shared_tokens=10**7, load=0.01)  # nothing waits, so nothing is computed twice at once
    result = simulated(trace, fleet, "random")
    assert result.hit_tokens == alone.hit_tokens
    assert 0 < result.shared_hit_tokens < result.hit_tokens
    work = result.query_tokens - result.hit_tokens + LOAD_SHARE * result.shared_hit_tokens
    assert sum(result.work_s) * fleet.prefill_tokens_per_s == pytest.approx(work)
    assert simulated(trace, Fleet(4, 16_000, load=0.01), "random").hit_tokens < result.hit_tokens


# ---------------------------------------------------------------------------------------------------------- incidents


@pytest.mark.parametrize("router", some_of(ROUTERS, {"cost", "consistent-hash", "sglang-cache-aware"}))
def test_no_request_is_lost_when_replicas_die_and_join(router: str) -> None:
    trace = paged(conversations(400, 30))
    happenings = [
        Happening(100, "die", 0),
        Happening(100, "die", 0),
        Happening(150, "join"),
        Happening(200, "drain", 1),
        Happening(250, "die", 4),
        Happening(300, "slow", 2, 3.0),
    ]
    result = simulated(trace, Fleet(4, 40_000, load=0.9, decode_s=0.5, happenings=happenings), router)
    assert (result.ttft_s > 0).all()
    assert len(result.work_s) == 5
    calm = simulated(trace, Fleet(4, 40_000, load=0.9), router)
    if router != "best-match":  # which sends all to one
        assert sum(result.work_s) > sum(calm.work_s)  # some was computed in vain


def test_the_dead_and_the_drained_get_nothing_and_the_new_one_its_part() -> None:
    trace = paged(conversations(1000, 60))
    happenings = [Happening(0, "drain", 1), Happening(500, "die", 0), Happening(500, "join")]
    result = simulated(trace, Fleet(4, 60_000, load=0.6, happenings=happenings), "cost")
    dead, drained, old, other, new = result.work_s
    assert drained == 0
    assert 0 < dead < 0.7 * old
    assert new > 0.35 * old
    assert old == pytest.approx(other, rel=0.15)


def test_a_slow_replica_does_not_set_the_pace() -> None:
    trace = paged(conversations(600, 60))
    happenings = [Happening(100, "slow", 0, 5.0)]
    slow = {name: simulated(trace, Fleet(8, 120_000, happenings=happenings), name) for name in ("cost", "round-robin")}
    calm = simulated(trace, Fleet(8, 120_000), "cost")
    assert slow["cost"].ttft_percentile_s(99) < 0.5 * slow["round-robin"].ttft_percentile_s(99)
    assert slow["cost"].ttft_percentile_s(50) < 1.5 * calm.ttft_percentile_s(50)


def test_when_the_last_one_dies() -> None:
    trace = paged(conversations(10, 2))
    with pytest.raises(NoReplicaError, match="none is known"):
        simulated(trace, Fleet(1, 10_000, happenings=[Happening(5, "die", 0)]), "cost")


# ------------------------------------------------------------------------------------------------------------- errors


def test_bad_fleets() -> None:
    for settings, message in (
        ({"num_replicas": 0}, "num_replicas must be an integer of at least 1, not 0"),
        ({"load": 0}, "load must be a number above 0, not 0"),
        ({"prefill_tokens_per_s": -1}, "prefill_tokens_per_s must be a number above 0, not -1"),
        ({"decode_s": -1}, "decode_s must be a number of at least 0, not -1"),
        ({"event_delay_s": -1}, "event_delay_s must be a number of at least 0, not -1"),
        ({"happenings": [Happening(3, "die", 4)]}, "replicas are numbered from 0 to 3; there is no 4"),
        ({"happenings": [Happening(3, "join"), Happening(2, "die", 4)]}, "there is no 4"),
    ):
        with pytest.raises(ConfigError, match=message):
            Fleet(**{"num_replicas": 4, "capacity_tokens": 1000} | settings)  # type: ignore[arg-type]
    Fleet(4, 1000, happenings=[Happening(3, "join"), Happening(4, "die", 4)])
    with pytest.raises(ConfigError, match="a capacity of 99 tokens holds no page or block of 100"):
        simulated(paged(conversations(3, 1)), Fleet(4, 399), "cost")


def test_progress_counts_requests() -> None:
    done: list[int] = []
    simulate_fleet(paged(conversations(300, 9)), Fleet(2, 9000), new_router("cost"), on_progress=done.append)
    assert sum(done) == 300
    assert len(done) > 1


def test_an_empty_trace() -> None:
    result = simulated(paged([]), Fleet(2, 9000), "cost")
    assert (result.hit_rate, result.shared_hit_rate, result.max_over_mean_work, result.ttft_percentile_s(50)) == (
        0.0,
        0.0,
        1.0,
        0.0,
    )
