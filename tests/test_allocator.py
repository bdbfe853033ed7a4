"""The page allocator against a list of counts."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from radixkv.cache.allocator import TokenToKVPoolAllocator
from radixkv.errors import ConfigError, InvariantError, OutOfPagesError


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


def _leak(allocator: TokenToKVPoolAllocator) -> None:
    allocator._ref_counts[0] = 0


def _free_in_use(allocator: TokenToKVPoolAllocator) -> None:
    allocator._ref_counts[3] = 1


def _free_twice(allocator: TokenToKVPoolAllocator) -> None:
    allocator._free[1] = allocator._free[0]


def _forget_a_free_page(allocator: TokenToKVPoolAllocator) -> None:
    allocator._num_free -= 1


def _negative_count(allocator: TokenToKVPoolAllocator) -> None:
    allocator._ref_counts[0] = -1


@pytest.mark.parametrize("tamper", [_leak, _free_in_use, _free_twice, _forget_a_free_page, _negative_count])
def test_check_invariants_finds(tamper: Callable[[TokenToKVPoolAllocator], None]) -> None:
    allocator = TokenToKVPoolAllocator(4)
    allocator.alloc(2)
    allocator.check_invariants()
    tamper(allocator)
    with pytest.raises(InvariantError):
        allocator.check_invariants()
