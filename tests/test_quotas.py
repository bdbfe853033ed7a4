"""Quotas of namespaces in the pool: examples. `test_quota_machine.py` proves the rules at random."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from radixkv import CacheQuota, EvictionPolicy, PrefixCache, WindowPages
from radixkv.cache.eviction.policies import LRUPolicy
from radixkv.cache.namespace import Namespace
from radixkv.cache.tree.node import TreeNode
from radixkv.errors import ConfigError, InvariantError, OutOfPagesError, PolicyError
from strategies import FakeClock

PAGE = 2


def quota(pages: int) -> CacheQuota:
    return CacheQuota(pool_tokens=pages * PAGE)


def cache_of(num_pages: int, quotas: dict[Any, int], **fields: Any) -> PrefixCache:
    """A cache in which namespaces are guaranteed so many pages."""
    return PrefixCache(num_pages, PAGE, quotas={name: quota(pages) for name, pages in quotas.items()}, **fields)


def prompt(number: int, num_pages: int) -> list[int]:
    """A prompt that shares nothing with one of another number."""
    return [number] * (num_pages * PAGE)


def share(cache: PrefixCache, number: int, num_pages: int, **options: Any) -> None:
    ids = prompt(number, num_pages)
    with cache.acquire(ids, **options) as lease:
        lease.commit(ids)
    cache.check_invariants()


def pages_cached(cache: PrefixCache, number: int, num_pages: int, **names: str | None) -> int:
    return cache.peek(prompt(number, num_pages), **names) // PAGE


def used_pages(cache: PrefixCache) -> list[int]:
    """By namespace with a quota, in order; last, all others together."""
    return [use.used_tokens // PAGE for use in cache.stats().namespaces]


def test_a_flood_does_not_push_others_below_their_guarantee() -> None:
    cache = cache_of(8, {"anna": 3})
    share(cache, 1, 3, extra_key="anna")
    for number in range(100, 120):
        share(cache, number, 2, extra_key="flood")
    assert pages_cached(cache, 1, 3, extra_key="anna") == 3
    assert used_pages(cache) == [3, 5]


def test_an_unused_share_is_lent_and_comes_back_when_it_is_asked_for() -> None:
    cache = cache_of(8, {"anna": 4})
    share(cache, 1, 8, extra_key="flood")
    assert used_pages(cache) == [0, 8]
    share(cache, 2, 4, extra_key="anna")
    assert used_pages(cache) == [4, 4]
    share(cache, 3, 4, extra_key="flood")
    assert pages_cached(cache, 2, 4, extra_key="anna") == 4, "nor does it give way where all of another's must go"


def test_what_is_held_beyond_a_guarantee_goes_in_the_order_of_the_policy() -> None:
    cache = cache_of(8, {"anna": 2, "berta": 2})
    share(cache, 1, 4, extra_key="anna")
    share(cache, 2, 4, extra_key="berta")
    share(cache, 3, 1, extra_key="others")
    assert used_pages(cache) == [3, 4, 1], "the least recently used was anna's"
    with cache.acquire(prompt(1, 2), extra_key="anna"):
        pass
    share(cache, 4, 1, extra_key="others")
    assert used_pages(cache) == [3, 3, 2], "now it was berta's"


def test_of_anothers_leaf_no_more_goes_than_it_holds_beyond_its_guarantee() -> None:
    cache = cache_of(128, {"anna": 2})
    share(cache, 1, 3, extra_key="anna")  # less than 1/20 of the pool: where there are no quotas it goes whole
    share(cache, 2, 125, extra_key="flood", keep_for_s=60.0)
    share(cache, 3, 4, extra_key="flood", keep_for_s=60.0)
    assert pages_cached(cache, 1, 3, extra_key="anna") == 2


def test_a_policy_that_takes_leaves_whole_takes_part_of_one_that_is_guaranteed() -> None:
    cache = cache_of(8, {"anna": 3}, policy="adaptive")
    share(cache, 1, 5, extra_key="anna")
    share(cache, 2, 3, extra_key="flood", keep_for_s=60.0)
    share(cache, 3, 1, extra_key="flood")
    assert pages_cached(cache, 1, 5, extra_key="anna") == 4
    share(cache, 4, 3, extra_key="flood")
    assert pages_cached(cache, 1, 5, extra_key="anna") == 3


def test_within_its_guarantee_a_namespace_gives_up_its_own_only_when_nobody_is_beyond() -> None:
    cache = cache_of(6, {"anna": 4, "berta": 2})
    share(cache, 1, 2, extra_key="anna")
    share(cache, 2, 3, extra_key="berta")
    share(cache, 3, 2, extra_key="anna")
    assert pages_cached(cache, 1, 2, extra_key="anna") == 2, "it was the oldest, and berta held more than her share"
    assert used_pages(cache) == [4, 2, 0]
    share(cache, 4, 1, extra_key="anna")
    assert used_pages(cache) == [4, 2, 0]
    assert pages_cached(cache, 1, 2, extra_key="anna") == 1


def test_a_promise_beyond_a_share_is_broken_before_a_share_is() -> None:
    cache = cache_of(6, {"anna": 3})
    share(cache, 1, 3, extra_key="anna")
    share(cache, 2, 3, extra_key="flood", keep_for_s=3600.0)
    share(cache, 3, 2, extra_key="flood")
    assert pages_cached(cache, 1, 3, extra_key="anna") == 3
    assert cache.stats().broken_promise_tokens == 2 * PAGE


def test_among_those_beyond_their_share_what_is_kept_goes_last() -> None:
    cache = cache_of(4, {"anna": 0})
    share(cache, 1, 2, extra_key="anna", keep_for_s=3600.0)
    share(cache, 2, 2, extra_key="berta")
    share(cache, 3, 2, extra_key="carla")
    assert pages_cached(cache, 1, 2, extra_key="anna") == 2


def test_what_leases_hold_counts_and_is_not_to_be_had() -> None:
    cache = cache_of(8, {"anna": 4})
    lease = cache.acquire(prompt(1, 6), extra_key="flood")
    assert used_pages(cache) == [0, 6]
    with pytest.raises(OutOfPagesError, match="3 pages are needed, but only 2 of 8 are free and 0 can be evicted"):
        cache.acquire(prompt(2, 3), extra_key="anna")
    lease.release()
    assert used_pages(cache) == [0, 0]


def test_what_others_are_guaranteed_is_not_counted_as_evictable() -> None:
    cache = cache_of(8, {"anna": 4})
    share(cache, 1, 5, extra_key="anna")
    assert (cache.available_pages, cache.available_to(Namespace("flood")), cache.available_to(Namespace("anna"))) == (
        8,
        4,
        8,
    )
    assert cache.has_room(4 * PAGE, cached_tokens=0, next_tokens=1, spare_pages=0, namespace=Namespace("flood"))
    assert not cache.has_room(5 * PAGE, cached_tokens=0, next_tokens=1, spare_pages=0, namespace=Namespace("flood"))
    with pytest.raises(OutOfPagesError, match="5 pages are needed, but only 3 of 8 are free and 1 can be evicted"):
        cache.acquire(prompt(2, 5), extra_key="flood")
    assert pages_cached(cache, 1, 5, extra_key="anna") == 5, "nothing is taken then"


def test_a_salt_counts_to_its_key_unless_it_has_a_quota_of_its_own() -> None:
    cache = cache_of(8, {"anna": 2, ("anna", "own"): 1, None: 1})
    share(cache, 1, 1, extra_key="anna")
    share(cache, 1, 1, extra_key="anna", cache_salt="pepper")
    share(cache, 1, 1, extra_key="anna", cache_salt="own")
    share(cache, 1, 1, cache_salt="own")
    share(cache, 1, 1)
    share(cache, 1, 1, extra_key="berta", cache_salt="own")
    assert used_pages(cache) == [2, 1, 2, 1]
    assert [use.namespace for use in cache.stats().namespaces] == [("anna", None), ("anna", "own"), (None, None), None]


def test_quotas_of_a_cache_in_use_count_what_is_there() -> None:
    cache = PrefixCache(8, PAGE)
    share(cache, 1, 3, extra_key="anna")
    share(cache, 2, 2, extra_key="berta")
    with cache.acquire(prompt(1, 4), extra_key="anna"):
        cache.set_quotas({"anna": quota(2), "berta": quota(2)})
        cache.check_invariants()
        assert used_pages(cache) == [4, 2, 0]
        cache.set_quotas({"berta": quota(5)})
        cache.check_invariants()
        assert used_pages(cache) == [2, 4]
    cache.check_invariants()
    cache.set_quotas({})
    assert cache.stats().namespaces == ()
    share(cache, 3, 8, extra_key="anna")
    assert pages_cached(cache, 2, 2, extra_key="berta") == 0


def test_the_order_of_use_is_kept_when_quotas_come_and_go() -> None:
    cache = PrefixCache(6, PAGE)
    for number, name in enumerate(["anna", "berta", "anna"]):
        share(cache, number, 2, extra_key=name)
    cache.set_quotas({"anna": quota(0), "berta": quota(0)})
    share(cache, 3, 1, extra_key="berta")
    cache.set_quotas({})
    share(cache, 4, 2, extra_key="berta")
    found = [pages_cached(cache, number, 2, extra_key=name) for number, name in enumerate(["anna", "berta", "anna"])]
    assert found == [0, 1, 2]


def test_windows_and_quotas_go_together() -> None:
    windows = WindowPages(8, num_window_pages=5, page_size=PAGE, window_tokens=3)
    cache = cache_of(8, {"anna": 2}, residency=windows)
    for number, name in enumerate(["anna", "flood", "flood", "anna", "flood"]):
        ids = prompt(number, 3)
        with cache.acquire(ids, extra_key=name) as lease:
            for first in range(0, len(ids), PAGE):
                lease.cover(first, first + PAGE)
            lease.commit(ids)
        cache.check_invariants()
    assert used_pages(cache)[0] >= 2


def test_what_a_running_request_pins_already_is_not_claimed_twice() -> None:
    cache = cache_of(12, {"anna": 4})
    ids = np.array([*prompt(1, 2), *prompt(2, 2)], np.int32)
    anna = Namespace("anna")
    shares = cache.shares
    assert shares is not None

    def can_claim(cached_pages: int, num_pages: int) -> bool:
        return shares.can_claim(anna, ids, cached_pages * PAGE, num_pages)

    assert [can_claim(0, number) for number in (4, 5)] == [True, False]
    share(cache, 1, 2, extra_key="anna")
    with cache.acquire(prompt(1, 2), extra_key="anna"):  # another request runs on the same beginning
        assert [can_claim(2, number) for number in (4, 5)] == [True, False]
    with cache.acquire(prompt(3, 2), extra_key="anna"):  # or on something else
        assert [can_claim(2, number) for number in (2, 3, 4)] == [True, False, False]


class InOneGroup(LRUPolicy):
    """LRU as a policy with groups, of which there is one: nothing is kept in order among namespaces."""

    name = "in one group"

    def group(self, node: TreeNode) -> str:
        return "all"

    def urgency(self, node: TreeNode) -> float:
        return 0.0


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.stress) for seed in (1, 2))])
def test_the_order_among_many_namespaces_is_that_of_looking_at_each(seed: int) -> None:
    rng, clock = random.Random(seed), FakeClock()
    quotas = {f"tenant {number}": quota(rng.randint(0, 5)) for number in range(20)}
    caches = [PrefixCache(120, PAGE, policy, quotas=quotas, clock=clock) for policy in ("lru", InOneGroup())]
    asked = [(rng.randrange(400), f"tenant {rng.randrange(24)}") for _ in range(600)]
    for number, name in asked:
        clock.now_s += rng.choice([0.0, 0.0, 1.0, 5.0])
        num_pages, keep_for_s = rng.randint(1, 6), rng.choice([None, None, None, 3.0, 60.0])
        ids = prompt(number, num_pages)
        for cache in caches:
            with cache.acquire(ids, extra_key=name, keep_for_s=keep_for_s) as lease:
                lease.commit(ids)
    for cache in caches:
        cache.check_invariants()
    first, second = ([node.page_ids.tolist() for _, node in cache.nodes()] for cache in caches)
    assert first == second
    assert used_pages(caches[0]) == used_pages(caches[1])


class Mixed(EvictionPolicy):
    """Ranks that do not compare."""

    name = "mixed"

    def rank(self, node: TreeNode) -> Any:
        return "text" if int(node.token_ids[0]) % 2 else 1


def test_ranks_that_do_not_compare_across_namespaces_fail_once() -> None:
    cache = cache_of(4, {"anna": 0, "berta": 0}, policy=Mixed())
    share(cache, 1, 2, extra_key="anna")
    share(cache, 2, 2, extra_key="berta")
    with pytest.raises(PolicyError, match="'mixed' failed"):
        cache.acquire(prompt(3, 1), extra_key="anna")
    cache.check_invariants()
    share(cache, 3, 4, extra_key="anna")
    assert used_pages(cache) == [4, 0, 0]


def damage_account(cache: PrefixCache, node: TreeNode) -> None:
    node.account = None


def damage_use(cache: PrefixCache, node: TreeNode) -> None:
    assert cache.shares is not None
    cache.shares.freed(node.page_ids[:1])


def damage_evictable(cache: PrefixCache, node: TreeNode) -> None:
    assert node.account is not None
    node.account.evictable_pages -= 1


def damage_lent(cache: PrefixCache, node: TreeNode) -> None:
    assert node.account is not None
    node.account.guaranteed_pages -= 1


@pytest.mark.parametrize("damage", [damage_account, damage_use, damage_evictable, damage_lent])
def test_damaged_accounts_are_noticed(damage: Callable[[PrefixCache, TreeNode], None]) -> None:
    cache = cache_of(8, {"anna": 2})
    share(cache, 1, 4, extra_key="anna")
    (node,) = (node for _, node in cache.nodes() if not node.is_root)
    damage(cache, node)
    with pytest.raises(InvariantError):
        cache.check_invariants()


def test_quotas_that_guarantee_more_than_there_is_are_refused() -> None:
    cache = cache_of(8, {"anna": 3})
    with pytest.raises(ConfigError, match=r"more than the pool's 16 tokens; 2 of them guarantee 18"):
        cache.set_quotas({"anna": quota(4), "berta": quota(5)})
    assert [use.guaranteed_tokens for use in cache.stats().namespaces] == [6, 0], "those before hold"
    cache.set_quotas({"anna": quota(3), "berta": CacheQuota(pool_tokens=9)})
    assert [use.guaranteed_tokens for use in cache.stats().namespaces] == [6, 8, 0], "whole pages are guaranteed"


@pytest.mark.parametrize(
    ("quotas", "message"),
    [
        ([("anna", 3)], "quotas must be a mapping of namespaces to CacheQuota, not"),
        ({"anna": 3}, "the quota of 'anna' must be a CacheQuota, not 3"),
        ({7: quota(1)}, "a quota must name an extra_key"),
        ({("anna", "a", "b"): quota(1)}, "a quota must name an extra_key"),
        ({"anna": quota(1), ("anna", None): quota(1)}, "two quotas name the namespace"),
    ],
)
def test_wrong_quotas_are_refused(quotas: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PrefixCache(8, PAGE, quotas=quotas)


@pytest.mark.parametrize("tokens", [-1, 1.5, True, "many"])
def test_a_quota_checks_its_fields(tokens: Any) -> None:
    with pytest.raises(ConfigError, match="pool_tokens must be an integer"):
        CacheQuota(pool_tokens=tokens)
