"""What a cache drafter finds: against a search through all text, and with a cache that adds and evicts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from radixkv import PrefixCache
from radixkv.cache.namespace import SHARED, Namespace
from radixkv.engine.drafts.cache_drafter import CACHED, OWN, SIBLING, CacheDrafter
from radixkv.engine.drafts.drafter import Draft, Text
from radixkv.engine.drafts.token_store import CANDIDATES, LEAST_TEXT, MAX_MATCH, GrowingText, PagedTokens
from radixkv.kernels.ngram_chains import GRAM, PAIR

Tokens = list[int]


def array(tokens: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(tokens, np.int32)


def common_end(one: Tokens, other: Tokens) -> int:
    """How many last tokens two texts share; at most MAX_MATCH."""
    num = 0
    while num < min(len(one), len(other), MAX_MATCH) and one[-1 - num] == other[-1 - num]:
        num += 1
    return num


def matches(text: Tokens, sequences: Sequence[Tokens]) -> dict[tuple[int, ...], int]:
    """The oracle: each continuation of each place where something stands, and how much of the text's end is before."""
    found: dict[tuple[int, ...], int] = {}
    for sequence in sequences:
        for place in range(1, len(sequence)):
            after = tuple(sequence[place:])
            found[after] = max(found.get(after, 0), common_end(text, sequence[:place]))
    return found


def check(token_ids: Tokens, match_tokens: int, text: Tokens, sequences: Sequence[Tokens]) -> None:
    """The match is real, what follows it followed it, and where few places compete it is the longest."""
    known = matches(text, sequences)
    if match_tokens:
        real = [
            after
            for after, length in known.items()
            if length >= match_tokens and list(after[: len(token_ids)]) == token_ids
        ]
        assert real, (token_ids, match_tokens)
    longest = max(known.values(), default=0)
    competing = sum(length >= GRAM for length in known.values())
    if longest >= GRAM and competing <= CANDIDATES:
        assert match_tokens == longest
    assert match_tokens != 1


words = st.lists(st.integers(0, 5), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(text=words, steps=st.lists(st.integers(1, 7), max_size=6), most=st.integers(1, 9))
def test_a_text_finds_its_own_end(text: Tokens, steps: list[int], most: int) -> None:
    growing = GrowingText()
    known = 1
    for step in [*steps, len(text)]:
        known = min(known + step, len(text))
        found = growing.find(array(text[:known]), most)
        if not found.match_tokens:
            assert len(found.token_ids) == 0
            continue
        place = found.position
        assert common_end(text[:known], text[:place]) == found.match_tokens
        rest = text[place:known]
        assert found.token_ids.tolist() == [rest[i % len(rest)] for i in range(most)]
        check(found.token_ids.tolist()[: known - place], found.match_tokens, text[:known], [text[:known]])


def test_a_text_that_outgrows_its_room_is_found_as_before() -> None:
    text = array(np.random.default_rng(0).integers(0, 1000, 3 * LEAST_TEXT))
    growing = GrowingText()
    for known in (10, LEAST_TEXT, LEAST_TEXT + 1, 3 * LEAST_TEXT):
        growing.find(text[:known], 4)
    asked = np.concatenate([text, text[50:60]])
    found = growing.find(asked, 4)
    assert (found.match_tokens, found.position) == (10, 60)
    assert found.token_ids.tolist() == text[60:64].tolist()


def test_two_tokens_are_enough_and_one_is_not() -> None:
    growing = GrowingText()
    assert growing.find(array([1, 2, 3, 2]), 2).match_tokens == 0
    assert growing.find(array([1, 2, 3, 2, 1, 2]), 1).match_tokens == PAIR


def test_pages_find_what_follows_across_pages_and_in_their_own_space_alone() -> None:
    tokens = PagedTokens(num_pages=8, page_size=2)
    tokens.store(array([1, 2, 3, 4, 5]), array([6, 0, 3]), space=1)
    tokens.store(array([7, 8]), array([2]), page_before=0, space=1, start=4)  # another way on from 3, 4
    assert tokens.find(array([1, 2]), 9, 1).token_ids.tolist() == [3, 4, 7, 8], "the newest goes on"
    assert tokens.find(array([3, 4]), 9, 1).position == 4
    assert tokens.find(array([1, 2]), 9, 0).match_tokens == 0
    assert tokens.forget(2, array([2])) == 1
    assert tokens.find(array([1, 2]), 9, 1).token_ids.tolist() == [3, 4]
    assert tokens.find(array([1, 2, 3, 4]), 9, 1)[:2] == (4, 4)


def test_a_page_that_was_stored_anew_is_not_forgotten_for_what_it_held_before() -> None:
    tokens = PagedTokens(num_pages=2, page_size=4)
    tokens.store(array([1, 2, 3]), array([1]))
    tokens.store(array([1, 2, 3, 4]), array([1]))
    assert tokens.forget(3, array([1])) == 0
    assert tokens.find(array([1, 2]), 9).token_ids.tolist() == [3, 4]


class Cached(RuleBasedStateMachine):
    """A small cache, whose pages come and go, and a drafter that listens to it."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = PrefixCache(num_pages=9, page_size=3, copy_page=lambda *_: None)
        self.drafter = CacheDrafter(self.cache)
        self.num_texts = 0

    @rule(
        tokens=st.lists(st.integers(0, 3), min_size=1, max_size=20),
        tenant=st.sampled_from([None, "a"]),
        cut=st.integers(1, 20),
    )
    def serve(self, tokens: Tokens, tenant: str | None, cut: int) -> None:
        with self.cache.acquire(tokens, extra_key=tenant) as lease:
            lease.commit(tokens[: max(cut, lease.cached_tokens)] if cut < len(tokens) else tokens)
            self.check()
            lease.commit(tokens)

    @rule(tokens=st.lists(st.integers(0, 3), min_size=1, max_size=12), tenant=st.sampled_from([None, "a", "b"]))
    def draft(self, tokens: Tokens, tenant: str | None) -> None:
        sequences = [
            [int(token) for node in path for token in node.token_ids] for path in self.paths(Namespace(tenant))
        ]
        self.num_texts += 1
        (draft,) = self.drafter.draft([Text(self.num_texts, array(tokens), len(tokens), Namespace(tenant), 5)])
        self.drafter.ended(self.num_texts)
        if draft.source in (CACHED, SIBLING):
            check(draft.token_ids.tolist(), draft.evidence, tokens, sequences)

    @rule()
    def reset(self) -> None:
        self.cache.reset()

    def paths(self, namespace: Namespace) -> list[list]:  # type: ignore[type-arg]
        nodes = [node for _, node in self.cache.nodes() if not node.is_root]
        return [node.path() for node in nodes if node.root.namespace == namespace]

    @invariant()
    def check(self) -> None:
        held = sum(node.num_tokens for _, node in self.cache.nodes())
        assert self.drafter.num_cached == held, "it knows what the tree holds, and nothing else"


TestCached = Cached.TestCase
TestCached.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)


def drafts(drafter: CacheDrafter, tokens: Tokens, namespace: Namespace = SHARED, most: int = 4) -> Draft:
    (draft,) = drafter.draft([Text(0, array(tokens), len(tokens), namespace, most)])
    drafter.ended(0)
    return draft


def stored(cache: PrefixCache, tokens: Tokens, extra_key: str | None = None) -> None:
    with cache.acquire(tokens, extra_key=extra_key) as lease:
        lease.commit(tokens)


def test_the_longest_match_wins_and_the_own_text_among_equals() -> None:
    cache = PrefixCache(num_pages=32, page_size=4)
    drafter = CacheDrafter(cache)
    stored(cache, [9, 9, 1, 2, 3, 4, 5, 6])
    assert drafts(drafter, [7, 1, 2, 3]).source == CACHED
    own = drafts(drafter, [1, 2, 3, 8, 7, 1, 2, 3])
    assert (own.source, own.token_ids.tolist()) == (OWN, [8, 7, 1, 2])
    longer = drafts(drafter, [1, 2, 3, 8, 7, 9, 1, 2, 3])
    assert (longer.source, longer.token_ids.tolist(), longer.evidence) == (CACHED, [4, 5, 6], 4)
    sibling = drafts(drafter, [9, 9, 1, 2])
    assert (sibling.source, sibling.token_ids.tolist()) == (SIBLING, [3, 4, 5, 6])
    assert len(drafts(drafter, [40, 41]).token_ids) == 0


def test_other_namespaces_are_not_looked_at() -> None:
    cache = PrefixCache(num_pages=32, page_size=4)
    stored(cache, [1, 2, 3, 4], extra_key="a")
    drafter = CacheDrafter(cache)  # which comes late, and begins with what is cached
    assert len(drafts(drafter, [1, 2]).token_ids) == 0
    assert drafts(drafter, [1, 2], Namespace("a")).token_ids.tolist() == [3, 4]
    assert len(drafts(drafter, [1, 2], Namespace("a", "salt")).token_ids) == 0


def test_numbers_of_namespaces_are_used_again() -> None:
    cache = PrefixCache(num_pages=4, page_size=2)
    drafter = CacheDrafter(cache)
    for tenant in range(50):
        stored(cache, [1, 2, 3, 4], extra_key=str(tenant))
        assert drafts(drafter, [1, 2], Namespace(str(tenant))).token_ids.tolist() == [3, 4]
    assert drafter.num_namespaces <= 2


@pytest.mark.parametrize("tail", [1, 3])
def test_a_last_page_in_part_is_found_too(tail: int) -> None:
    cache = PrefixCache(num_pages=8, page_size=4, copy_page=lambda *_: None)
    drafter = CacheDrafter(cache)
    stored(cache, [1, 2, 3, 4, *range(5, 5 + tail)])
    assert drafts(drafter, [3, 4]).token_ids.tolist() == list(range(5, 5 + tail))
