"""The clairvoyant optimum against a search through everything that a cache could keep."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from radixkv.cache.eviction.policies import POLICIES
from radixkv.replay.belady import measure_reuse, optimal_hit_tokens
from radixkv.replay.simulation import replay_optimum, replay_trace
from radixkv.replay.traces import Request
from strategies import spell

Word = tuple[str, str]
"""A prompt and its output, a letter for each page."""

short_words = st.tuples(st.text("ab", min_size=1, max_size=3), st.text("ab", max_size=1))
long_words = st.tuples(st.text("abc", min_size=1, max_size=6), st.text("ab", max_size=2))
tails = st.integers(0, 3)


def request(word: Word, page_size: int = 1, tail_tokens: int = 0) -> Request:
    """A request of pages; the tail fills no page, and comes after the output, whose last token is not stored."""
    prompt, output = word
    keys = spell(prompt, page_size, 0 if output else tail_tokens)
    return Request.of_tokens(keys, [*spell(output, page_size, tail_tokens), 0])


def best_hits(words: Sequence[Word], capacity: int) -> int:
    """The most pages that can be hit: tries all sets of pages that may be kept after each request."""

    @cache
    def best(now: int, resident: frozenset[str]) -> int:
        if now == len(words):
            return 0
        prompt, output = words[now]
        path = {(prompt + output)[:end] for end in range(1, len(prompt + output) + 1)}
        hits = next((end for end in range(len(prompt)) if prompt[: end + 1] not in resident), len(prompt))
        others = resident - path
        if len(path) <= capacity:
            kept = [path | set(some) for size in range(capacity - len(path) + 1) for some in combinations(others, size)]
        else:  # it takes all room while it runs, and leaves what it likes
            kept = [set(some) for some in combinations(path, capacity)]
        return hits + max(best(now + 1, frozenset(after)) for after in kept)

    return best(0, frozenset())


@given(st.lists(short_words, max_size=6), st.integers(1, 5), st.sampled_from([1, 2]))
def test_it_is_the_best_of_all_that_can_be_done(words: list[Word], capacity: int, page_size: int) -> None:
    reuse = measure_reuse([request(word, page_size) for word in words], page_size)
    assert optimal_hit_tokens(reuse, capacity * page_size) == best_hits(words, capacity) * page_size


@pytest.mark.parametrize(
    ("words", "capacity", "hits"),
    [
        (["a", "b", "a", "b"], 1, 0),  # each must be in the cache while it runs
        (["a", "b", "a", "b"], 2, 2),
        (["a", "b", "c", "a", "b"], 2, 1),
        (["abc", "x", "abc"], 3, 2),  # the deepest page makes room
        (["abc", "abx", "aby"], 3, 4),  # what a request shares with the next one stays for free
        (["abcd", "abcd"], 2, 2),  # larger than the cache: it leaves its beginning
        (["a", "bcd", "a"], 3, 0),  # and nothing beside it
    ],
)
def test_examples(words: list[str], capacity: int, hits: int) -> None:
    pairs = [(word, "") for word in words]
    assert best_hits(pairs, capacity) == hits
    assert optimal_hit_tokens(measure_reuse(map(request, pairs)), capacity) == hits


@given(st.lists(long_words, min_size=1, max_size=25), st.integers(1, 12), st.sampled_from([1, 2, 4]), tails)
def test_no_policy_does_better(words: list[Word], capacity: int, page_size: int, tail_tokens: int) -> None:
    requests = [request(word, page_size, tail_tokens) for word in words]
    reuse = measure_reuse(requests, page_size)
    optimum = replay_optimum(reuse, capacity * page_size, page_size)
    assert optimum.query_tokens == reuse.num_tokens == sum(len(request.keys) for request in requests)
    assert optimum.hit_tokens <= reuse.reused_tokens
    for policy in POLICIES:
        result = replay_trace(requests, policy, capacity * page_size, page_size)
        assert result.hit_tokens <= optimum.hit_tokens, policy


block_rows = st.lists(st.tuples(st.text("ab", min_size=1, max_size=4), st.integers(1, 4)), min_size=1, max_size=20)


@given(block_rows, st.integers(1, 6))
def test_partial_blocks_leave_it_a_bound(rows: list[tuple[str, int]], capacity: int) -> None:
    """Even if the same block comes with different numbers of tokens, as no prompt would have it."""
    requests = []
    for word, last_tokens in rows:
        ids = [int.from_bytes(word[:end].encode()) for end in range(1, len(word) + 1)]
        keys = np.array(ids, np.int32)
        requests.append(Request(keys, keys, 4 * (len(word) - 1) + last_tokens))
    reuse = measure_reuse(requests, key_tokens=4)
    optimum = optimal_hit_tokens(reuse, 4 * capacity)
    assert optimum <= reuse.reused_tokens == replay_trace(requests, "lru", 10**6, 1, key_tokens=4).hit_tokens
    for policy in POLICIES:
        assert replay_trace(requests, policy, 4 * capacity, 1, key_tokens=4).hit_tokens <= optimum


@given(st.lists(long_words, min_size=1, max_size=25), st.sampled_from([1, 2, 4]), tails)
def test_the_ceiling_is_what_was_seen_before(words: list[Word], page_size: int, tail_tokens: int) -> None:
    seen: set[tuple[int, ...]] = set()
    hit_tokens = 0
    requests = [request(word, page_size, tail_tokens) for word in words]
    for keys, stored, _, _ in requests:
        ends = range(page_size, len(stored) + 1, page_size)
        pages = [tuple(stored[:end].tolist()) for end in ends]
        hit_tokens += page_size * sum(page in seen for page in pages[: len(keys) // page_size])
        seen.update(pages)
    reuse = measure_reuse(requests, page_size)
    assert reuse.reused_tokens == hit_tokens
    assert optimal_hit_tokens(reuse, 10**6) == hit_tokens
    rates = [optimal_hit_tokens(reuse, page_size * capacity) for capacity in range(30)]
    assert rates == sorted(rates)
    assert rates[0] == 0


def test_nothing_at_all() -> None:
    reuse = measure_reuse([])
    assert (reuse.ceiling, optimal_hit_tokens(reuse, 10)) == (0.0, 0)


def test_many_pages() -> None:
    """More than the first table of pages has room for."""
    requests = [Request.of_tokens(range(start, start + 3000)) for start in (0, 5000, 0, 5000)]
    calls: list[int] = []
    reuse = measure_reuse(requests, on_progress=calls.append)
    assert reuse.next_uses == [[(2, 3000)], [(3, 3000)], [], []]
    assert sum(calls) == 4
    assert [optimal_hit_tokens(reuse, capacity) for capacity in (3000, 3500, 6000)] == [0, 500 + 500, 6000]
