"""Which recurrent states are kept: simulated states and KV, so that each step proves that what it needs is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from radixkv.cache.eviction.policy import EvictionPolicy
from radixkv.cache.lease import Lease
from radixkv.cache.prefix_cache import PrefixCache
from radixkv.cache.residency.residency import HeldTokens
from radixkv.cache.residency.state_slots import StateSlots
from radixkv.errors import ConfigError, InvalidRequestError, InvariantError, OutOfPagesError
from told_policy import Told


class Simulated:
    """A cache whose KV and states are the tokens that they stand for."""

    def __init__(
        self, num_pages: int, page_size: int, num_slots: int, interval: int, policy: str | EvictionPolicy = "lru"
    ) -> None:
        self.kv = np.full((num_pages, page_size), -1, np.int32)
        self.states: list[tuple[int, ...]] = [()] * num_slots
        self.slots = StateSlots(num_slots, interval_tokens=interval)
        self.cache = PrefixCache(num_pages, page_size, policy, copy_page=self.copy, residency=self.slots)

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        self.kv[target, :num_tokens] = self.kv[source, :num_tokens]

    def check_kv(self, lease: Lease, tokens: list[int], num_tokens: int) -> None:
        """All KV of the first tokens is in the lease's pages."""
        read = self.kv[lease.pages].reshape(-1)[:num_tokens]
        assert read.tolist() == tokens[:num_tokens], "attention would read other tokens' KV"

    def step(self, lease: Lease, tokens: list[int], first: int, last: int) -> int:
        """Compute as much of the tokens `[first, last)` as the lease allows. Returns: up to which token."""
        last = min(last, lease.coverable_tokens())
        if last <= first:
            return first
        lease.cover(first, last)
        read, write = lease.state_slots()
        before = self.states[read] if first else ()
        assert before == tuple(tokens[:first]), "a state of other tokens is gone on from"
        self.check_kv(lease, tokens, first)
        self.states[write] = tuple(tokens[:last])
        size = self.cache.page_size
        for position in range(first, last):
            self.kv[lease.pages[position // size], position % size] = tokens[position]
        lease.advance(last)
        return last


def run(simulated: Simulated, tokens: list[int]) -> tuple[int, list[int]]:
    """Compute a prompt. Returns: how many tokens were found, and where its steps ended."""
    lease = simulated.cache.acquire(tokens, max_cached_tokens=len(tokens) - 1)
    done, ends = lease.cached_tokens, []
    while done < len(tokens):
        done = simulated.step(lease, tokens, done, len(tokens))
        ends.append(done)
        lease.commit(tokens[:done])
        simulated.cache.check_invariants()
    lease.release()
    simulated.cache.check_invariants()
    return lease.cached_tokens, ends


def prompt(*parts: tuple[int, int]) -> list[int]:
    """Runs of tokens: (first, how many) each."""
    return [first + i for first, num in parts for i in range(num)]


def test_a_branch_is_computed_once_more_and_then_never_again() -> None:
    simulated = Simulated(64, 4, 16, 100)
    common = (100, 11)  # ends inside a page
    assert run(simulated, prompt(common, (1, 6))) == (0, [17])
    assert run(simulated, prompt(common, (20, 6))) == (0, [11, 17])  # to where the two part, and on
    assert run(simulated, prompt(common, (40, 6))) == (11, [17])
    assert run(simulated, prompt(common, (60, 2), (90, 1))) == (11, [14])


def test_the_same_prompt_again_is_computed_once_more_and_then_never_again() -> None:
    simulated = Simulated(64, 4, 16, 100)
    same = prompt((100, 10))
    assert run(simulated, same) == (0, [10])
    assert run(simulated, same) == (0, [9, 10])
    assert run(simulated, same) == (9, [10])


def test_a_hit_that_is_cut_to_a_state_is_one_request_to_the_policy() -> None:
    policy = Told()
    simulated = Simulated(64, 4, 16, 100, policy)
    run(simulated, prompt((100, 12)))
    policy.requests.clear()
    lease = simulated.cache.acquire(prompt((100, 10), (1, 6)))
    assert (lease.cached_tokens, policy.requests) == (0, [(16, 8)])
    lease.release()


def test_what_is_announced_is_kept_the_first_time() -> None:
    simulated = Simulated(64, 4, 16, 100)
    same = prompt((100, 10))
    lease = simulated.cache.acquire(same, max_cached_tokens=9)
    lease.checkpoint_at(9)
    for first, last in (0, 9), (9, 10):
        assert simulated.step(lease, same, first, 10) == last
        lease.commit(same[:last])
    lease.release()
    assert run(simulated, same) == (9, [10])


def test_prefills_stop_at_intervals() -> None:
    simulated = Simulated(64, 4, 16, 6)
    assert run(simulated, prompt((100, 20))) == (0, [6, 12, 18, 20])
    assert run(simulated, prompt((100, 13), (1, 3)))[0] == 12


@pytest.mark.parametrize("again", [(1, 2), (11, 2)])
def test_a_state_that_goes_for_the_pages_of_its_hit_is_no_hit(again: tuple[int, int]) -> None:
    """The state lies in one of two siblings, and the source of the copy is the other: one is evicted for the rest."""
    simulated = Simulated(3, 4, 8, 100)
    for rest in (1, 2), (11, 2), again:
        run(simulated, prompt((100, 2), rest))
    asked = prompt((100, 2), (21, 6))
    assert simulated.cache.peek(asked) == 2
    found, _ = run(simulated, asked)
    assert found in (0, 2)
    assert simulated.cache.stats().evicted_tokens > 0


def test_states_go_with_their_pages_and_siblings_serve_each_other() -> None:
    simulated = Simulated(6, 4, 8, 100)
    run(simulated, prompt((100, 2), (1, 2)))
    run(simulated, prompt((100, 2), (11, 2)))
    assert simulated.cache.peek(prompt((100, 2), (21, 2))) == 2
    simulated.cache.reset()
    simulated.cache.check_invariants()
    assert simulated.slots.states() == (8, 8, 0, 0)


def test_a_state_stays_when_a_longer_copy_takes_its_pages_place() -> None:
    simulated = Simulated(64, 4, 16, 100)
    run(simulated, prompt((100, 6)))
    run(simulated, prompt((100, 7)))
    assert simulated.cache.peek(prompt((100, 6), (1, 1))) == 6


def test_a_state_moves_to_the_page_that_another_request_shared_first() -> None:
    simulated = Simulated(64, 4, 16, 100)
    tokens = prompt((100, 9))
    slow = simulated.cache.acquire(tokens)
    simulated.step(slow, tokens, 0, 5)
    slow.commit(tokens[:5])
    run(simulated, tokens)
    simulated.step(slow, tokens, 5, 8)
    slow.commit(tokens[:8])  # its own second page is given back
    simulated.cache.check_invariants()
    slow.release()
    assert simulated.cache.peek(prompt((100, 5), (1, 1))) == 5


def test_a_state_moves_to_the_tail_that_another_request_shared_first() -> None:
    simulated = Simulated(64, 4, 16, 100)
    tokens = prompt((100, 6))
    slow = simulated.cache.acquire(tokens)
    simulated.step(slow, tokens, 0, 5)
    slow.commit(tokens[:5])
    other = simulated.cache.acquire(tokens)
    simulated.step(other, tokens, 5, 6)
    other.commit(tokens)
    simulated.step(slow, tokens, 5, 6)
    slow.commit(tokens)
    simulated.cache.check_invariants()
    slow.release()
    other.release()
    assert simulated.cache.peek(prompt((100, 5), (1, 1))) == 5


def test_what_was_only_passed_is_taken_back_first() -> None:
    simulated = Simulated(64, 4, 4, 4)
    run(simulated, prompt((100, 8)))  # states after 4, which is passed, and 8
    run(simulated, prompt((200, 7)))  # after 4 and 7: the free ones
    run(simulated, prompt((300, 3)))
    assert simulated.cache.peek(prompt((100, 9))) == 8
    assert simulated.cache.peek(prompt((100, 7))) == 0


def test_the_cache_gives_up_states_before_a_request_fails() -> None:
    simulated = Simulated(64, 4, 3, 100)
    for number in range(5):
        run(simulated, prompt((100 * number, 6)))
    first, second = (simulated.cache.acquire(prompt((1000 * n, 4))) for n in (1, 2))
    for lease in first, second:
        lease.cover(0, 4)
    third = simulated.cache.acquire(prompt((3000, 4)))
    third.cover(0, 4)
    fourth = simulated.cache.acquire(prompt((4000, 4)))
    assert fourth.coverable_tokens() == 0
    with pytest.raises(OutOfPagesError, match="states of the recurrent layers"):
        fourth.cover(0, 4)
    for lease in first, second, third, fourth:
        lease.release()
    simulated.cache.check_invariants()


def test_tokens_are_computed_in_order() -> None:
    simulated = Simulated(64, 4, 8, 100)
    lease = simulated.cache.acquire(prompt((1, 8)))
    lease.cover(0, 4)
    lease.advance(4)
    with pytest.raises(InvalidRequestError, match="state is that after 4 tokens"):
        lease.cover(3, 5)
    lease.release()


def test_pages_without_partial_sharing_keep_states_at_their_ends() -> None:
    slots = StateSlots(8, interval_tokens=100)
    cache = PrefixCache(16, 4, residency=slots)
    for _ in range(2):
        with cache.acquire(prompt((1, 6))) as lease:
            for last in (4, 6):
                if lease.cached_tokens < last:
                    lease.cover(max(lease.cached_tokens, last - 4 if last == 4 else 4), last)
                    lease.advance(last)
                    lease.commit(prompt((1, last)))
        cache.check_invariants()
    assert cache.peek(prompt((1, 6))) == 4


def test_too_few_slots() -> None:
    with pytest.raises(ConfigError, match="2 states are too few: one request needs 3"):
        StateSlots(2, interval_tokens=8)


def drop_one(slots: StateSlots, name: str) -> None:
    """Take an entry out of one of its books."""
    getattr(slots, name).popitem() if isinstance(getattr(slots, name), dict) else getattr(slots, name).pop()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda slots: drop_one(slots, "_free"), "lost or lent twice"),
        (lambda slots: slots.take(), "are claimed"),
        (lambda slots: drop_one(slots, "_ended"), "are queued"),
        (lambda slots: drop_one(slots, "_slot_at"), "is not found in its place"),
        (lambda slots: drop_one(slots, "_of_page"), "is not found in its place"),
    ],
)
def test_broken_invariants_are_found(spoil: Callable[[StateSlots], object], message: str) -> None:
    simulated = Simulated(64, 4, 8, 100)
    run(simulated, prompt((1, 6)))
    spoil(simulated.slots)
    with pytest.raises(InvariantError, match=message):
        simulated.cache.check_invariants()


TOKENS = st.integers(1, 2)


class StateMachine(RuleBasedStateMachine):
    """Requests that share prefixes of few tokens, on few pages and fewer states, in any order."""

    @initialize(
        page_size=st.sampled_from([1, 2, 4]), slots=st.integers(3, 7), interval=st.integers(2, 9), data=st.data()
    )
    def begin(self, page_size: int, slots: int, interval: int, data: st.DataObject) -> None:
        policy = data.draw(st.sampled_from(["lru", "lfu", "slru", "fifo", "adaptive"]))
        self.simulated = Simulated(24 // page_size + 2, page_size, slots, interval, policy)
        self.open: list[tuple[Lease, list[int], int]] = []
        self.known: dict[Lease, int] = {}  # tokens that were found or committed

    @rule(tokens=st.lists(TOKENS, min_size=1, max_size=14), namespace=st.sampled_from([None, "a"]))
    def acquire(self, tokens: list[int], namespace: str | None) -> None:
        cache = self.simulated.cache
        expected = min(cache.peek(tokens[:-1], extra_key=namespace), len(tokens) - 1)
        try:
            lease = cache.acquire(tokens, extra_key=namespace, max_cached_tokens=len(tokens) - 1)
        except OutOfPagesError:
            return
        assert lease.cached_tokens <= expected  # less if the page to copy from had to make room
        self.simulated.check_kv(lease, tokens, lease.cached_tokens)
        self.open.append((lease, tokens, lease.cached_tokens))

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 9), num=st.integers(1, 8), held_back=st.integers(0, 2), commit=st.booleans())
    def compute(self, which: int, num: int, held_back: int, commit: bool) -> None:
        place = which % len(self.open)
        lease, tokens, done = self.open[place]
        done = self.simulated.step(lease, tokens, done, min(len(tokens), done + num))
        if commit:
            known = max(self.known.get(lease, lease.cached_tokens), done - held_back)
            lease.commit(tokens[:known])
            self.known[lease] = known
        self.open[place] = lease, tokens, done

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 9), token=TOKENS)
    def grow(self, which: int, token: int) -> None:
        place = which % len(self.open)
        lease, tokens, done = self.open[place]
        with suppress(OutOfPagesError):
            lease.grow(len(tokens) + 1)
            self.open[place] = lease, [*tokens, token], done

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 9), commit=st.booleans())
    def release(self, which: int, commit: bool) -> None:
        lease, tokens, done = self.open.pop(which % len(self.open))
        if commit:
            lease.commit(tokens[:done])
        lease.release()

    @rule()
    def reset(self) -> None:
        self.simulated.cache.reset()

    @invariant()
    def all_is_well(self) -> None:
        if not hasattr(self, "simulated"):
            return
        self.simulated.cache.check_invariants()
        for slot, tokens in kept_states(self.simulated):
            assert self.simulated.states[slot] == tokens, "a kept state is not that of its tokens"

    def teardown(self) -> None:
        if hasattr(self, "simulated"):
            for lease, _, _ in self.open:
                lease.release()
            self.simulated.cache.reset()
            total, free, evictable, _ = self.simulated.slots.states()
            assert (free, evictable) == (total, 0), "states leaked"


def kept_states(simulated: Simulated) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Each slot that the cache finds, and the tokens of the tree that it is found after."""
    for _, node in simulated.cache.nodes():
        path = node.path()
        ids = [int(t) for each in path for t in each.token_ids]
        root = node.root
        assert root.namespace is not None
        held = HeldTokens(root.namespace, np.array(ids, np.int32), [each.pages for each in path])
        for kept in simulated.slots.kept_states(held, 0):
            yield kept.slot, tuple(ids[: kept.num_tokens])


StateMachine.TestCase.settings = settings(
    max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
test_states_at_random = StateMachine.TestCase


@pytest.mark.stress
def test_states_at_random_for_long() -> None:
    run_state_machine_as_test(StateMachine, settings=settings(max_examples=1500, stateful_step_count=60, deadline=None))
