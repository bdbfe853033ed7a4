"""The page allocator against a list of counts."""

from __future__ import annotations

import random

import numpy as np
import pytest

from radixkv.cache import allocator as allocator_module
from radixkv.cache.allocator import TokenToKVPoolAllocator, check_free_list
from radixkv.errors import ConfigError, InvalidRequestError, InvariantError, OutOfPagesError


def test_new_pool_is_free() -> None:
    allocator = TokenToKVPoolAllocator(3)
    assert (allocator.num_pages, allocator.num_free, allocator.num_used) == (3, 3, 0)
    assert [allocator.ref_count(page) for page in range(3)] == [0, 0, 0]


def test_alloc_gives_distinct_pages_with_one_reference() -> None:
    allocator = TokenToKVPoolAllocator(5)
    pages = allocator.alloc(5)
    assert pages.dtype == np.int32
    assert sorted(pages.tolist()) == [0, 1, 2, 3, 4]
    assert {allocator.ref_count(page) for page in pages} == {1}
    assert (allocator.num_free, allocator.num_used) == (0, 5)


def test_fewer_than_no_pages_cannot_be_had() -> None:
    allocator = TokenToKVPoolAllocator(4)
    with pytest.raises(InvalidRequestError, match="-1 pages cannot be allocated; ask for at least 0"):
        allocator.alloc(-1)
    assert allocator.num_free == 4


def test_alloc_of_nothing() -> None:
    allocator = TokenToKVPoolAllocator(1)
    assert allocator.alloc(0).tolist() == []
    allocator.alloc(1)
    assert allocator.alloc(0).tolist() == []


def test_exhaustion_takes_nothing_and_says_the_numbers() -> None:
    allocator = TokenToKVPoolAllocator(4)
    allocator.alloc(3)
    with pytest.raises(OutOfPagesError, match="2 pages are needed, but only 1 of 4 are free") as caught:
        allocator.alloc(2)
    error = caught.value
    assert (error.needed, error.free, error.evictable, error.total) == (2, 1, 0, 4)
    assert isinstance(error, MemoryError)
    assert allocator.num_free == 1
    allocator.check_invariants()


def test_pages_are_free_when_the_last_reference_goes() -> None:
    allocator = TokenToKVPoolAllocator(4)
    pages = allocator.alloc(3)
    allocator.retain(pages[:2])
    assert len(allocator.release(pages)) == 1
    assert allocator.num_free == 2
    assert len(allocator.release(pages[:2])) == 2
    assert allocator.num_free == 4
    allocator.check_invariants()


def test_alloc_copies_what_later_changes_cannot_touch() -> None:
    allocator = TokenToKVPoolAllocator(4)
    first = allocator.alloc(2)
    kept = first.tolist()
    allocator.release(first)
    allocator.alloc(4)
    assert first.tolist() == kept


@pytest.mark.parametrize("misuse", ["retain", "release"])
def test_a_free_page_cannot_be_counted(misuse: str) -> None:
    allocator = TokenToKVPoolAllocator(4)
    pages = allocator.alloc(2)
    allocator.release(pages[1:])
    with pytest.raises(AssertionError, match="a free page was"):
        getattr(allocator, misuse)(pages)
    assert [allocator.ref_count(page) for page in pages] == [1, 0]
    allocator.check_invariants()


@pytest.mark.parametrize("num_pages", [0, -1, True, 2.0, "4", None])
def test_size_must_be_a_positive_integer(num_pages: object) -> None:
    with pytest.raises(ConfigError, match=f"num_pages must be an integer of at least 1, not {num_pages!r}"):
        TokenToKVPoolAllocator(num_pages)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(3))
def test_random_history_agrees_with_a_list_of_counts(seed: int) -> None:
    draw = random.Random(seed)
    num_pages = 13
    allocator = TokenToKVPoolAllocator(num_pages)
    counts = [0] * num_pages
    for _ in range(400):
        used = [page for page in range(num_pages) if counts[page]]
        some = draw.sample(used, draw.randint(0, len(used)))
        match draw.choice(["alloc", "retain", "release", "release"]):
            case "alloc":
                wanted = draw.randint(0, counts.count(0))
                for page in allocator.alloc(wanted).tolist():
                    assert counts[page] == 0
                    counts[page] = 1
            case "retain":
                allocator.retain(np.array(some, np.int32))
                for page in some:
                    counts[page] += 1
            case "release":
                expected = sum(counts[page] == 1 for page in some)
                assert len(allocator.release(np.array(some, np.int32))) == expected
                for page in some:
                    counts[page] -= 1
        assert [allocator.ref_count(page) for page in range(num_pages)] == counts
        assert allocator.num_free == counts.count(0)
        allocator.check_invariants()


@pytest.mark.parametrize(
    ("free", "ref_counts", "message"),
    [
        pytest.param([3, 2], [0, 1, 0, 0], "without references", id="a page without references is not free"),
        pytest.param([3, 2], [1, 1, 0, 1], "without references", id="a page in use is free"),
        pytest.param([3, 3], [1, 1, 0, 0], "without references", id="a page is free twice"),
        pytest.param([3], [1, 1, 0, 0], "without references", id="a free page is forgotten"),
        pytest.param([3, 2], [-1, 1, 0, 0], "negative reference counts", id="a negative count"),
    ],
)
def test_books_that_contradict_each_other_are_found(free: list[int], ref_counts: list[int], message: str) -> None:
    check_free_list(np.array([3, 2], np.int32), np.array([1, 1, 0, 0], np.int32))
    with pytest.raises(InvariantError, match=message):
        check_free_list(np.array(free, np.int32), np.array(ref_counts, np.int32))


def test_check_invariants_looks_at_the_allocators_own_books(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[int], list[int]]] = []
    monkeypatch.setattr(
        allocator_module, "check_free_list", lambda free, counts: seen.append((sorted(free.tolist()), counts.tolist()))
    )
    allocator = TokenToKVPoolAllocator(4)
    taken = allocator.alloc(2)
    allocator.retain(taken[:1])
    allocator.check_invariants()
    counts = [allocator.ref_count(page) for page in range(4)]
    assert seen == [([page for page in range(4) if counts[page] == 0], counts)]
    assert sorted(counts) == [0, 0, 1, 2]
