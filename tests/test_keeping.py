"""Keeping exactly a prefix, emptying the cache while requests run, and explanations, from an engine of either kind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from prompts import random_ids
from radixkv import AsyncEngine, Engine, EngineConfig, PrefixCache, SamplingParams
from radixkv.cache.insight.eviction_ages import LIMITS_S
from radixkv.engine.assembly import assemble
from radixkv.errors import ClosedError, InvalidRequestError, InvalidTokenIdsError, MissingTokenizerError
from tiny_models import tiny_model
from told_policy import Told

MakeEngine = Callable[..., Engine]
ONE = SamplingParams(max_tokens=1)


class Clock:
    """A time that tests set."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def share(cache: PrefixCache, ids: list[int]) -> None:
    with cache.acquire(ids) as lease:
        lease.commit(ids)


def fill(cache: PrefixCache, num_tokens: int) -> None:
    """Ask for that much room, and share nothing."""
    cache.acquire(range(1000, 1000 + num_tokens)).release()
    cache.check_invariants()


def test_broken_promises_are_counted() -> None:
    clock = Clock()
    cache = PrefixCache(16, 4, clock=clock)
    share(cache, list(range(32)))
    cache.keep(range(16), keep_for_s=60)
    fill(cache, 48)
    assert (cache.stats().evicted_tokens, cache.stats().broken_promise_tokens) == (16, 0), "those without a promise"
    fill(cache, 64)
    assert (cache.stats().evicted_tokens, cache.stats().broken_promise_tokens) == (32, 16)


def test_promises_that_are_over_and_resets_break_none() -> None:
    clock = Clock()
    cache = PrefixCache(16, 4, clock=clock)
    share(cache, list(range(32)))
    cache.keep(range(32), keep_for_s=60)
    cache.reset()
    share(cache, list(range(32)))
    cache.keep(range(32), keep_for_s=60)
    clock.now_s = 60
    fill(cache, 64)
    assert (cache.stats().evicted_tokens, cache.stats().broken_promise_tokens) == (32, 0)


def test_the_age_of_evicted_tokens_is_counted() -> None:
    clock = Clock()
    cache = PrefixCache(16, 4, clock=clock)
    share(cache, list(range(16)))
    clock.now_s = 30
    share(cache, list(range(100, 120)))
    clock.now_s = 35
    fill(cache, 64)
    ages = cache.stats().eviction_ages
    by_limit = dict(zip([*LIMITS_S, None], ages.tokens, strict=True))
    assert {limit: tokens for limit, tokens in by_limit.items() if tokens} == {10: 20, 60: 16}
    assert ages.total_s == 16 * 35 + 20 * 5
    cache.reset()
    share(cache, list(range(16)))
    cache.reset()
    assert cache.stats().eviction_ages == ages, "what was forgotten made room for nobody"


@pytest.mark.parametrize("copies", [False, True], ids=["whole pages", "partial pages"])
@pytest.mark.parametrize("then", ["nothing", "a hit", "other matches"])
def test_exactly_the_prefix_is_kept(copies: bool, then: str) -> None:
    clock = Clock()
    cache = PrefixCache(16, 4, clock=clock, copy_page=(lambda *_: None) if copies else None)
    ids = list(range(40))
    share(cache, ids)
    assert cache.keep(ids[:16], keep_for_s=60) == 16
    if then != "nothing":
        share(cache, ids if then == "a hit" else [*ids[:8], 99, 98, 97, 96])
        assert cache.peek(range(500, 520)) == 0
    fill(cache, 48)
    assert cache.peek(ids) == 16, "what comes after it went"
    fill(cache, 64)
    assert cache.peek(ids) == 0, "it blocks nobody"


def test_a_prefix_is_kept_for_a_time() -> None:
    clock = Clock()
    cache = PrefixCache(16, 4, clock=clock)
    share(cache, list(range(32)))
    cache.keep(list(range(16)), keep_for_s=60)
    clock.now_s = 61
    share(cache, list(range(100, 116)))
    cache.peek([0])
    fill(cache, 48)
    assert cache.peek(list(range(32))) == 0, "the oldest goes first again"
    assert cache.peek(list(range(100, 116))) == 16


@pytest.mark.parametrize(("ends_at", "kept"), [(18, 20), (16, 16), (3, 4), (40, 40)])
def test_a_prefix_that_ends_in_a_page_keeps_that_page(ends_at: int, kept: int) -> None:
    cache = PrefixCache(16, 4, copy_page=lambda *_: None)
    ids = list(range(40))
    share(cache, ids)
    assert cache.keep(ids[:ends_at], keep_for_s=60) == ends_at
    cache.check_invariants()
    fill(cache, 64 - kept)
    assert cache.peek(ids) == kept


def test_a_tail_is_kept() -> None:
    cache = PrefixCache(16, 4, copy_page=lambda *_: None)
    share(cache, list(range(6)))
    assert cache.keep(list(range(6)), keep_for_s=60) == 6
    fill(cache, 56)
    assert cache.peek(list(range(6))) == 6


def test_what_is_not_cached_is_not_kept() -> None:
    cache = PrefixCache(16, 4)
    share(cache, list(range(8)))
    assert cache.keep([9, 9, 9], keep_for_s=60) == 0
    assert cache.keep(list(range(8)), cache_salt="other", keep_for_s=60) == 0
    with pytest.raises(InvalidRequestError, match="keep_for_s must be"):
        cache.keep(list(range(8)), keep_for_s=-1)
    with pytest.raises(InvalidTokenIdsError):
        cache.keep([-1], keep_for_s=1)
    before = cache.stats()
    cache.keep(list(range(8)), keep_for_s=1)
    assert (cache.stats().query_tokens, cache.stats().hit_tokens) == (before.query_tokens, before.hit_tokens)


def test_an_engine_keeps_explains_and_forgets(make_engine: MakeEngine) -> None:
    engine = make_engine(kv_cache_tokens=128)
    prompt = random_ids(1, 40)
    engine.generate(prompt, ONE)
    assert engine.keep(prompt[:20], 1000) == 20
    assert engine.explain(prompt).cached_tokens == engine.cache.explain(prompt).cached_tokens == 40
    engine.generate(random_ids(2, 108), ONE)
    assert engine.explain(prompt).cached_tokens == 20
    assert engine.explain(prompt, cache_salt="other").cached_tokens == 0
    stream = engine.stream(random_ids(3, 9), SamplingParams(max_tokens=9, ignore_eos=True))
    next(stream)
    held = engine.stats().cache.total_tokens
    freed, kept = engine.reset_cache()
    assert kept == 9, "the prompt of what runs"
    assert held - 3 <= freed + kept <= held
    assert engine.cache.peek(random_ids(3, 9)) == 9
    list(stream)
    assert engine.reset_cache().kept_by_running_tokens == 0
    with pytest.raises(MissingTokenizerError):
        engine.explain("text")
    with pytest.raises(MissingTokenizerError):
        engine.keep("text", 1)
    with pytest.raises(InvalidRequestError, match="keep_for_s must be"):
        engine.keep(prompt, -1)
    engine.close()
    for use in (lambda: engine.explain(prompt), lambda: engine.keep(prompt, 1)):
        with pytest.raises(ClosedError):
            use()


def test_a_coroutine_keeps_explains_and_forgets_while_requests_run() -> None:
    async def main() -> None:
        parts = assemble(tiny_model("llama"), None, EngineConfig(page_size=4, kv_cache_tokens=1024))
        async with AsyncEngine.from_parts(parts) as engine:
            prompt, running = random_ids(1, 40), random_ids(2, 20)
            assert engine.max_context_tokens == parts.limit.tokens
            await engine.generate(prompt, ONE)
            stream = engine.stream(running, SamplingParams(max_tokens=300, ignore_eos=True))
            await anext(stream)
            assert await engine.keep(prompt[:20], 1000, cache_salt="other") == 0
            assert await engine.keep(prompt[:20], 1000) == 20
            explanations = await asyncio.gather(*(engine.explain(prompt) for _ in range(4)), engine.explain(running))
            assert [found.cached_tokens for found in explanations] == [40] * 4 + [20]
            assert (await engine.explain(prompt, cache_salt="other")).cached_tokens == 0
            assert (await engine.explain(prompt, cache_salt="other", as_admin=True)).cached_tokens == 0
            assert await engine.reset_cache() == (40, 20)
            assert (await engine.explain(prompt)).cached_tokens == 0
            await stream.aclose()
            await engine.reset_cache()
            await engine.check_invariants()
            with pytest.raises(MissingTokenizerError):
                await engine.encode("text")
        for use in (engine.explain(prompt), engine.keep(prompt, 1)):
            with pytest.raises(ClosedError):
                await use

    asyncio.run(main())


@pytest.mark.parametrize(("length", "kept_tokens"), [(7, 7), (8, 8), (10, 8), (15, 8)])
def test_a_kept_half_page_stays_kept_when_its_own_request_fills_it(length: int, kept_tokens: int) -> None:
    policy = Told()
    cache = PrefixCache(num_pages=9, page_size=4, policy=policy, copy_page=lambda *_: None)
    longer = list(range(length))
    with cache.acquire(longer[:6]) as lease:
        lease.commit(longer[:6])
        assert cache.keep(longer[:6], 60) == 6
        policy.requests.clear()
        lease.grow(16)
        lease.commit(longer)
        cache.check_invariants()
    assert not policy.requests, "no request was made"
    for first in range(100, 200, 10):
        other = list(range(first, first + 8))
        with cache.acquire(other) as lease:
            lease.commit(other)
        cache.check_invariants()
    assert cache.held(longer).tokens == kept_tokens, "the whole page, and nothing after it"
    assert cache.stats().broken_promise_tokens == 0
