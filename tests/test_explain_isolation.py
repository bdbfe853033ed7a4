"""What a tenant can learn of other tenants from `PrefixCache.explain`: nothing, however it asks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radixkv import PrefixCache
from radixkv.cache.insight.explanation import Explanation
from radixkv.cache.insight.prefix_hash import namespace_seed, prefix_hashes
from strategies import FakeClock

VICTIM, ATTACKER = ("victim", "secret"), ("attacker", None)
VOCABULARY = 12
PAGE_TOKENS = 4

Ask = Callable[[list[int]], Explanation]


def make_cache(secret: list[int], *, exact: bool, num_pages: int = 64, evict_secret: bool = False) -> PrefixCache:
    """A cache in which the victim has cached `secret`, and other work evicted it again if `evict_secret`."""
    copy_page = (lambda source, target, num_tokens: None) if exact else None
    cache = PrefixCache(num_pages, PAGE_TOKENS, copy_page=copy_page, clock=FakeClock())
    put(cache, secret, VICTIM)
    if evict_secret:
        put(cache, [*range(500, 500 + num_pages * PAGE_TOKENS)], ("others", None))
        assert cache.peek(secret, extra_key=VICTIM[0], cache_salt=VICTIM[1]) == 0
    return cache


def put(cache: PrefixCache, tokens: list[int], namespace: tuple[str | None, str | None]) -> None:
    with cache.acquire(tokens, extra_key=namespace[0], cache_salt=namespace[1]) as lease:
        lease.commit(tokens)


def recover(ask: Ask, num_tokens: int) -> list[int]:
    """Read a cached prompt token by token: the one candidate whose answer differs from all others is in it.

    Ends where no candidate stands out. Whatever `ask` tells may differ, so any field and the text are looked at.
    """
    known: list[int] = []
    while len(known) < num_tokens:
        answers = [str(ask([*known, token, 7777])) + repr(ask([*known, token, 7777])) for token in range(VOCABULARY)]
        plain = [
            answer.replace(f"{[token, 7777]}", "…").replace(f"{token} 7777", "…")
            for token, answer in enumerate(answers)
        ]
        counts = Counter(plain)
        odd = [token for token, answer in enumerate(plain) if counts[answer] == 1]
        if len(odd) != 1:
            break
        known += odd
    return known


secrets = st.lists(st.integers(0, VOCABULARY - 1), min_size=8, max_size=8)


def test_the_attack_reads_the_prompt_from_what_an_administrator_is_told() -> None:
    """So it would work if `explain` counted other namespaces for everybody."""
    secret = [3, 1, 4, 1, 5, 9, 2, 6]
    cache = make_cache(secret, exact=True)
    assert recover(lambda ids: cache.explain_as_admin(ids, extra_key="attacker"), len(secret)) == secret


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "whole pages"])
@pytest.mark.parametrize("evict_secret", [False, True], ids=["cached", "evicted"])
@pytest.mark.parametrize("has_prompts", [False, True])
def test_the_attack_learns_nothing(exact: bool, evict_secret: bool, has_prompts: bool) -> None:
    secret = [3, 1, 4, 1, 5, 9, 2, 6]
    cache = make_cache(secret, exact=exact, evict_secret=evict_secret)
    own_prompt = [7, 8, 7, 8]
    if has_prompts:
        put(cache, own_prompt, ATTACKER)
    for extra_key in (None, "attacker", "victim"):

        def ask(ids: list[int], extra_key: str | None = extra_key) -> Explanation:
            return cache.explain(ids, extra_key=extra_key)

        assert recover(ask, len(secret)) == (own_prompt if has_prompts and extra_key == "attacker" else [])


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "whole pages"])
@pytest.mark.parametrize("evict_secret", [False, True], ids=["cached", "evicted"])
@settings(max_examples=12, derandomize=True, database=None, deadline=None)
@given(one=secrets, other=secrets, asked=st.lists(secrets, min_size=1, max_size=4), own=secrets)
def test_answers_are_the_same_whatever_others_hold(
    exact: bool, evict_secret: bool, one: list[int], other: list[int], asked: list[list[int]], own: list[int]
) -> None:
    first, second = (make_cache(secret, exact=exact, evict_secret=evict_secret) for secret in (one, other))
    for cache in (first, second):
        put(cache, own, ATTACKER)
    for question in [one, other, one[:5], [*other, 1], own, *asked]:
        for extra_key in (None, "attacker", "victim"):  # the victim's extra_key, but not the salt
            answer = first.explain(question, extra_key=extra_key)
            assert answer == second.explain(question, extra_key=extra_key)
            assert str(answer) == str(second.explain(question, extra_key=extra_key))
            assert answer.other_namespaces is None


def colliding(target_hash: int, seed: int, rng: np.random.Generator) -> list[int]:
    """A page of 4 tokens whose prefix hash, after `seed`, is `target_hash`: the hash keeps no secret.

    The finaliser of splitmix64 is undone, and the sum of two words times odd weights solved for the second word.
    """
    mask = 2**64 - 1
    golden, (first, second), shifts = 0x9E3779B97F4A7C15, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB), (30, 27, 31)

    def mix(value: int) -> int:
        value = (value ^ value >> shifts[0]) * first & mask
        value = (value ^ value >> shifts[1]) * second & mask
        return value ^ value >> shifts[2]

    def unshift(value: int, shift: int) -> int:
        result = value
        for _ in range(64 // shift):
            result = value ^ result >> shift
        return result

    total = unshift((target_hash - seed) & mask, shifts[2])
    total = unshift(total * pow(second, -1, 2**64) & mask, shifts[1])
    total = unshift(total * pow(first, -1, 2**64) & mask, shifts[0])
    weights = [mix(golden * place & mask) | 1 for place in (1, 2)]
    while True:
        low, high = (int(token) for token in rng.integers(0, 2**31, 2))
        word = (total - golden - (low | high << 32) * weights[0]) * pow(weights[1], -1, 2**64) & mask
        if word >> 63 == 0 and word >> 31 & 1 == 0:
            return [low, high, word & 0xFFFF_FFFF, word >> 32]


def test_a_prompt_made_to_collide_does_not_confirm_a_guess() -> None:
    """An attacker who guessed the victim's page, and its namespace, finds no trace of it among the evictions."""
    secret = [3, 1, 4, 1]
    cache = make_cache(secret, exact=True, num_pages=4, evict_secret=True)
    target = int(prefix_hashes(np.array(secret, np.int32), PAGE_TOKENS, namespace_seed(*VICTIM))[0])
    seed = namespace_seed(*ATTACKER)
    made = colliding(target, seed, np.random.default_rng(1))
    assert int(prefix_hashes(np.array(made, np.int32), PAGE_TOKENS, seed)[0]) == target, "the attack is a real one"
    assert cache.explain(secret, extra_key="victim", cache_salt="secret").reason == "evicted"
    assert cache.explain(made, extra_key="attacker").reason == "never seen"
