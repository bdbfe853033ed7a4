"""The index of replicas: it says what each replica's own cache would, and forgets what nothing confirms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from radixkv import Event, PrefixCache, Removed, Stored
from radixkv.cache.page_keys import root_key
from radixkv.cluster.index.replica_index import ReplicaIndex
from radixkv.errors import ConfigError, InvalidRequestError
from strategies import NAMESPACES, namespaces, rests, spell, words

PAGE = 4
ROOT = root_key(None, None)
REPLICAS = ["a", "b", "c"]


def name_of(key: bytes) -> int:
    return int.from_bytes(key[:8], "big", signed=True)


class Follower:
    """Tells an index what one cache does."""

    def __init__(self, index: ReplicaIndex, replica: str, cache: PrefixCache) -> None:
        self.index, self.replica = index, replica
        cache.add_observer(self)

    def __call__(self, event: Event) -> None:
        if not isinstance(event, Stored | Removed):
            self.index.clear(self.replica)
            return
        run = event.run
        keys = [name_of(key) for key in run.page_keys]
        if isinstance(event, Removed):
            self.index.remove(self.replica, keys)
            return
        parent = None if run.start == 0 else name_of(run.parent_key)
        namespace_key = root_key(*run.namespace)
        if run.is_tail:
            assert self.index.store_tail(self.replica, parent, namespace_key, keys[0], run.tokens)
        else:
            assert self.index.store(self.replica, parent, namespace_key, keys, run.tokens)


def held_names(cache: PrefixCache) -> set[int]:
    return {name_of(key) for _, run in cache.cached_runs() for key in run.page_keys}


prompts = st.builds(lambda word, rest: [*spell(word, PAGE), *rest], words, rests)
steps = st.lists(
    st.tuples(st.sampled_from(["commit", "commit", "commit", "reset"]), st.sampled_from(REPLICAS), prompts, namespaces),
    max_size=40,
)


@given(steps=steps, asked=st.lists(st.tuples(prompts, namespaces), max_size=6), num_pages=st.integers(9, 16))
def test_it_says_what_each_cache_would(
    steps: list[tuple[str, str, list[int], tuple[str | None, str | None]]],
    asked: list[tuple[list[int], tuple[str | None, str | None]]],
    num_pages: int,
) -> None:
    """Small caches that evict all the time; whole pages, tails, namespaces."""
    index = ReplicaIndex(PAGE)
    caches = {
        name: PrefixCache(num_pages, PAGE, copy_page=lambda source, target, num_tokens: None, diagnostics=False)
        for name in REPLICAS
    }
    for name, cache in caches.items():
        Follower(index, name, cache)
    for number, (verb, name, prompt, (extra_key, cache_salt)) in enumerate(steps):
        cache = caches[name]
        if verb == "reset":
            if number % 3 == 0:
                cache.reset()
        else:
            with cache.acquire(prompt, extra_key=extra_key, cache_salt=cache_salt) as lease:
                lease.commit(prompt[: max(lease.cached_tokens, len(prompt) // 2)])
                lease.commit(prompt)
        index.check_invariants()
        for wanted, (key, salt) in [(prompt, (extra_key, cache_salt)), *asked]:
            held = index.lookup(wanted, root_key(key, salt))
            peeked = {n: c.peek(wanted, extra_key=key, cache_salt=salt) for n, c in caches.items()}
            assert held == {n: tokens for n, tokens in peeked.items() if tokens}
    for name, cache in caches.items():
        assert index.pages_of(name) == held_names(cache)
    for name in REPLICAS[1:]:
        index.drop_replica(name)
        index.check_invariants()
    assert index.pages_of("a") == held_names(caches["a"])
    index.clear("a")
    index.check_invariants()
    assert index.num_tokens == 0


def common(a: list[int], b: list[int]) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["expect", "store", "tick"]), st.sampled_from(REPLICAS), prompts), max_size=30
    )
)
def test_an_expectation_counts_until_it_is_confirmed_or_too_old(steps: list[tuple[str, str, list[int]]]) -> None:
    index = ReplicaIndex(PAGE, expect_s=3)
    now = 0.0
    stored: dict[str, list[list[int]]] = {name: [] for name in REPLICAS}
    expected: dict[str, list[tuple[list[int], float]]] = {name: [] for name in REPLICAS}
    for verb, name, prompt in steps:
        if verb == "tick":
            now += 1
        elif verb == "expect":
            index.expect(name, prompt, ROOT, now)
            expected[name] = [(tokens, until) for tokens, until in expected[name] if tokens != prompt]
            expected[name].append((prompt, now + 3))
        else:
            whole = prompt[: len(prompt) // PAGE * PAGE]
            names = [hash(tuple(whole[:end])) for end in range(PAGE, len(whole) + 1, PAGE)]
            assert index.store(name, None, ROOT, names, whole)
            stored[name].append(whole)
        for each in REPLICAS:
            expected[each] = [
                (tokens, until)
                for tokens, until in expected[each]
                if until > now and all(common(tokens, whole) < len(tokens) for whole in stored[each])
            ]
        index.forget_expected(now)
        index.check_invariants()
        want = {
            each: max(
                (common(prompt, tokens) for tokens in [*stored[each], *(tokens for tokens, _ in expected[each])]),
                default=0,
            )
            for each in REPLICAS
        }
        assert index.lookup(prompt, ROOT) == {each: tokens for each, tokens in want.items() if tokens}


def test_an_expectation_ends_with_the_prompt_that_it_is_for() -> None:
    index = ReplicaIndex(PAGE, expect_s=3)
    index.expect("a", [1, 2, 3, 4, 5], ROOT, now=0)
    index.expect("a", [1, 2, 3, 9], ROOT, now=1)
    assert index.lookup([1, 2, 3, 4, 5, 6], ROOT, now=2.9) == {"a": 5}
    assert index.lookup([1, 2, 3, 4, 5, 6], ROOT, now=3) == {"a": 3}
    assert index.lookup([1, 2, 3, 4, 5, 6], ROOT, now=4) == {}
    assert index.num_tokens == 0


def test_what_was_confirmed_and_evicted_is_not_expected_any_more() -> None:
    index = ReplicaIndex(PAGE)
    index.expect("a", [1, 2, 3, 4], ROOT, now=0)
    assert index.store("a", None, ROOT, [11, 12], [1, 2, 3, 4, 5, 6, 7, 8])
    index.remove("a", [11, 12])
    assert index.lookup([1, 2, 3, 4], ROOT) == {}


def test_what_follows_an_unknown_page_is_refused() -> None:
    index = ReplicaIndex(PAGE)
    assert index.store("a", None, ROOT, [11], [1, 2, 3, 4])
    assert not index.store("b", 11, ROOT, [12], [5, 6, 7, 8]), "only a holds the page before"
    assert not index.store_tail("a", 99, ROOT, 13, [5])
    assert index.lookup([1, 2, 3, 4, 5], ROOT) == {"a": 4}
    index.check_invariants()


def test_what_follows_a_removed_page_is_gone() -> None:
    """A cache removes leaves first; where a message was lost, the index says too little rather than too much."""
    index = ReplicaIndex(PAGE)
    for name in "ab":
        assert index.store(name, None, ROOT, [11, 12, 13], range(12))
        assert index.store_tail(name, 13, ROOT, 14, [12, 13])
    index.remove("a", [12])
    index.check_invariants()
    assert index.lookup(range(14), ROOT) == {"a": 4, "b": 14}
    assert index.pages_of("a") == {11}
    index.remove("b", [11])
    index.check_invariants()
    assert index.lookup(range(14), ROOT) == {"a": 4}


def test_memory_is_bounded_and_what_was_used_last_stays() -> None:
    index = ReplicaIndex(PAGE, max_pages=100)
    first = list(range(PAGE))
    assert index.store("a", None, ROOT, [1], first)
    for number in range(2, 1000):
        assert index.store("b", None, ROOT, [number], [number, number, number, number])
        index.expect("b", [1000 + number, 1], ROOT, now=0)
        assert index.lookup(first, ROOT) == {"a": PAGE}
        assert index.num_tokens <= index.max_tokens
    index.check_invariants()
    assert index.forgotten_tokens > 0
    assert not index.store("b", 2, ROOT, [5000], [1, 2, 3, 4]), "page 2 was forgotten"
    index.remove("b", [2])


def test_slots_of_dropped_replicas_are_used_again() -> None:
    index = ReplicaIndex(PAGE)
    for number in range(300):
        assert index.store(f"r{number}", None, ROOT, [1], [1, 2, 3, 4])
        index.expect(f"r{number}", [7, 8], ROOT, now=0)
        if number >= 2:
            index.drop_replica(f"r{number - 2}")
    assert index.lookup(np.array([1, 2, 3, 4]), ROOT) == {"r298": 4, "r299": 4}
    assert index.lookup([7], ROOT) == {"r298": 1, "r299": 1}
    index.check_invariants()
    index.drop_replica("never heard of")


def test_wrong_pages_are_refused() -> None:
    index = ReplicaIndex(PAGE)
    with pytest.raises(InvalidRequestError, match="2 pages must hold 8 tokens, not 7"):
        index.store("a", None, ROOT, [1, 2], range(7))
    for size in (0, PAGE):
        with pytest.raises(InvalidRequestError, match=f"a tail must hold 1 to 3 tokens, not {size}"):
            index.store_tail("a", None, ROOT, 1, range(size))
    with pytest.raises(ConfigError, match="page_size"):
        ReplicaIndex(0)


def test_namespaces_are_apart() -> None:
    index = ReplicaIndex(PAGE)
    for number, (extra_key, cache_salt) in enumerate(NAMESPACES):
        assert index.store(f"r{number}", None, root_key(extra_key, cache_salt), [number], [1, 2, 3, 4])
    for number, (extra_key, cache_salt) in enumerate(NAMESPACES):
        assert index.lookup([1, 2, 3, 4], root_key(extra_key, cache_salt)) == {f"r{number}": 4}
