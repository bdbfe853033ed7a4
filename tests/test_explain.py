"""`PrefixCache.explain`: each reason, and what is told of it; and random histories against sets that forget nothing.

Words stand for sequences: `ids("abc")` are three whole pages of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radixkv import PrefixCache
from radixkv.cache.insight.diagnostics import MIN_HISTORY_PAGES
from radixkv.cache.insight.explanation import Explanation, NearMiss, OtherNamespaces
from radixkv.cache.insight.history import Eviction
from radixkv.cache.tree.node import Namespace
from radixkv.errors import ConfigError, InvalidTokenIdsError, TokenIdsTypeError
from strategies import NAMESPACES, PAGE, FakeClock, dump, ids, leak_checked, namespaces, rests, snapshot, spell


def copy_nothing(source: int, target: int, num_tokens: int) -> None:
    """There is no KV to copy."""


def make_cache(num_pages: int = 8, page_size: int = PAGE, *, exact: bool = True, **settings: Any) -> PrefixCache:
    """A cache that shares each token, or whole pages alone."""
    return PrefixCache(num_pages, page_size, copy_page=copy_nothing if exact else None, **settings)


def put(cache: PrefixCache, tokens: Sequence[int], namespace: Namespace = (None, None)) -> None:
    """Serve a prompt: two uses of the cache."""
    with cache.acquire(tokens, extra_key=namespace[0], cache_salt=namespace[1]) as lease:
        lease.commit(tokens)


exactness = pytest.mark.parametrize("exact", [True, False], ids=["exact", "whole pages"])

# -- hits and what was never seen ------------------------------------------------------------------------------------


@exactness
@pytest.mark.parametrize("word", ["", "a", "abc"])
def test_hit(exact: bool, word: str) -> None:
    cache = make_cache(exact=exact)
    put(cache, ids("abcd"))
    found = cache.explain(ids(word))
    assert found == (len(ids(word)), len(ids(word)), "hit", None, None, 0, None, None, 0, ())
    assert str(found) == f"{len(ids(word))} of {len(ids(word))} tokens are cached"


@exactness
def test_an_empty_cache_has_seen_nothing(exact: bool) -> None:
    found = make_cache(exact=exact).explain(ids("ab"))
    assert found == (8, 0, "never seen", None, None, 0, None, None, 0, ())
    assert str(found) == "0 of 8 tokens are cached; nothing cached begins like this prompt"


def test_difference_inside_an_edge() -> None:
    cache = make_cache(page_size=1)
    put(cache, [1, 2, 3, 4, 5, 6])
    found = cache.explain([1, 2, 3, 9, 8, 7])
    assert (found.cached_tokens, found.reason) == (3, "never seen")
    assert found.near_miss == NearMiss(3, [4, 5, 6], [9, 8, 7])
    assert str(found) == (
        "3 of 6 tokens are cached; never seen from there on: the prompt goes on with 9 8 7, the cache with 4 5 6"
    )


def test_difference_at_a_branch_shows_what_was_used_last() -> None:
    cache = make_cache(page_size=1)
    for last in (5, 6, 7, 6):
        put(cache, [1, 2, last, 10 + last])
    assert cache.explain([1, 2, 9]).near_miss == NearMiss(2, [6, 16], [9])
    put(cache, [1, 2, 5])
    assert cache.explain([1, 2, 9]).near_miss == NearMiss(2, [5, 15], [9])


def test_difference_inside_a_page_is_that_of_the_likest_page() -> None:
    cache = make_cache()
    put(cache, [1, 2, 3, 4, 5, 6, 7, 8])
    put(cache, [1, 2, 3, 4, 5, 9, 9, 9])
    found = cache.explain([1, 2, 3, 4, 5, 6, 0, 0])
    assert (found.cached_tokens, found.near_miss) == (6, NearMiss(6, [7, 8], [0, 0]))


def test_near_miss_follows_the_path_that_was_used_last() -> None:
    cache = make_cache(num_pages=64, page_size=1)
    for end in ([50], [60, 61, *range(100, 130)], [70]):
        put(cache, [1, 2, 3, 4, *end])
    put(cache, [1, 2, 3, 4, 60, 61, 62])
    near_miss = cache.explain([1, 2, 9]).near_miss
    assert near_miss == NearMiss(2, [3, 4, 60, 61, 62], [9])
    put(cache, [1, 2, 3, 4, 60, 61, *range(100, 130)])
    near_miss = cache.explain([1, 2, *range(200, 230)]).near_miss
    assert near_miss == NearMiss(2, [3, 4, 60, 61, *range(100, 112)], [*range(200, 216)])


def test_prompt_that_goes_on_after_a_cached_one() -> None:
    cache = make_cache()
    put(cache, ids("ab"))
    found = cache.explain([*ids("ab"), 7, 7])
    assert (found.reason, found.near_miss) == ("never seen", NearMiss(8, [], [7, 7]))
    assert str(found) == "8 of 10 tokens are cached; it goes on where the cached sequence ends"


def test_nothing_in_common() -> None:
    cache = make_cache()
    put(cache, [1, 2, 3, 4])
    assert cache.explain([9, 2, 3, 4]) == (4, 0, "never seen", None, None, 0, None, None, 0, ())


# -- evictions -------------------------------------------------------------------------------------------------------


@exactness
@pytest.mark.parametrize("policy", ["lru", "fifo", "cost"])
def test_evicted_by_whom_when_and_how_long_after_the_last_use(exact: bool, policy: str) -> None:
    clock = FakeClock()
    cache = make_cache(exact=exact, policy=policy, clock=clock)
    clock.now_s = 10.0
    put(cache, ids("abc"))  # uses 1 and 2
    clock.now_s = 20.0
    put(cache, ids("xyz"))  # 3 and 4
    clock.now_s = 30.0
    put(cache, [*range(200, 216)])  # 5, for which the end of "abc" must go, and 6
    clock.now_s = 35.5
    found = cache.explain([*ids("abc"), 99])
    assert (found.num_tokens, found.cached_tokens, found.reason) == (13, 4, "evicted")
    assert found.eviction == Eviction(
        num_pages=2, policy=policy, evicted_at_s=30.0, last_used_at_s=10.0, evicted_tick=5, last_use_tick=2
    )
    assert (found.eviction.unused_s, found.eviction.unused_ticks) == (20.0, 3)
    assert (found.evicted_ago_s, found.evicted_tokens) == (5.5, 8)
    assert str(found) == (
        f"4 of 13 tokens are cached; the next 8 were evicted by {policy} 5.5 s ago, "
        "20.0 s and 3 uses of the cache after their last use"
    )


def test_one_use_is_singular() -> None:
    clock = FakeClock()
    cache = make_cache(num_pages=1, page_size=1, clock=clock)
    put(cache, [1])
    put(cache, [2])
    assert str(cache.explain([1])) == (
        "0 of 1 tokens are cached; the next 1 were evicted by lru 0.0 s ago, 0.0 s and 1 use of the cache after their "
        "last use"
    )


@exactness
def test_last_use_is_the_commit_and_not_the_request(exact: bool) -> None:
    """However long nothing happens after it."""
    clock = FakeClock()
    cache = make_cache(exact=exact, clock=clock)
    with cache.acquire(ids("abc")) as lease:
        clock.now_s = 10.0
        lease.commit(ids("abc"))
    clock.now_s = 1000.0
    put(cache, ids("stuvwx"))
    eviction = cache.explain(ids("abc")).eviction
    assert eviction is not None
    assert (eviction.last_used_at_s, eviction.evicted_at_s) == (10.0, 1000.0)


def test_a_prompt_can_go_in_several_evictions() -> None:
    clock = FakeClock()
    cache = make_cache(clock=clock)
    put(cache, ids("abcd"))
    put(cache, ids("abx"))  # so "cd" goes first, then "x", then "ab"
    clock.now_s = 1.0
    with cache.acquire([*range(200, 220)]):
        found = cache.explain(ids("abcd"))
        assert found.eviction is not None
        assert (found.cached_tokens, found.eviction.num_pages, found.evicted_tokens) == (8, 2, 8)
        clock.now_s = 2.0
        with cache.acquire([*range(300, 312)]):
            found = cache.explain(ids("abcd"))
            assert found.eviction is not None
            assert (found.cached_tokens, found.eviction.num_pages, found.evicted_tokens) == (0, 4, 16)
            assert found.eviction.evicted_at_s == 2.0  # of the first page that is missing


def test_what_was_evicted_and_cached_anew_is_a_hit() -> None:
    cache = make_cache()
    put(cache, ids("abc"))
    put(cache, [*range(200, 230)])
    assert cache.explain(ids("abc")).reason == "evicted"
    put(cache, ids("ab"))
    assert cache.explain(ids("ab")).reason == "hit"
    found = cache.explain(ids("abc"))
    assert (found.cached_tokens, found.reason, found.evicted_tokens) == (8, "evicted", 4)


def test_another_continuation_of_what_was_evicted_was_never_seen() -> None:
    cache = make_cache()
    put(cache, ids("abc"))
    put(cache, [*range(200, 230)])
    found = cache.explain(ids("abd"))
    assert (found.cached_tokens, found.reason, found.evicted_tokens) == (0, "evicted", 8)
    put(cache, ids("ab"))
    assert cache.explain(ids("abd")).reason == "never seen"


def test_evictions_are_those_of_the_namespace() -> None:
    cache = make_cache()
    put(cache, ids("ab"), ("t", None))
    put(cache, [*range(200, 232)])
    assert cache.explain(ids("ab"), extra_key="t").reason == "evicted"
    assert cache.explain(ids("ab")).reason == "never seen"
    assert cache.explain(ids("ab"), cache_salt="t").reason == "never seen"


# -- what fills no page ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["", "a", "ab"])
@pytest.mark.parametrize("tail_tokens", [1, 3])
def test_end_of_a_prompt_that_fills_no_page_is_remembered(word: str, tail_tokens: int) -> None:
    clock = FakeClock()
    cache = make_cache(clock=clock)
    put(cache, ids(word, tail_tokens))
    clock.now_s = 3.0
    put(cache, [*range(200, 232)])
    for longer in ([], [7], [7, 7, 7, 7, 7]):
        found = cache.explain([*ids(word, tail_tokens), *longer])
        assert (found.cached_tokens, found.reason) == (0, "evicted")
        assert found.evicted_tokens == len(ids(word, tail_tokens))
        assert found.eviction is not None
        assert (found.eviction.evicted_at_s, found.eviction.last_use_tick) == (3.0, 2)


def test_the_end_alone_was_evicted() -> None:
    cache = make_cache()
    put(cache, ids("ab", 3))
    put(cache, [*range(200, 224)])
    found = cache.explain(ids("ab", 3))
    assert (found.cached_tokens, found.reason, found.evicted_tokens) == (8, "evicted", 3)
    put(cache, [*ids("ab"), 0, 5])
    found = cache.explain(ids("ab", 3))  # one of the three is found again
    assert (found.cached_tokens, found.reason, found.evicted_tokens) == (9, "evicted", 2)
    assert cache.explain([*ids("ab"), 0, 6]).reason == "never seen"


def test_a_page_is_not_mistaken_for_one_that_was_not_full() -> None:
    cache = make_cache()
    put(cache, [5, 6])
    put(cache, [*range(200, 232)])
    assert cache.explain([5, 6]).reason == "evicted"
    for end in ([0, 0], [7, 0]):
        assert cache.explain([5, 6, *end]).evicted_tokens == 2
    put(cache, [5, 6, 0, 0])
    put(cache, [*range(300, 332)])
    assert cache.explain([5, 6, 0, 0]).evicted_tokens == 4
    assert cache.explain([5, 6, 0]).evicted_tokens == 2


def test_an_end_that_a_longer_copy_replaces_was_not_evicted() -> None:
    cache = make_cache()
    put(cache, ids("ab", 2))
    put(cache, [*ids("ab", 2), 7, 7])  # copies the two tokens, and takes their place
    found = cache.explain([*ids("ab", 2), 8])
    assert (found.cached_tokens, found.evicted_tokens, found.reason) == (10, 0, "never seen")


# -- other namespaces ------------------------------------------------------------------------------------------------


@exactness
def test_an_administrator_learns_how_many_namespaces_hold_more(exact: bool) -> None:
    cache = make_cache(num_pages=32, exact=exact)
    put(cache, ids("a"))
    put(cache, ids("abc"), ("t", None))
    put(cache, ids("ab"), (None, "s"))
    put(cache, ids("abcd"), ("t", "s"))
    put(cache, ids("a"), ("u", None))
    found = cache.explain_as_admin(ids("abcw"))
    assert (found.cached_tokens, found.reason) == (4, "other namespace")
    assert found.other_namespaces == OtherNamespaces(3, 12)
    assert str(found) == (
        "4 of 16 tokens are cached; the rest was never seen in this namespace, but 3 other namespaces hold up to 12"
    )
    assert str(cache.explain_as_admin(ids("abcd"), extra_key="v")).endswith("5 other namespaces hold up to 16")
    assert cache.explain_as_admin(ids("abc"), extra_key="t") == cache.explain(ids("abc"), extra_key="t")


def test_an_administrator_learns_no_names() -> None:
    cache = make_cache()
    put(cache, ids("a"), ("tenant", "secret"))
    told = str(cache.explain_as_admin(ids("a"))) + repr(cache.explain_as_admin(ids("a")))
    assert "another namespace holds 4" in told
    assert "tenant" not in told
    assert "secret" not in told


def test_what_was_evicted_here_is_no_matter_of_namespaces() -> None:
    cache = make_cache()
    put(cache, ids("ab"))
    put(cache, ids("abcdefg"), ("t", None))
    found = cache.explain_as_admin(ids("ab"))
    assert (found.reason, found.other_namespaces) == ("evicted", OtherNamespaces(1, 8))


# -- pages -----------------------------------------------------------------------------------------------------------


def test_whole_pages_are_rounded_down() -> None:
    cache = make_cache(exact=False)
    put(cache, ids("abc"))
    found = cache.explain([*ids("ab"), *ids("c")[:3], 9, 9])
    assert (found.cached_tokens, found.reason) == (8, "page")
    assert found.near_miss == NearMiss(11, [99], [9, 9])
    assert str(found) == "8 of 13 tokens are cached; 3 more are the same, but only whole pages are shared"


@pytest.mark.parametrize("word", ["", "a", "abc"])
def test_whole_pages_leave_the_last_tokens_out(word: str) -> None:
    cache = make_cache(exact=False)
    put(cache, ids(word, 2))
    found = cache.explain(ids(word, 2))
    assert (found.cached_tokens, found.reason) == (4 * len(word), "page")
    assert str(found).endswith(" tokens are cached; the last 2 fill no page, and only whole pages are shared")
    assert cache.explain([*ids(word, 2), 9, 9]).reason == "never seen"


def test_whole_pages_of_other_namespaces() -> None:
    cache = make_cache(exact=False)
    put(cache, ids("ab"), ("t", None))
    found = cache.explain_as_admin([*ids("a"), *ids("b")[:3], 9])
    assert (found.reason, found.other_namespaces) == ("other namespace", OtherNamespaces(1, 4))
    assert cache.explain_as_admin([*ids("a")[:3], 9, 9]).reason == "never seen"  # there, it would not be found either


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_copies_make_it_exact(page_size: int) -> None:
    cache = make_cache(num_pages=64, page_size=page_size)
    put(cache, [*range(10, 40)])
    for same in (1, 5, 15, 16, 17, 29):
        found = cache.explain([*range(10, 10 + same), 7])
        assert (found.cached_tokens, found.reason) == (same, "never seen")
        assert found.near_miss is not None
        assert found.near_miss.position == same


# -- it is only a question -------------------------------------------------------------------------------------------


@exactness
def test_explaining_changes_nothing(exact: bool) -> None:
    cache = make_cache(exact=exact)
    with leak_checked(cache):
        for word in ("abc", "abd", "xyz", "ab", "mnop"):
            put(cache, ids(word, 2))
        put(cache, ids("a"), ("t", None))
        with cache.acquire(ids("mn")):
            before = snapshot(cache.tree), cache.stats(), cache.allocator.num_free
            reasons = {
                explain(ids(word, tail), extra_key=extra_key).reason
                for explain in (cache.explain, cache.explain_as_admin)
                for word in ("", "a", "ab", "abc", "abz", "xyz", "mno", "mnopq", "q")
                for tail in range(PAGE)
                for extra_key in (None, "t", "u")
            }
            assert (snapshot(cache.tree), cache.stats(), cache.allocator.num_free) == before
            assert reasons == {"hit", "evicted", "other namespace", "never seen"} | (set() if exact else {"page"})


def test_wrong_ids() -> None:
    cache = make_cache()
    with pytest.raises(InvalidTokenIdsError, match="token id -7 at position 1"):
        cache.explain([1, -7])
    with pytest.raises(TokenIdsTypeError, match="not str"):
        cache.explain("text")


def test_without_diagnostics_there_is_nothing_to_tell() -> None:
    cache = make_cache(diagnostics=False)
    put(cache, ids("ab"))
    with pytest.raises(ConfigError, match="diagnostics=False"):
        cache.explain(ids("ab"))
    assert cache.stats().estimated_hit_rates == ()
    cache.reset()
    assert cache.peek(ids("ab")) == 0


# -- what is forgotten -----------------------------------------------------------------------------------------------


def test_history_is_bounded() -> None:
    """A pool of one page, which every prompt evicts."""
    cache = make_cache(num_pages=1, page_size=2)
    num_remembered = MIN_HISTORY_PAGES // 8  # evictions, of one page each
    num_prompts = num_remembered + 100
    for number in range(num_prompts + 1):
        put(cache, [number, number])
    reasons = [cache.explain([number, number]).reason for number in range(num_prompts)]
    assert reasons == ["never seen"] * 100 + ["evicted"] * num_remembered
    eviction = cache.explain([100, 100]).eviction
    assert eviction is not None
    assert eviction.evicted_tick == 2 * 101 + 1


def test_a_reset_forgets_the_past() -> None:
    cache = make_cache()
    put(cache, ids("abc"))
    put(cache, [*range(200, 232)])
    cache.reset()
    for prompt in (ids("abc"), [*range(200, 232)]):
        assert cache.explain(prompt) == (len(prompt), 0, "never seen", None, None, 0, None, None, 0, ())


def test_a_reset_around_a_lease_is_no_eviction_by_the_policy() -> None:
    clock = FakeClock()
    cache = make_cache(clock=clock)
    put(cache, ids("abc"))
    with cache.acquire(ids("a")):
        clock.now_s = 4.0
        cache.reset()
        found = cache.explain(ids("abc"))
        assert found.eviction is not None
        assert (found.cached_tokens, found.evicted_tokens, found.eviction.policy) == (4, 8, "reset")
        put(cache, [*range(200, 220)])
        put(cache, [*range(300, 320)])
        found = cache.explain([*range(200, 220)])
        assert found.eviction is not None
        assert found.eviction.policy == "lru"


# -- other sizes -----------------------------------------------------------------------------------------------------


def test_estimated_hit_rates_of_a_loop() -> None:
    """6 prompts of 4 pages, again and again, in a pool of 16 pages: LRU keeps none of them, but twice the pool all."""
    cache = PrefixCache(16, 16)
    for turn in range(60):
        first = 1000 * (turn % 6)
        put(cache, range(first, first + 64))
    estimates = cache.stats().estimated_hit_rates
    assert [(size.factor, size.capacity_tokens) for size in estimates] == [(0.5, 128), (1, 256), (2, 512), (4, 1024)]
    assert [size.hit_rate for size in estimates] == [0, 0, 0.9, 0.9]
    assert cache.stats().hit_rate == 0


def test_estimated_hit_rates_of_a_mix() -> None:
    cache = PrefixCache(300, 16)
    rng = np.random.default_rng(5)
    for _ in range(2000):
        first = 1000 * int(rng.geometric(0.01))
        put(cache, range(first, first + 48))
    rates = [size.hit_rate for size in cache.stats().estimated_hit_rates]
    assert rates == sorted(rates)
    assert 0 < rates[0] < rates[1] < rates[2] < rates[3] < 1
    assert rates[1] == pytest.approx(cache.stats().hit_rate, abs=0.02)


def test_the_estimate_of_its_own_size_is_what_a_cache_hits_where_nothing_is_evicted() -> None:
    """Short prompts that part inside pages: most of them would be half a page short each."""
    cache = PrefixCache(900, 16, copy_page=lambda source, target, num_tokens: None)
    rng = np.random.default_rng(6)
    system = rng.integers(0, 1000, 90)
    for _ in range(150):
        prompt = [*system[: int(rng.integers(20, 90))], *rng.integers(0, 3, 30)]
        with cache.acquire(prompt, max_cached_tokens=len(prompt) - 1) as lease:
            lease.commit(prompt)
    stats = cache.stats()
    assert stats.evicted_tokens == 0
    assert stats.copied_tokens > 0.05 * stats.query_tokens
    assert [size.hit_rate for size in stats.estimated_hit_rates] == pytest.approx([stats.hit_rate] * 4, abs=0.002)


# -- random histories ------------------------------------------------------------------------------------------------

Path = tuple[Namespace, tuple[int, ...]]

prompts = st.tuples(namespaces, st.text("ab", max_size=4), rests)


class Memory:
    """Every page that was ever cached, and every end of a prompt that filled none."""

    def __init__(self, cache: PrefixCache) -> None:
        self._cache = cache
        self._ends_now: set[Path] = set()
        self._pages: set[Path] = set()
        self._ends: set[Path] = set()
        self._lost_ends: set[Path] = set()  # when they left the cache, nothing longer held their tokens

    def look(self) -> None:
        """See what is cached now."""
        page_size = self._cache.page_size
        before, self._ends_now = self._ends_now, set()
        for namespace, tokens in dump(self._cache.tree):
            self._pages |= {(namespace, tokens[:end]) for end in range(page_size, len(tokens) + 1, page_size)}
            if len(tokens) % page_size:
                self._ends_now.add((namespace, tokens))
        self._ends |= self._ends_now
        left = before - self._ends_now
        self._lost_ends |= {end for end in left if peek(self._cache, *end) < len(end[1])}

    def lost(self, namespace: Namespace, tokens: Sequence[int], cached_tokens: int) -> tuple[int, int, int]:
        """How many pages after those that are cached are gone; and how many tokens, at least and at most."""
        page_size, path = self._cache.page_size, tuple(tokens)
        first = cached_tokens // page_size
        pages = range(first + 1, len(path) // page_size + 1)
        lost_pages = list(takewhile(lambda page: (namespace, path[: page * page_size]) in self._pages, pages))
        end = max(cached_tokens, (first + len(lost_pages)) * page_size)
        ends = [last for last in range(end, len(path) + 1) if (namespace, path[:last]) in self._ends]
        lost_ends = [last for last in ends if (namespace, path[:last]) in self._lost_ends]
        return len(lost_pages), max([end, *lost_ends]) - cached_tokens, max([end, *ends]) - cached_tokens


def peek(cache: PrefixCache, namespace: Namespace, tokens: Sequence[int]) -> int:
    return cache.peek(tokens, extra_key=namespace[0], cache_salt=namespace[1])


def check_explanation(cache: PrefixCache, memory: Memory, namespace: Namespace, tokens: list[int]) -> Explanation:
    """Compare an explanation with the memory and with what can be looked up."""
    before = snapshot(cache.tree)
    found = cache.explain(tokens, extra_key=namespace[0], cache_salt=namespace[1])
    as_admin = cache.explain_as_admin(tokens, extra_key=namespace[0], cache_salt=namespace[1])
    assert snapshot(cache.tree) == before
    assert "\n" not in str(found)
    lost_pages, at_least, at_most = memory.lost(namespace, tokens, found.cached_tokens)
    assert at_least <= found.evicted_tokens <= at_most
    assert (found.eviction is not None) == (found.evicted_tokens > 0)
    if found.eviction is not None and lost_pages:
        assert found.eviction.num_pages == lost_pages
    others = {other: peek(cache, other, tokens) for other in NAMESPACES if other != namespace}
    more = [held for held in others.values() if held > found.cached_tokens]
    assert as_admin.other_namespaces == (OtherNamespaces(len(more), max(more)) if more else None)
    assert as_admin._replace(reason=found.reason, other_namespaces=None, evicted_ago_s=found.evicted_ago_s) == found
    position, _ = cache.tree.peek_path(tokens, extra_key=namespace[0], cache_salt=namespace[1])
    assert (found.near_miss is None) == (position in (0, len(tokens)))
    assert found.near_miss is None or found.near_miss.position == position
    rounded = not cache.shares_partial_pages and (
        position > found.cached_tokens or len(tokens) - found.cached_tokens < cache.page_size
    )
    expected = [
        ("hit", found.cached_tokens == len(tokens)),
        ("evicted", found.evicted_tokens > 0),
        ("other namespace", bool(more)),
        ("page", rounded),
        ("never seen", True),
    ]
    assert as_admin.reason == next(reason for reason, holds in expected if holds)
    assert found.reason == next(reason for reason, holds in expected if holds and reason != "other namespace")
    return found


@pytest.mark.parametrize(("page_size", "exact"), [(1, True), (4, True), (4, False)])
@settings(max_examples=20, derandomize=True, database=None, deadline=None)
@given(history=st.lists(prompts, min_size=1, max_size=40))
def test_random_histories(page_size: int, exact: bool, history: list[tuple[Namespace, str, list[int]]]) -> None:
    """12 pages are enough for the 5 of a prompt with those that it copies from, and little else."""
    cache = make_cache(12, page_size, exact=exact)
    memory = Memory(cache)
    for namespace, word, rest in history:
        tokens = [*spell(word, page_size), *rest[: page_size - 1]]
        found = check_explanation(cache, memory, namespace, tokens)
        with cache.acquire(tokens, extra_key=namespace[0], cache_salt=namespace[1]) as lease:
            assert lease.cached_tokens == found.cached_tokens
            memory.look()
            lease.commit(tokens)
            memory.look()
