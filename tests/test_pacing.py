"""How long drafts may be, and when none are made: with steps whose times are given."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from radixkv.engine.drafts.drafter import NO_DRAFT, Draft, Text
from radixkv.engine.drafts.pacing import (
    ALLOWED_LOSS,
    FIRST_STEPS,
    SAVED_STEPS,
    Account,
    Offer,
    Rates,
    best_lengths,
)
from radixkv.engine.drafts.speculation import IDLE_ROUNDS, LOOK_EVERY, Speculation
from radixkv.engine.step_times import FORGOTTEN, StepTimes


def times_of(**seconds: float) -> StepTimes:
    times = StepTimes()
    for name, value in seconds.items():
        times.note(int(name.removeprefix("t")), value)
    return times


@given(
    sizes=st.dictionaries(st.integers(1, 200), st.floats(0.001, 10), min_size=1, max_size=8),
    least=st.integers(1, 80),
    more=st.integers(0, 200),
)
def test_the_fastest_size_is_the_best_of_all(sizes: dict[int, float], least: int, more: int) -> None:
    times = times_of(**{f"t{size}": seconds for size, seconds in sizes.items()})
    found = times.fastest_size(least, least + more)
    speeds = [size / times.seconds(size) for size in range(least, least + more + 1)]
    assert least <= found <= least + more
    assert found / times.seconds(found) == pytest.approx(max(speeds))


def test_all_is_tried_before_anything_was_measured() -> None:
    assert StepTimes().fastest_size(3, 40) == 40


def test_times_follow_what_is_measured_and_ignore_a_disturbed_step() -> None:
    times = times_of(t4=1.0)
    for _ in range(50):
        times.note(4, 2.0)
    assert times.seconds(4) == pytest.approx(2.0, rel=1e-3)
    times.note(4, 1000.0)
    assert times.seconds(4) < 3.0
    assert times.seconds(1) == times.seconds(4), "fewer tokens than were ever measured"
    assert times.seconds(8) > times.seconds(4)


def test_a_size_that_was_disturbed_once_is_tried_again() -> None:
    times = times_of(t1=1.0, t9=99.0)
    assert times.seconds(9) < 5.0, "the first measurement, too"
    before = times.seconds(9)
    for _ in range(2 * FORGOTTEN):
        times.note(1, 1.0)
    assert times.seconds(9) < before
    assert times.seconds(1) == 1.0


def test_large_steps_are_told_apart_by_quarters_of_a_power_of_two() -> None:
    times = times_of(t17=1.0, t100=2.5)
    assert times.seconds(20) == 1.0
    assert times.seconds(97) == 2.5
    assert 1.0 < times.seconds(60) < 2.5


offers = st.lists(st.builds(Offer, st.integers(0, 4), st.sampled_from([0.05, 0.3, 0.6, 0.9, 0.99])), max_size=3)


@given(offers=offers, slope=st.sampled_from([0.0, 0.05, 0.3, 1.0]), room=st.integers(1, 12))
def test_lengths_are_those_that_give_tokens_fastest(offers: list[Offer], slope: float, room: int) -> None:
    num_rows = max(1, len(offers))
    times = StepTimes()
    for size in range(num_rows, num_rows + 13):
        times.note(size, 1 + slope * (size - num_rows))

    def speed(lengths: tuple[int, ...] | list[int]) -> float:
        tokens = num_rows + sum(
            offer.rate ** (place + 1) for offer, length in zip(offers, lengths, strict=True) for place in range(length)
        )
        return tokens / times.seconds(num_rows + sum(lengths))

    found = best_lengths(offers, num_rows, times, room)
    assert all(length <= offer.num_tokens for offer, length in zip(offers, found, strict=True))
    assert sum(found) <= room
    every = itertools.product(*[range(offer.num_tokens + 1) for offer in offers])
    best = max(speed(lengths) for lengths in every if sum(lengths) <= room)
    assert speed(found) >= best * 0.98, "chances below LEAST_CHANCE are left out"


def test_a_large_batch_gets_no_drafts_where_tokens_cost_their_full_time() -> None:
    times = StepTimes()
    for size in range(1, 257):
        times.note(size, max(1.0, size / 8))  # the machine is busy from 8 tokens on
    assert best_lengths([Offer(7, 0.7)], 1, times, 100) != [0]
    assert best_lengths([Offer(7, 0.7)] * 32, 32, times, 100) == [0] * 32


def test_rates_of_a_request_begin_with_those_of_all() -> None:
    everybody = Rates()
    one, other = Rates(everybody), Rates(everybody)
    before = other.of("own", 5)
    for _ in range(30):
        one.note("own", 5, 8, 0)
    assert one.of("own", 5) < 0.1
    assert one.of("own", 5) < other.of("own", 5) < before
    assert other.of("cached", 5) == before
    assert other.of("own", 2) < before
    for _ in range(30):
        one.note("own", 5, 8, 8)
    assert one.of("own", 5) > 0.9


def test_losses_stay_below_their_share_of_the_time() -> None:
    account = Account()
    assert not account.allows, "nothing is known yet"
    account.step(1.0, 0.0)
    assert account.allows
    lost, steps = 0.0, 0
    for _ in range(5000):
        loss = 0.4 if account.allows else 0.0
        account.step(1.0, -loss)
        lost, steps = lost + loss, steps + 1
    assert lost <= FIRST_STEPS + 1 + ALLOWED_LOSS * 1.01 * steps
    assert lost >= ALLOWED_LOSS * 0.9 * steps, "it goes on trying"


def test_gains_are_kept_for_a_while_alone() -> None:
    account = Account()
    for _ in range(1000):
        account.step(1.0, 5.0)
    num = 0
    while account.allows:
        account.step(1.0, -1.0)
        num += 1
    assert SAVED_STEPS <= num <= SAVED_STEPS * 1.1


class Wrong:
    """Drafts what is never right, and counts how often it is asked."""

    def __init__(self) -> None:
        self.num_asked = 0

    def draft(self, texts: list[Text]) -> list[Draft]:
        self.num_asked += 1
        return [Draft(np.zeros(text.most, np.int32), "wrong", 9) for text in texts]

    def ended(self, request_id: int) -> None:
        pass


def request_of(number: int) -> Any:
    return SimpleNamespace(
        id=number,
        params=SimpleNamespace(speculate=True),
        max_new_tokens=10**6,
        output_ids=[],
        prompt_ids=np.arange(4),
        token_ids=np.arange(4, dtype=np.int32),
        cache_options=SimpleNamespace(namespace=(None, None)),
        edits=None,
    )


def test_speculation_stops_asking_a_drafter_that_is_never_right() -> None:
    """With a clock that stands still, a step costs 1 and each drafted token 0.1."""
    drafter, request = Wrong(), request_of(0)
    speculation = Speculation(drafter, 100, clock=lambda: 0.0)
    total = 0.0
    for _ in range(2000):
        (draft,) = speculation.drafts([request], 1, 100)
        num = len(draft.token_ids)
        if num:
            speculation.checked(request, draft, 0)
        speculation.stepped(1, 1 + num, 0, 1 + 0.1 * num)
        total += 1 + 0.1 * num
    assert total <= 2000 * 1.03
    assert 0 < drafter.num_asked < 2000


def test_speculation_goes_on_where_it_is_right() -> None:
    drafter, request = Wrong(), request_of(0)
    speculation = Speculation(drafter, 100, clock=lambda: 0.0)
    lengths = []
    for _ in range(50):
        (draft,) = speculation.drafts([request], 1, 100)
        lengths.append(num := len(draft.token_ids))
        if num:
            speculation.checked(request, draft, num)
        speculation.stepped(1, 1 + num, num, 1 + 0.1 * num)
    assert lengths[0] == 0, "the time of a step is not known yet"
    assert min(lengths[-20:]) == 16


class Nothing(Wrong):
    """Never has a draft."""

    def draft(self, texts: list[Text]) -> list[Draft]:
        self.num_asked += 1
        return [NO_DRAFT for _ in texts]


def test_steps_are_launched_ahead_again_where_no_drafts_are_found() -> None:
    speculation = Speculation(Nothing(), 100, clock=lambda: 0.0)
    request, waited = request_of(0), []
    for _ in range(IDLE_ROUNDS + 10 * LOOK_EVERY):
        waited.append(speculation.needs_tokens)
        if waited[-1]:
            speculation.drafts([request], 1, 100)
        speculation.stepped(1, 1, 0, 1.0)
    assert all(waited[1:IDLE_ROUNDS])
    assert 9 <= sum(waited[IDLE_ROUNDS + 1 :]) <= 11


def test_time_that_drafting_takes_counts_as_loss() -> None:
    now = iter(range(10**6))
    speculation = Speculation(Wrong(), 100, clock=lambda: float(next(now)))
    request = request_of(0)
    speculation.stepped(1, 1, 0, 0.001)
    assert speculation.is_on
    speculation.drafts([request], 1, 100)
    speculation.stepped(1, 1, 0, 0.001)
    assert not speculation.is_on
    assert len(speculation.drafts([request], 1, 100)[0].token_ids) == 0
