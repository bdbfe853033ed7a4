"""Routers: what holds of every rule, what each rule says, and what the cost router learns."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from radixkv.cluster.router import ROUTERS, ConsistentHashRouter, CostRouter, Router, RouteRequest, new_router
from radixkv.cluster.router.learned import PRICE_BOUNDS, CopyPrice, copy_tokens
from radixkv.cluster.router.peers import RayPrefixAffinityRouter, SGLangCacheAwareRouter
from radixkv.errors import ConfigError, InvalidRequestError, NoReplicaError
from stress_cases import some_of

NAMES = ("a", "b", "c", "d")


def fleet(router: Router, names: str) -> Router:
    for name in names:
        router.add_replica(name, 0.0)
    return router


def cost_fleet(names: str) -> CostRouter:
    router = CostRouter()
    fleet(router, names)
    return router


# ------------------------------------------------------------------------------------------------------- every router


@pytest.mark.parametrize("rule", some_of(ROUTERS, {"cost", "consistent-hash", "sglang-cache-aware"}))
@given(st.data())
def test_whatever_happens(rule: str, data: st.DataObject) -> None:
    """Requests come and end, replicas join, drain and die, in any order; beside it a dull model of who may."""
    router = new_router(rule)
    may: set[str] = set()
    known: set[str] = set()
    running: dict[str, str] = {}  # request: replica
    waiting: set[str] = set()
    now = 0.0
    for step in range(data.draw(st.integers(1, 20))):
        now += data.draw(st.sampled_from([0.0, 0.01, 1.0]))
        action = data.draw(st.sampled_from(["add", "drain", "remove", "choose", "choose", "computed", "finished"]))
        name = data.draw(st.sampled_from(NAMES))
        if action == "add" and name not in known:
            router.add_replica(name, now)
            known.add(name)
            may.add(name)
        elif action == "drain":
            router.drain(name)
            may.discard(name)
        elif action == "remove":
            router.remove_replica(name)
            known.discard(name)
            may.discard(name)
            running = {request: replica for request, replica in running.items() if replica != name}
            waiting &= running.keys()
        elif action == "choose":
            exclude = data.draw(st.sets(st.sampled_from(NAMES), max_size=2))
            held = data.draw(st.dictionaries(st.sampled_from(NAMES), st.integers(1, 150)))
            request = RouteRequest(str(step), data.draw(st.integers(1, 150)), held, affinity=str(step % 3))
            if not may - exclude:
                with pytest.raises(NoReplicaError):
                    router.choose(request, now, exclude)
                continue
            choice = router.choose(request, now, exclude)
            assert choice.replica in may - exclude
            assert choice.cached_tokens == min(request.prompt_tokens, held.get(choice.replica, 0))
            assert {cost.replica for cost in choice.costs} in (set(), may - exclude)
            for cost in choice.costs:
                assert min(cost[1:]) >= 0
                assert cost.total_s == pytest.approx(cost.queued_s + cost.compute_s + cost.price_s)
            assert choice.explain().startswith(f"{choice.replica}: ")
            running[str(step)] = choice.replica
            waiting.add(str(step))
        elif running and action != "add":
            request_id = data.draw(st.sampled_from(sorted(running)))
            getattr(router, action)(request_id, now)
            waiting.discard(request_id)
            if action == "finished":
                del running[request_id]
        if isinstance(router, CostRouter):
            busy = {running[request_id] for request_id in waiting}
            for name in known:
                assert (router.queued_s(name, now) > 0) == (name in busy)
                assert router.s_per_token(name, now) > 0


@pytest.mark.parametrize("rule", ROUTERS)
def test_what_cannot_be_routed(rule: str) -> None:
    router = new_router(rule)
    with pytest.raises(NoReplicaError, match="a request needs a replica that takes requests; none is known"):
        router.choose(RouteRequest("1", 10, {}), 0.0)
    fleet(router, "ab").drain("a")
    with pytest.raises(NoReplicaError, match="of 2, 1 drain and the others are excluded") as raised:
        router.choose(RouteRequest("1", 10, {}), 0.0, exclude={"b"})
    assert (raised.value.known, raised.value.draining) == (2, 1)
    with pytest.raises(InvalidRequestError, match="a prompt must have at least 1 token, not 0"):
        router.choose(RouteRequest("1", 0, {}), 0.0)
    assert router.choose(RouteRequest("1", 10, {}), 0.0).replica == "b"
    with pytest.raises(InvalidRequestError, match="ids of requests must differ; '1' runs already"):
        router.choose(RouteRequest("1", 10, {}), 0.0)
    router.finished("1", 0.0)
    router.choose(RouteRequest("1", 10, {}), 0.0)
    with pytest.raises(ConfigError, match="there is a replica 'a' already"):
        router.add_replica("a", 0.0)
    router.computed("never seen", 0.0)
    router.finished("never seen", 0.0)


def test_names() -> None:
    assert type(new_router("threshold")) is SGLangCacheAwareRouter
    with pytest.raises(ConfigError, match="router must be one of cost, random, "):
        new_router("best")


# --------------------------------------------------------------------------------------------------------------- cost


def test_the_three_parts_of_the_cost() -> None:
    router = cost_fleet("abc")
    router.choose(RouteRequest("1", 500, {"a": 100}), 0.0)
    choice = router.choose(RouteRequest("2", 1000, {"a": 800, "b": 800, "c": 200}), 0.01)
    price = choice.costs[2].price_s / 0.03
    costs = {cost.replica: cost for cost in choice.costs}
    assert [costs[name].queued_s for name in "abc"] == pytest.approx([0.03, 0, 0])  # 400 tokens, 10 ms ago
    assert [costs[name].compute_s for name in "abc"] == pytest.approx([0.02, 0.02, 0.08])
    assert [costs[name].price_s for name in "abc"] == pytest.approx([0, 0, 0.03 * price])  # 600 that two others hold
    assert 0.9 < price < 1.1
    assert choice.replica == "b"


def test_cold_prefixes_are_spread() -> None:
    router = cost_fleet("abcd")
    chosen = []
    for number in range(40):
        now = float(number)  # nothing waits
        chosen.append(router.choose(RouteRequest(str(number), 1000, {}), now).replica)
        router.computed(str(number), now + 0.1)
        router.finished(str(number), now + 0.1)
    assert set(Counter(chosen).values()) == {10}


def route_many(router: CostRouter, slowness: dict[str, float], num_requests: int, gap_s: float) -> Counter[str]:
    """Cold prompts of 1,000 tokens, on replicas that compute one after another, 0.1 s each times `slowness`."""
    free_at = dict.fromkeys(slowness, 0.0)
    ends: list[tuple[float, str]] = []
    counts: Counter[str] = Counter()
    for number in range(num_requests):
        now = number * gap_s
        for end, request_id in sorted(ends):
            if end <= now:
                router.computed(request_id, end)
                router.finished(request_id, end)
        ends = [entry for entry in ends if entry[0] > now]
        name = router.choose(RouteRequest(str(number), 1000, {}), now).replica
        counts[name] += 1
        free_at[name] = max(now, free_at[name]) + 0.1 * slowness[name]
        ends.append((free_at[name], str(number)))
    for end, request_id in sorted(ends):
        router.computed(request_id, end)
    return counts


def test_a_slow_replica_gets_less() -> None:
    router = cost_fleet("abc")
    counts = route_many(router, {"a": 1.0, "b": 1.0, "c": 4.0}, 400, gap_s=0.06)
    assert counts["c"] < 0.6 * counts["a"]
    assert counts["a"] == pytest.approx(counts["b"], rel=0.1)
    assert router.s_per_token("c", 24.0) > 1.3 * router.s_per_token("a", 24.0)


def test_equal_replicas_stay_equal() -> None:
    router = cost_fleet("abc")
    counts = route_many(router, {"a": 1.0, "b": 1.1, "c": 0.95}, 400, gap_s=0.06)
    assert max(counts.values()) < 1.1 * min(counts.values())


def test_a_replica_that_hangs_gets_nothing_more() -> None:
    router = cost_fleet("ab")
    counts: Counter[str] = Counter()
    for number in range(50):
        now = 0.2 * number
        held = {"a": 900}  # its prefix is there
        name = router.choose(RouteRequest(str(number), 1000, held), now).replica
        counts[name] += 1
        if name == "b":
            router.computed(str(number), now + 0.1)
            router.finished(str(number), now + 0.1)
    assert counts["a"] < 15
    assert router.s_per_token("a", 10.0) > 5 * router.s_per_token("b", 10.0)


def test_a_replica_that_joins_is_used_and_one_that_died_counts_no_more() -> None:
    router = cost_fleet("ab")
    for number in range(20):
        router.choose(RouteRequest(str(number), 1000, {}), 0.0)
    router.remove_replica("a")
    router.add_replica("a", 0.0)  # it is back, and empty
    assert router.queued_s("a", 0.0) == 0
    chosen = [router.choose(RouteRequest(f"new {number}", 1000, {}), 0.0).replica for number in range(8)]
    assert set(chosen) == {"a"}


def test_a_hot_prefix_is_copied_when_its_queue_is_long() -> None:
    router = cost_fleet("ab")
    chosen = [router.choose(RouteRequest(str(number), 1000, {"a": 900}), 0.0).replica for number in range(30)]
    assert chosen[:5] == ["a"] * 5
    assert "b" in chosen


def dull_copies(held: list[int], mine: int) -> float:
    """Token by token."""
    return sum(1 / sum(tokens > position for tokens in held) for position in range(mine, max(held)))


@given(st.lists(st.integers(0, 60), min_size=1, max_size=8))
def test_copies_token_by_token(held: list[int]) -> None:
    copied = copy_tokens(np.array(held, np.float64))
    assert copied.tolist() == pytest.approx([dull_copies(held, mine) for mine in held])


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5])
def test_the_price_holds_the_share_of_copies(share: float) -> None:
    """A crowd that copies when the price is below what waiting would cost it."""
    price, random = CopyPrice(share), np.random.default_rng(0)
    copied = 0.0
    for waiting in random.exponential(3.0, 4000).tolist():
        copies = 1000.0 if price.factor < waiting else 0.0
        price.learn(found=1000.0, copied=copies)
        copied += copies
    assert copied / 4_000_000 == pytest.approx(share, abs=0.01)
    assert PRICE_BOUNDS[0] <= price.factor <= PRICE_BOUNDS[1]


def test_the_price_stays_within_its_bounds() -> None:
    price = CopyPrice()
    for _ in range(1000):
        price.learn(found=10, copied=10)
    assert price.factor == PRICE_BOUNDS[1]
    for _ in range(10_000):
        price.learn(found=10, copied=0)
    assert price.factor == PRICE_BOUNDS[0]
    price.learn(found=0, copied=0)
    for share in (-0.1, 1.1):
        with pytest.raises(ConfigError, match="recomputed_share must be a number in"):
            CostRouter(recomputed_share=share)


# -------------------------------------------------------------------------------------------------------- other rules


def test_round_robin_and_random() -> None:
    router = fleet(new_router("round-robin"), "abc")
    assert "".join(router.choose(RouteRequest(str(number), 9, {}), 0.0).replica for number in range(6)) == "abcabc"
    router = fleet(new_router("random"), "abc")
    counts = Counter(router.choose(RouteRequest(str(number), 9, {"a": 9}), 0.0).replica for number in range(600))
    assert min(counts.values()) > 150


def test_a_ring_moves_only_what_it_must() -> None:
    router = fleet(ConsistentHashRouter(), "abcd")

    def places(start: int) -> list[str]:
        return [
            router.choose(RouteRequest(f"{start + number}", 9, {}, affinity=f"s{number}"), 0.0).replica
            for number in range(400)
        ]

    before, again = places(0), places(1000)
    assert before == again
    assert min(Counter(before).values()) > 50
    router.remove_replica("c")
    after = places(2000)
    assert all(new == old for new, old in zip(after, before, strict=True) if old != "c")
    router.add_replica("c", 0.0)
    assert places(3000) == before
    router.drain("c")
    assert places(4000) == after


def test_best_match_ignores_queues() -> None:
    router = fleet(new_router("best-match"), "ab")
    assert {router.choose(RouteRequest(str(number), 100, {"b": 1}), 0.0).replica for number in range(50)} == {"b"}


def test_rays_rule() -> None:
    router = RayPrefixAffinityRouter()
    fleet(router, "ab")
    assert router.choose(RouteRequest("1", 100, {"a": 10}), 0.0).reason == "was sent the most of the prompt"
    small = router.choose(RouteRequest("2", 100, {"a": 9}), 0.0)
    assert (small.replica, small.reason) == ("b", "the smallest tree")
    for number in range(50):
        assert router.choose(RouteRequest(f"hot {number}", 100, {"a": 100}), 0.0).replica == "a"
    router.IMBALANCED_THRESHOLD = 50
    assert router.choose(RouteRequest("3", 100, {"a": 100}), 0.0).replica == "a"  # 51 and 1 run: no more than 50 apart
    balanced = router.choose(RouteRequest("4", 100, {"a": 100}), 0.0)
    assert (balanced.replica, balanced.reason) == ("b", "the shorter of two queues")


def test_sglangs_rule() -> None:
    router = SGLangCacheAwareRouter()
    fleet(router, "ab")
    assert router.choose(RouteRequest("1", 100, {"a": 31}), 0.0).replica == "a"
    assert router.choose(RouteRequest("2", 100, {"a": 30}), 0.0).replica == "b"  # the smallest tree
    for number in range(65):
        assert router.choose(RouteRequest(f"hot {number}", 100, {"a": 100}), 0.0).replica == "a"
    assert router.choose(RouteRequest("3", 100, {"a": 100}), 0.0).reason == "runs the fewest requests"


@pytest.mark.parametrize("rule", ROUTERS)
def test_asking_where_a_request_would_go_changes_nothing(rule: str) -> None:
    asked, twin = new_router(rule, seed=3), new_router(rule, seed=3)
    for router in (asked, twin):
        for name in "abc":
            router.add_replica(name, 0.0)
    for number in range(40):
        request = RouteRequest(str(number), 1000, {"a": 900, "b": 10 * number}, affinity=str(number))
        if rule != "random":  # which draws anew
            for _ in range(3):
                asked.would_choose(request, float(number))
        choices = [router.choose(request, float(number)) for router in (asked, twin)]
        assert rule == "random" or choices[0].replica == choices[1].replica
        assert choices[0].costs == choices[1].costs
        for router in (asked, twin):
            router.computed(str(number), number + 0.5)
