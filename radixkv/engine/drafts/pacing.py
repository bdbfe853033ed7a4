"""How long a draft may be, and when to make none: what it is expected to bring against what it is seen to cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from radixkv.engine.step_times import StepTimes

ALLOWED_LOSS = 0.01  # share of the time that drafts may lose
SAVED_STEPS = 24.0  # steps' time that gains may be kept for later losses
FIRST_STEPS = 4.0  # steps' time that may be lost before anything was gained
MEMORY = 0.97  # weight of what was seen before, for each draft of any request
OWN_MEMORY = 0.8  # the same, for each draft of one request
PRIOR_DRAFTS = 4.0  # drafts that the first guesses count as
LEAST_CHANCE = 0.02  # that a token is accepted: others are never worth their time
CLASSES = 6
FIRST_RATES = (0.3, 0.45, 0.5, 0.7, 0.8, 0.9)  # how often a token is accepted after those before it, by evidence


def evidence_class(evidence: int) -> int:
    """Of matches of 0 to 1, 2, 3, 4 to 7, 8 to 15, and more tokens.

    >>> [evidence_class(tokens) for tokens in (0, 2, 3, 4, 8, 32)]
    [0, 1, 2, 3, 4, 5]
    """
    if evidence < 4:
        return max(0, evidence - 1)
    return min(CLASSES - 1, evidence.bit_length())


class Rate:
    """How often a drafted token was accepted after those before it, weighted toward the newest drafts."""

    __slots__ = ("accepted", "rejected")

    def __init__(self) -> None:
        self.accepted = self.rejected = 0.0

    def note(self, drafted: int, accepted: int, memory: float) -> None:
        """Of `drafted` tokens the first `accepted` were right."""
        self.accepted = memory * self.accepted + accepted
        self.rejected = memory * self.rejected + (accepted < drafted)

    def given(self, prior: float, weight: float) -> float:
        """The rate, of which `prior` is known before with the weight of so many tokens."""
        return (self.accepted + weight * prior) / (self.accepted + self.rejected + weight)


class Rates:
    """The rates of all sources and classes of evidence; those of one request start from those of all."""

    def __init__(self, above: Rates | None = None) -> None:
        self._above = above
        self._memory = MEMORY if above is None else OWN_MEMORY
        self._rates: dict[tuple[str, int], Rate] = {}

    def note(self, source: str, evidence: int, drafted: int, accepted: int) -> None:
        """Of a draft of `drafted` tokens the first `accepted` were right."""
        key = source, evidence_class(evidence)
        rate = self._rates.get(key)
        if rate is None:
            rate = self._rates[key] = Rate()
        rate.note(drafted, accepted, self._memory)
        if self._above is not None:
            self._above.note(source, evidence, drafted, accepted)

    def of(self, source: str, evidence: int) -> float:
        """How often a token of such a draft is accepted, after those before it."""
        key = source, evidence_class(evidence)
        prior = FIRST_RATES[key[1]] if self._above is None else self._above.of(source, evidence)
        rate = self._rates.get(key)
        return prior if rate is None else rate.given(prior, PRIOR_DRAFTS)


class Offer(NamedTuple):
    """A draft of `num_tokens`, each accepted at `rate` after those before it."""

    num_tokens: int
    rate: float


def best_lengths(offers: Sequence[Offer], num_plain: int, times: StepTimes, room: int) -> list[int]:
    """How many tokens of each offer to check in a step of `num_plain` tokens besides, so that they come fastest.

    The tokens that are likeliest to be accepted come first; of their number, what gives most tokens a second by `times`
    is taken, `room` at most. O(tokens * log(tokens)).

    >>> times = StepTimes()
    >>> times.note(2, 1.0), times.note(10, 2.0)
    (None, None)
    >>> best_lengths([Offer(8, 0.95), Offer(8, 0.1)], 2, times, 8)
    [8, 0]
    """
    chances = [
        (-(offer.rate ** (place + 1)), number)
        for number, offer in enumerate(offers)
        for place in range(offer.num_tokens)
    ]
    chances.sort()
    best_count, best_speed, tokens = 0, num_plain / times.seconds(num_plain), float(num_plain)
    for count, (chance, _) in enumerate(chances[:room], start=1):
        if -chance < LEAST_CHANCE:
            break
        tokens -= chance
        if tokens > best_speed * times.seconds(num_plain + count):
            best_count, best_speed = count, tokens / times.seconds(num_plain + count)
    lengths = [0] * len(offers)
    for _, number in chances[:best_count]:
        lengths[number] += 1
    return lengths


class Account:
    """What drafts gained and lost so far, in seconds; they are made as long as it is not overdrawn.

    All steps of decodes pay a little in, so that what is lost on text that does not repeat stays below that share of
    the time: `ALLOWED_LOSS`. What was gained is kept for `SAVED_STEPS` at most,
    and a single step that was disturbed costs no more than `FIRST_STEPS`.
    """

    def __init__(self) -> None:
        self._balance_s: float | None = None  # before the first step

    @property
    def allows(self) -> bool:
        """Whether to draft."""
        return self._balance_s is not None and self._balance_s > 0

    def step(self, plain_s: float, gained_s: float) -> None:
        """Count a step that would have taken `plain_s` without drafts, which gained so much, or lost it if negative."""
        balance_s = FIRST_STEPS * plain_s if self._balance_s is None else self._balance_s
        balance_s += ALLOWED_LOSS * plain_s + gained_s
        self._balance_s = max(-FIRST_STEPS * plain_s, min(SAVED_STEPS * plain_s, balance_s))
