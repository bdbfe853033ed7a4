"""The stores' index against nested loops: chains found, order of giving way, hottest first."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radixkv.cache.page_keys import root_key
from radixkv.errors import ClosedError, ConfigError, InvalidPagesError
from radixkv.tiers.memory_store import HostStore
from radixkv.tiers.page_index import PageIndex, StoredPage
from radixkv.tiers.page_store import NewPage
from store_cases import PAGE_SIZE, Clock, chain, facts, found_tokens, ids

ROOT = root_key(None, None)


def host(num_pages: int = 100, policy: str = "lru", clock: Clock | None = None) -> HostStore:
    return HostStore(PAGE_SIZE, 96, 96 * num_pages, policy=policy, clock=clock or Clock())


sequences = st.lists(st.integers(0, 2), min_size=1, max_size=14)


@given(st.lists(sequences, max_size=12), sequences)
@settings(max_examples=200, deadline=None)
def test_find_gives_the_longest_stored_prefix_of_any_sequence(stored: list[list[int]], asked: list[int]) -> None:
    store = host()
    for tokens in stored:
        store.write(chain(tokens))
    store.check_invariants()
    shared = [sum(1 for _ in iter_shared(tokens, asked)) for tokens in stored]
    assert found_tokens(store, asked) == max(shared, default=0)


def iter_shared(left: list[int], right: list[int]) -> list[int]:
    count = 0
    while count < min(len(left), len(right)) and left[count] == right[count]:
        count += 1
    return left[:count]


def test_all_pages_found_but_the_last_are_whole() -> None:
    store = host()
    store.write(chain(range(11)))
    found = store.find(ROOT, ids(*range(6), 99))
    assert [page.num_tokens for page in found] == [4, 2]
    assert [len(page.tokens) for page in found] == [16, 16]
    assert store.find(ROOT, ids(*range(11)))[-1].num_tokens == 3
    assert store.find(ROOT, b"") == []


def test_pages_of_another_namespace_are_not_found() -> None:
    store = host()
    store.write(chain(range(8), facts(namespace=("tenant", None))))
    assert found_tokens(store, range(8)) == 0
    assert found_tokens(store, range(8), ("tenant", None)) == 8


def test_the_least_recently_used_end_of_a_chain_gives_way_first() -> None:
    store = host(4)
    store.write(chain(range(8), facts(used_s=1)))
    store.write(chain(range(50, 58), facts(used_s=2)))
    store.write(chain([70, 71], facts(used_s=3)))
    assert [found_tokens(store, tokens) for tokens in (range(8), range(50, 58), [70, 71])] == [4, 8, 2]
    assert store.stats().pages_evicted == 1
    store.check_invariants()


def test_a_page_never_gives_way_for_one_that_follows_it() -> None:
    store = host(2)
    store.write(chain(range(20)))
    assert found_tokens(store, range(20)) == 8
    assert store.stats().pages_evicted == 3


def test_kept_pages_and_higher_priorities_give_way_last() -> None:
    clock = Clock()
    store = host(3, clock=clock)
    store.write(chain([1, 1, 1, 1], facts(used_s=1, kept_until_s=1500)))
    store.write(chain([2, 2, 2, 2], facts(used_s=2, priority=5)))
    store.write(chain([3, 3, 3, 3], facts(used_s=9)))
    store.write(chain([4, 4, 4, 4], facts(used_s=4)))
    assert [found_tokens(store, [n] * 4) for n in (1, 2, 3, 4)] == [4, 4, 0, 4]
    store.write(chain([4, 4, 4, 4], facts(used_s=4, priority=9, kept_until_s=1600)))
    store.write(chain([2, 2, 2, 2], facts(used_s=4, priority=9, kept_until_s=1600)))
    store.write(chain([5, 5, 5, 5], facts(used_s=5)))  # everything else is kept: it is left out
    assert [found_tokens(store, [n] * 4) for n in (1, 2, 4, 5)] == [4, 4, 4, 0]
    clock.now_s = 1500.0  # the first promise is over
    store.write(chain([5, 5, 5, 5], facts(used_s=5)))
    assert [found_tokens(store, [n] * 4) for n in (1, 2, 4, 5)] == [0, 4, 4, 4]
    store.check_invariants()


def test_lfu_gives_up_what_was_used_least_often() -> None:
    store = host(2, policy="lfu")
    store.write(chain([1] * 4, facts(used_s=1, hits=9)))
    store.write(chain([2] * 4, facts(used_s=2, hits=1)))
    store.write(chain([3] * 4, facts(used_s=3, hits=1)))
    assert [found_tokens(store, [n] * 4) for n in (1, 2, 3)] == [4, 0, 4]


def test_a_page_whose_parent_comes_later_is_found_then() -> None:
    store = host()
    first, second = chain(range(8))
    store.write([second])
    assert found_tokens(store, range(8)) == 0
    assert store.hottest(9) == []
    store.write([first])
    assert found_tokens(store, range(8)) == 8
    assert len(store.hottest(9)) == 2


def test_hottest_are_chains_from_their_first_page_on() -> None:
    store = host()
    store.write(chain([*range(4), 10, 11, 12, 13, 20], facts(used_s=1)))
    store.write(chain([*range(4), 30, 31, 32, 33], facts(used_s=1)))
    store.write(chain([7] * 4, facts(used_s=2)))
    tail = chain([*range(4), 10, 11, 12, 13, 20])[-1]
    store.touch([(tail.parent_key, tail.tokens, facts(used_s=5))])
    shown = [page.tokens for page, _ in store.hottest(5)]
    assert shown == [ids(*range(4)), ids(10, 11, 12, 13), ids(20), ids(7, 7, 7, 7), ids(30, 31, 32, 33)]
    assert [page.tokens for page, _ in store.hottest(2)] == shown[:2]


def test_remove_forgets_all_pages_below_a_key() -> None:
    store = host()
    store.write(chain(range(12)))
    store.write(chain([*range(4), 9]))
    store.write(chain([1, 2], facts(namespace=("a", "b"))))
    first, second, _ = chain(range(12))
    assert store.remove(second.parent_key) == 3
    assert found_tokens(store, range(12)) == 4
    assert store.remove(root_key("a", "b")) == 1
    assert store.remove(first.parent_key) == 1
    assert store.stats().pages == 0
    store.check_invariants()


def test_facts_are_brought_up_to_date_by_writing_and_touching() -> None:
    store = host()
    store.write(chain(range(4), facts(hits=1)))
    store.write(chain(range(4), facts(hits=2)))
    assert [known.hits for _, known in store.hottest(9)] == [2]
    store.touch([(ROOT, ids(*range(4)), facts(hits=3)), (ROOT, ids(9), facts())])
    assert [known.hits for _, known in store.hottest(9)] == [3]
    assert store.stats().pages_written == 1


def test_what_does_not_fit_a_store_is_refused_by_name() -> None:
    store = host()
    with pytest.raises(InvalidPagesError, match="96 bytes, not 1"):
        store.write([NewPage(ROOT, ids(1), b"x", facts())])
    for key, tokens in [(ROOT, b""), (ROOT, b"abc"), (ROOT, ids(*range(5))), (b"short", ids(1))]:
        with pytest.raises(InvalidPagesError, match="1 to 4 tokens"):
            store.write([NewPage(key, tokens, bytes(96), facts())])
    with pytest.raises(ConfigError, match="lru, lfu, priority"):
        host(policy="best")
    with pytest.raises(ConfigError, match="room for a page"):
        HostStore(4, 96, 95)


def test_a_closed_host_store_says_so() -> None:
    store = host()
    store.close()
    store.close()
    with pytest.raises(ClosedError):
        store.find(ROOT, ids(1))


def test_index_invariants_are_checked() -> None:
    index = PageIndex(PAGE_SIZE)
    page = StoredPage(ROOT, ids(1, 2, 3, 4), facts())
    index.add(page)
    index.check_invariants()
    assert index.first_to_go(0.0) is page
    index.hold(page.key or b"")
    assert index.first_to_go(0.0) is None
    index.let_go(page.key or b"")
    assert index.first_to_go(0.0) is page
