"""`Lease`: how long it lives, what it may commit, and that it gives back what it holds.

Words stand for sequences: `ids("abc")` are three whole pages of tokens.
"""

from __future__ import annotations

import gc
import warnings

import numpy as np
import pytest

from radixkv import Lease, PrefixCache, TreeNode
from radixkv.cache.eviction.policies import FIFOPolicy
from radixkv.errors import ClosedError, InvalidRequestError, InvalidTokenIdsError, PolicyError, TokenIdsTypeError
from strategies import PAGE, dump, ids, share

# -- the life of a lease ---------------------------------------------------------------------------------------------


def test_miss_then_hit(cache: PrefixCache) -> None:
    with cache.acquire(ids("ab", 2)) as lease:
        assert (lease.cached_tokens, lease.committed_tokens, lease.capacity_tokens) == (0, 0, 3 * PAGE)
        assert lease.pages.dtype == np.int32
        assert lease.commit(ids("ab", 2)) == lease.committed_tokens == 2 * PAGE
        pages = lease.pages.tolist()
    assert cache.stats().free_pages == 6  # the third page was full in part only, and is free again
    with cache.acquire(ids("abc")) as lease:
        assert lease.cached_tokens == lease.committed_tokens == 2 * PAGE
        assert lease.pages.tolist()[:2] == pages[:2]
        cache.check_invariants()


def test_nothing_is_shared_before_it_is_committed(cache: PrefixCache) -> None:
    with cache.acquire(ids("ab")), cache.acquire(ids("ab")) as second:
        assert second.cached_tokens == 0
        assert cache.stats().leased_pages == 4
    assert cache.peek(ids("ab")) == 0


def test_two_readers_share_pages(cache: PrefixCache) -> None:
    share(cache, "ab")
    first, second = cache.acquire(ids("abc")), cache.acquire(ids("abd"))
    assert first.pages.tolist()[:2] == second.pages.tolist()[:2]
    assert cache.stats().leased_pages == 2
    first.release()
    assert cache.stats().protected_tokens == 2 * PAGE
    second.release()
    assert cache.stats().protected_tokens == 0


def test_exception_in_the_block_frees_what_was_not_committed(cache: PrefixCache) -> None:
    leases = []

    def fail_midway() -> None:
        with cache.acquire(ids("abcd")) as lease:
            leases.append(lease)
            lease.commit(ids("ab"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_midway()
    assert leases[0].closed
    assert cache.peek(ids("abcd")) == 2 * PAGE
    assert cache.stats().free_pages == 6
    assert cache.stats().num_leases == 0


def test_release_twice_gives_back_once(cache: PrefixCache) -> None:
    lease = cache.acquire(ids("ab"))
    lease.release()
    before = cache.stats()
    lease.release()
    assert cache.stats() == before
    assert lease.pages.tolist() == []


def test_use_after_release(cache: PrefixCache) -> None:
    lease = cache.acquire(ids("a"))
    lease.release()
    assert repr(lease) == "Lease(closed)"
    for use in (lambda: lease.grow(1), lambda: lease.commit(ids("a")), lease.__enter__):
        with pytest.raises(ClosedError, match="the lease was released; acquire a new one"):
            use()


def test_dropped_lease_warns_and_gives_back(cache: PrefixCache) -> None:
    lease: Lease | None = cache.acquire(ids("ab"))
    assert cache.stats().num_leases == 1
    with pytest.warns(ResourceWarning, match=r"Lease\(0 tokens found, 0 shared, 2 pages\) was dropped without release"):
        lease = None
    assert lease is None
    assert (cache.stats().num_leases, cache.stats().free_pages) == (0, 8)


def test_lease_dropped_in_a_cycle_is_collected(cache: PrefixCache) -> None:
    share(cache, "a")
    request: dict[str, object] = {"lease": cache.acquire(ids("ab"))}
    request["self"] = request
    del request
    with pytest.warns(ResourceWarning, match="dropped without release"):
        gc.collect()
    assert (cache.stats().num_leases, cache.stats().protected_tokens, cache.stats().free_pages) == (0, 0, 7)


def test_released_lease_goes_silently(cache: PrefixCache) -> None:
    lease = cache.acquire(ids("a"))
    lease.release()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del lease
    assert caught == []


# -- commit ----------------------------------------------------------------------------------------------------------


def test_commit_in_chunks(cache: PrefixCache) -> None:
    with cache.acquire(ids("abc")) as lease:
        pages = lease.pages.tolist()
        whole = ids("abc")
        shared = [lease.commit(whole[:end]) for end in [1, PAGE, PAGE, 2 * PAGE + 1, 3 * PAGE]]
        assert shared == [0, PAGE, PAGE, 2 * PAGE, 3 * PAGE]
        assert lease.pages.tolist() == pages
        cache.check_invariants()
    assert [node.num_tokens for _, node in cache.tree.nodes()] == [0, PAGE, PAGE, PAGE]


@pytest.mark.parametrize("word", ["", "a", "ax", "xb", "xbc"])
def test_commit_must_begin_with_what_is_pinned(cache: PrefixCache, word: str) -> None:
    share(cache, "ab")
    with cache.acquire(ids("abc")) as lease:
        before = (cache.allocator.num_free, dump(cache.tree))
        with pytest.raises(InvalidRequestError, match=f"must begin with the {2 * PAGE} tokens that were found or"):
            lease.commit(ids(word))
        assert (cache.allocator.num_free, dump(cache.tree)) == before


def test_commit_needs_pages(cache: PrefixCache) -> None:
    with cache.acquire(ids("a", 1)) as lease:
        lease.commit(ids("a", 1) + [0] * (PAGE - 1))  # what was decoded since fits
        with pytest.raises(InvalidRequestError, match=r"9 tokens cannot be committed: the lease has pages for 8; grow"):
            lease.commit(ids("ab", 1))
        assert cache.stats().total_tokens == 2 * PAGE


def test_commit_of_other_tokens_than_asked_for_is_fine(cache: PrefixCache) -> None:
    with cache.acquire(ids("ab")) as lease:
        assert lease.commit(ids("xy")) == 2 * PAGE
    assert cache.peek(ids("xy")) == 2 * PAGE


@pytest.mark.parametrize("wrong", [[-1], [1.5]])
def test_commit_of_wrong_ids(cache: PrefixCache, wrong: list[int]) -> None:
    with cache.acquire(ids("a")) as lease, pytest.raises((InvalidTokenIdsError, TokenIdsTypeError)):
        lease.commit(wrong)


def test_second_to_commit_adopts_the_first_ones_pages(cache: PrefixCache) -> None:
    first, second = cache.acquire(ids("abc")), cache.acquire(ids("abd"))
    second.commit(ids("a"))
    first.commit(ids("abc"))
    first_pages, second_pages = first.pages.tolist(), second.pages.tolist()
    assert first_pages[0] == second_pages[0]
    assert cache.stats().leased_pages == 2
    assert second.commit(ids("abd")) == 3 * PAGE
    assert second.pages.tolist() == [*first_pages[:2], second_pages[2]]
    assert cache.allocator.ref_count(second_pages[1]) == 0
    assert cache.stats().free_pages == 4  # a, b, c, d
    cache.check_invariants()
    first.release()
    second.release()


def test_adoption_may_reach_beyond_what_is_committed(cache: PrefixCache) -> None:
    first, second = cache.acquire(ids("abc")), cache.acquire(ids("abc"))
    first.commit(ids("abc"))
    own = second.pages.tolist()
    second.commit(ids("ab"))
    assert second.pages.tolist() == [*first.pages.tolist()[:2], own[2]]
    first.release()
    assert cache.stats().evictable_tokens == PAGE  # "abc" is nobody's now, "ab" is pinned
    second.release()


def test_commit_after_the_namespace_was_emptied(cache: PrefixCache) -> None:
    with cache.acquire(ids("a"), extra_key="x") as early:
        with cache.acquire(ids("b"), extra_key="x") as other:
            other.commit(ids("b"))
        cache.reset()
        early.commit(ids("a"))
        cache.check_invariants()
    assert cache.peek(ids("a"), extra_key="x") == PAGE


def test_a_lease_dropped_while_warnings_are_errors_leaks_nothing(
    cache: PrefixCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", lambda event: printed.append(event.exc_type))
    lease = cache.acquire(ids("ab"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        del lease
        gc.collect()
    assert printed == [ResourceWarning], "an error in a finaliser is only printed"
    assert cache.stats().free_pages == 8


def test_a_lease_collected_amid_an_operation_is_taken_back_with_the_next(cache: PrefixCache) -> None:
    leases = [cache.acquire(ids("ab"))]
    insert = cache.tree.insert_tokens

    def collected_inside(*args, **kwargs):  # type: ignore[no-untyped-def]
        with pytest.warns(ResourceWarning):
            leases.clear()
        assert cache.allocator.num_used == 4, "not now"
        return insert(*args, **kwargs)

    cache.tree.insert_tokens = collected_inside  # type: ignore[method-assign]
    with cache.acquire(ids("cd")) as lease:
        lease.commit(ids("cd"))
    cache.tree.insert_tokens = insert  # type: ignore[method-assign]
    assert cache.stats().leased_pages == 0
    assert cache.stats().free_pages == 6


def test_a_negative_bound_on_the_hit_is_refused(cache: PrefixCache) -> None:
    with pytest.raises(InvalidRequestError, match="max_cached_tokens must be at least 0, not -1"):
        cache.acquire(ids("ab"), max_cached_tokens=-1)


def test_pages_come_back_though_the_policy_fails() -> None:
    class Failing(FIFOPolicy):
        fails = False

        def rank(self, node: TreeNode) -> int:
            if self.fails:
                raise ArithmeticError
            return 0

    policy = Failing()
    cache = PrefixCache(4, 4, policy)
    lease = cache.acquire(range(16))
    lease.commit(range(8))
    policy.fails = True
    with pytest.raises(PolicyError, match="'fifo' failed: ArithmeticError"):
        lease.release()
    assert cache.stats().free_pages == 2, "what was not committed"


def test_a_lease_keeps_its_pages_in_the_row_that_it_was_given() -> None:
    cache = PrefixCache(8, PAGE)
    row = np.full(4, -1, np.int32)
    with cache.acquire(range(PAGE), row=row) as lease:
        assert lease.pages.base is row
        lease.grow(3 * PAGE)
        assert (row[:3] == lease.pages).all()
        assert len(set(row[:3].tolist())) == 3
        with cache.acquire(range(PAGE)) as first:
            first.commit(range(PAGE))
            lease.commit(range(PAGE))
            assert row[0] == lease.pages[0] == first.pages[0], "the page that was shared first"
        with pytest.raises(InvalidRequestError, match="the row given to acquire holds 4 pages, not 5"):
            lease.grow(5 * PAGE)
        assert len(lease.pages) == 3
    assert len(lease.pages) == 0
    cache.check_invariants()


def test_a_row_that_is_too_short_is_refused_before_anything_is_taken() -> None:
    cache = PrefixCache(8, PAGE)
    with pytest.raises(InvalidRequestError, match="tokens need a row of 3 pages, not 2"):
        cache.acquire(range(3 * PAGE), row=np.zeros(2, np.int32))
    cache.check_invariants()
    assert cache.stats().free_pages == 8
