"""`PrefixCache`: what it hands out, what it does when pages run out, and what it says of itself.

Words stand for sequences: `ids("abc")` are three whole pages of tokens.
"""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest

import radixkv.cache
from radixkv import CacheStats, PrefixCache, RadixTree
from radixkv.errors import ConfigError, InvalidRequestError, InvalidTokenIdsError, OutOfPagesError, TokenIdsTypeError
from strategies import PAGE, ids, share


def held(cache: PrefixCache) -> CacheStats:
    """The statistics without the counters of what was asked for."""
    return cache.stats()._replace(query_tokens=0, hit_tokens=0)


# -- grow and exhaustion ---------------------------------------------------------------------------------------------


def test_grow_takes_only_what_is_missing(cache: PrefixCache) -> None:
    with cache.acquire(ids("a", 1)) as lease:
        before = lease.pages.tolist()
        for num_tokens, num_pages in [(-3, 2), (0, 2), (2 * PAGE, 2), (2 * PAGE + 1, 3), (PAGE, 3), (8 * PAGE, 8)]:
            lease.grow(num_tokens)
            assert len(lease.pages) == num_pages
            assert lease.pages.tolist()[:2] == before
            cache.check_invariants()


def test_acquire_that_does_not_fit_takes_nothing(cache: PrefixCache) -> None:
    share(cache, "abc")
    share(cache, "de")
    with cache.acquire(ids("ab")):
        before = held(cache)
        with pytest.raises(OutOfPagesError) as caught:
            cache.acquire(ids("abcdefghi"))
        error = caught.value
        assert (error.needed, error.free, error.evictable, error.total) == (6, 3, 2, 8)
        assert str(error).startswith("6 pages are needed, but only 3 of 8 are free and 2 can be evicted; release")
        assert held(cache) == before
        assert cache.peek(ids("de")) == 2 * PAGE
        cache.check_invariants()


def test_grow_that_does_not_fit_leaves_the_lease_as_it_was(cache: PrefixCache) -> None:
    share(cache, "ab")
    with cache.acquire(ids("xyz")) as lease:
        before, pages = cache.stats(), lease.pages.tolist()
        with pytest.raises(OutOfPagesError) as caught:
            lease.grow(9 * PAGE)
        assert (caught.value.needed, caught.value.free, caught.value.evictable) == (6, 3, 2)
        assert cache.stats() == before
        assert lease.pages.tolist() == pages
        lease.grow(8 * PAGE)
        assert cache.stats().evicted_tokens == 2 * PAGE


def test_prompt_larger_than_the_pool(cache: PrefixCache) -> None:
    with pytest.raises(OutOfPagesError, match="9 pages are needed, but only 8 of 8 are free and 0 can be evicted"):
        cache.acquire(range(8 * PAGE + 1))


def test_available_pages_are_what_an_acquire_can_get(cache: PrefixCache) -> None:
    share(cache, "abc")
    lease = cache.acquire(ids("a"))
    assert cache.available_pages == 7
    with cache.acquire(ids("mnopqrs")):
        assert cache.available_pages == 0
    lease.release()


# -- what is asked for -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "expected_pages"), [(None, 3), (99, 3), (3 * PAGE, 3), (3 * PAGE - 1, 2), (0, 0)])
def test_max_cached_tokens_bounds_the_hit(cache: PrefixCache, limit: int | None, expected_pages: int) -> None:
    pages = share(cache, "abc")
    with cache.acquire(ids("abc"), max_cached_tokens=limit) as lease:
        assert lease.cached_tokens == expected_pages * PAGE
        assert len(lease.pages) == 3
        assert lease.commit(ids("abc")) == 3 * PAGE
        assert lease.pages.tolist() == pages
        cache.check_invariants()


def test_empty_prompt(cache: PrefixCache) -> None:
    with cache.acquire([]) as lease:
        assert (lease.cached_tokens, lease.capacity_tokens) == (0, 0)
        assert lease.commit([]) == 0
        lease.grow(1)
        assert lease.capacity_tokens == PAGE


def test_namespaces_never_share(cache: PrefixCache) -> None:
    names: list[dict[str, Any]] = [{}, {"extra_key": "a"}, {"cache_salt": "a"}]
    for name in names:
        with cache.acquire(ids("a"), **name) as lease:
            assert lease.cached_tokens == 0
            lease.commit(ids("a"))
    assert cache.stats().total_tokens == 3 * PAGE
    assert [cache.peek(ids("a"), **name) for name in names] == [PAGE] * 3


def test_wrong_ids_take_nothing(cache: PrefixCache) -> None:
    before = cache.stats()
    with pytest.raises(InvalidTokenIdsError, match="token id -7 at position 1"):
        cache.acquire([1, -7])
    with pytest.raises(TokenIdsTypeError, match="not str"):
        cache.acquire("text")
    assert cache.stats() == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_pages": 0}, "num_pages must be an integer of at least 1, not 0"),
        ({"num_pages": 8, "page_size": 0}, "page_size must be an integer of at least 1, not 0"),
        ({"num_pages": 8, "page_size": True}, "page_size must be an integer of at least 1, not True"),
        ({"num_pages": 2**28, "page_size": 16}, "more slots than int32 can count"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PrefixCache(**settings)


# -- reset and statistics --------------------------------------------------------------------------------------------


def test_reset_forgets_all_but_what_is_pinned(cache: PrefixCache) -> None:
    share(cache, "abc")
    share(cache, "d")
    with cache.acquire(ids("ab")) as lease:
        cache.reset()
        assert (cache.peek(ids("abc")), cache.peek(ids("d"))) == (2 * PAGE, 0)
        assert lease.commit(ids("ab")) == 2 * PAGE
    cache.reset()
    assert cache.stats().free_pages == 8


def test_stats_add_up(cache: PrefixCache) -> None:
    assert cache.stats().hit_rate == 0
    share(cache, "abc")
    with cache.acquire(ids("abd", 1)) as lease:
        stats = cache.stats()
        assert stats == CacheStats(
            num_pages=8,
            page_size=PAGE,
            free_pages=3,
            leased_pages=2,
            total_tokens=3 * PAGE,
            evictable_tokens=PAGE,
            protected_tokens=2 * PAGE,
            num_leases=1,
            query_tokens=6 * PAGE + 1,
            hit_tokens=2 * PAGE,
            copied_tokens=0,
            evicted_tokens=0,
            estimated_hit_rates=stats.estimated_hit_rates,
        )
        assert stats.used_pages == 5
        assert stats.hit_rate == 8 / 25
        assert repr(cache) == "PrefixCache(8 pages of 4: 3 free, 12 tokens cached, 1 leases)"
        assert repr(lease) == "Lease(8 tokens found, 8 shared, 4 pages)"
    with cache.acquire(ids("uvwxyz")):  # 5 pages are free once the lease above is closed: the end of "abc" must go
        assert cache.stats().evicted_tokens == PAGE
    share(cache, "a")
    cache.reset()
    assert cache.stats().evicted_tokens == PAGE  # what reset forgot made room for nobody


# -- documentation ---------------------------------------------------------------------------------------------------

WITH_EXAMPLES = {"allocator", "prefix_cache", "radix_tree"}


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(radixkv.cache.__path__)])
def test_examples_in_docstrings(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"radixkv.cache.{name}"))
    assert result.failed == 0
    assert result.attempted > 0 or name not in WITH_EXAMPLES


@pytest.mark.parametrize("key", [False, 0, 1, b"a", ("a",), float("nan"), []])
@pytest.mark.parametrize("name", ["extra_key", "cache_salt"])
def test_keys_that_are_no_text_are_refused_by_every_verb(name: str, key: object) -> None:
    cache, tree, keys = PrefixCache(4, 4), RadixTree(4), {name: key}
    verbs: list[Callable[..., object]] = [
        cache.acquire,
        cache.peek,
        cache.explain,
        tree.match_prefix,
        tree.peek,
        tree.peek_path,
        lambda ids, **keys: tree.insert(ids, [0], **keys),
    ]
    for verb in verbs:
        with pytest.raises(InvalidRequestError, match=f"{name} must be text or None, not "):
            verb([1, 2, 3, 4], **keys)
    assert cache.stats().query_tokens == 0
    assert tree.total_size == 0
    cache.check_invariants()
    tree.check_invariants()


def test_a_refused_request_counts_as_none() -> None:
    cache = PrefixCache(2, PAGE)
    share(cache, "ab")
    before = cache.stats()
    for _ in range(3):
        with pytest.raises(OutOfPagesError):
            cache.acquire(ids("abc"))
    assert cache.stats() == before
    cache.check_invariants()


def test_a_resumed_request_counts_once() -> None:
    cache = PrefixCache(4, PAGE)
    with cache.acquire(ids("ab")) as lease:
        lease.commit(ids("ab"))
    before = cache.stats()
    with cache.resume(ids("abc"), max_cached_tokens=2 * PAGE) as lease:
        assert lease.cached_tokens == 2 * PAGE
        lease.commit(ids("abc"))
    after = cache.stats()
    assert (after.query_tokens, after.hit_tokens) == (2 * PAGE, 0)
    assert after.estimated_hit_rates == before.estimated_hit_rates
    with pytest.raises(InvalidRequestError, match="extra_key must be text or None, not 0"):
        cache.resume(ids("ab"), extra_key=0)  # type: ignore[arg-type]
    cache.check_invariants()


# ------------------------------------------------------------------------------------------------------------- looking


def cache_of(*sequences: list[int], num_pages: int = 4) -> PrefixCache:
    """A cache of pages of 4 tokens that shares pages in part, and holds `sequences`."""
    cache = PrefixCache(num_pages, 4, copy_page=lambda source, target, num_tokens: None)
    for sequence in sequences:
        with cache.acquire(sequence) as lease:
            lease.commit(sequence)
    return cache


def test_reading_gives_the_pages_of_a_prefix_and_takes_none() -> None:
    cache = cache_of(list(range(10)))
    before = cache.stats()
    with cache.acquire(range(10)) as lease:
        expected = lease.pages.tolist()
    for num_tokens in (0, 3, 4, 9, 10):
        ids = [*range(num_tokens), 77, 78]
        with cache.reading(ids) as pages:
            assert len(pages) == cache.pages_for(num_tokens)
            assert pages[: num_tokens // 4].tolist() == expected[: num_tokens // 4]
            assert cache.stats().free_pages == before.free_pages
    assert cache.stats().num_leases == 0
    assert cache.stats().protected_tokens == 0
    cache.check_invariants()


def test_what_is_being_read_is_not_evicted() -> None:
    cache = cache_of(list(range(10)), [50, 51, 52, 53])  # four pages, all of them in the tree
    with cache.reading(range(10)) as pages:
        with cache.acquire([90, 91]) as lease:
            assert lease.pages[0] not in pages
        with pytest.raises(OutOfPagesError):
            cache.acquire(range(90, 98))
    cache.check_invariants()
    with cache.acquire(range(90, 98)):
        pass


def test_reading_lets_go_when_its_block_raises() -> None:
    cache = cache_of(list(range(10)))
    with pytest.raises(KeyError), cache.reading(range(9)):
        raise KeyError
    assert cache.stats().protected_tokens == 0
    cache.check_invariants()


def test_held_counts_tokens_pages_and_what_other_sequences_begin_with() -> None:
    cache = cache_of(list(range(10)), [0, 1, 2, 3, 50], num_pages=8)
    held = cache.held(range(10))
    assert (held.tokens, len(held.pages), held.shared_tokens) == (10, 3, 4)
    assert cache.held([0, 1, 2]).tokens == cache.held([0, 1, 2]).shared_tokens == 3
    nothing = cache.held([9], extra_key="other")
    assert (nothing.tokens, nothing.pages.tolist(), nothing.shared_tokens) == (0, [], 0)
