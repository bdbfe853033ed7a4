"""The index of what replicas hold below their pools: it says what a loader would find."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radixkv.cache.page_keys import prompt_keys, root_key
from radixkv.cluster.index.lower_index import LowerIndex
from radixkv.errors import ConfigError
from radixkv.publish.wire import name_of

PAGE = 2
ROOT = root_key(None, None)
PROMPT = [3, 1, 4, 1, 5, 9, 2]
REPLICAS = ["a", "b", "c"]
MEDIA = ["CPU", "STORAGE"]
NAMES = [name_of(key) for key in prompt_keys(PROMPT, PAGE)[: len(PROMPT) // PAGE]]
OTHER = name_of(prompt_keys(PROMPT, PAGE, cache_salt="s")[0])

Told = dict[tuple[str, str], set[int]]


def loadable(told: Told, replica: str, in_pool: int) -> int:
    """Tokens that a replica need not compute: its pool's, and what one tier has from there on."""
    best = in_pool
    for medium in MEDIA:
        page = 0
        while page < len(NAMES) and (in_pool >= (page + 1) * PAGE or NAMES[page] in told.get((replica, medium), ())):
            page += 1
        best = max(best, page * PAGE)
    return best


changes = st.tuples(
    st.sampled_from(["store", "store", "store", "remove", "clear", "drop"]),
    st.sampled_from(REPLICAS),
    st.sampled_from(MEDIA),
    st.lists(st.sampled_from([*NAMES, OTHER]), max_size=4),
)


@given(st.lists(changes, max_size=20), st.dictionaries(st.sampled_from(REPLICAS), st.integers(1, len(PROMPT))))
def test_it_says_what_a_loader_would_find(steps: list[tuple[str, str, str, list[int]]], held: dict[str, int]) -> None:
    index, told = LowerIndex(PAGE), Told()
    for verb, replica, medium, names in steps:
        if verb == "store":
            index.store(replica, medium, names)
            told.setdefault((replica, medium), set()).update(names)
        elif verb == "remove":
            index.remove(replica, medium, names)
            told.setdefault((replica, medium), set()).difference_update(names)
        else:
            (index.clear if verb == "clear" else index.drop_replica)(replica)
            told = {key: pages for key, pages in told.items() if key[0] != replica}
    for replica in REPLICAS:
        for medium in MEDIA:
            assert index.pages_of(replica, medium) == told.get((replica, medium), set())
    expected = {replica: loadable(told, replica, held.get(replica, 0)) for replica in REPLICAS}
    assert index.lookup(PROMPT, ROOT, held) == {replica: tokens for replica, tokens in expected.items() if tokens}


def test_two_tiers_are_not_put_together() -> None:
    index = LowerIndex(PAGE)
    index.store("a", "CPU", NAMES[:1])
    index.store("a", "STORAGE", NAMES[1:2])
    assert index.lookup(PROMPT, ROOT, {}) == {"a": PAGE}, "a request loads from one"
    assert index.lookup(PROMPT, ROOT, {"a": PAGE}) == {"a": 2 * PAGE}


def test_what_was_told_first_is_forgotten_first() -> None:
    index = LowerIndex(PAGE, max_pages=2)
    index.store("a", "STORAGE", NAMES)
    assert index.pages_of("a", "STORAGE") == set(NAMES[-2:])


def test_namespaces_are_told_apart() -> None:
    index = LowerIndex(PAGE)
    index.store("a", "STORAGE", [OTHER])
    assert index.lookup(PROMPT, ROOT, {}) == {}
    assert index.lookup(PROMPT, root_key(None, "s"), {}) == {"a": PAGE}


@pytest.mark.parametrize("settings", [{"page_size": 0}, {"page_size": 2, "max_pages": 0}])
def test_wrong_settings_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        LowerIndex(**settings)
