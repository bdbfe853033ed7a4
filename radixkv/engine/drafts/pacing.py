"""How long a draft may be, and when to make none: what it is expected to bring against what it is seen to cost."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

TREND = 0.2  # weight of the newest measurement of a step
OUTLIER = 3.0  # times the known time: a step that took longer was disturbed
FORGOTTEN = 256  # steps
FIRST_GUESS = 0.05  # of a step's time: what each further token costs, before it was measured
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


class StepTimes:
    """How long steps of decodes take by the number of their tokens, as measured; between measurements interpolated.

    A size that was not measured for `FORGOTTEN` steps is forgotten, but for the smallest: a step that was disturbed may
    have made it look dear, and what looks dear is not tried again.

    >>> times = StepTimes()
    >>> times.note(1, 0.010), times.note(9, 0.014)
    (None, None)
    >>> times.seconds(1), round(times.seconds(5), 4)
    (0.01, 0.012)
    """

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._seconds: dict[int, float] = {}
        self._noted_at: dict[int, int] = {}
        self._num_noted = 0

    def note(self, num_tokens: int, seconds: float) -> None:
        """A step of `num_tokens` took so long. O(log sizes)."""
        size = _rounded(num_tokens)
        self._num_noted += 1
        if self._num_noted % FORGOTTEN == 0:
            self._forget()
        self._noted_at[size] = self._num_noted
        known = self._seconds.get(size)
        if known is None:
            if self._sizes:
                seconds = min(seconds, OUTLIER * self.seconds(size))
            insort(self._sizes, size)
            self._seconds[size] = seconds
        else:
            self._seconds[size] = known + TREND * (min(seconds, OUTLIER * known) - known)

    def seconds(self, num_tokens: int) -> float:
        """How long a step would take; at least one was measured. O(log sizes)."""
        size = _rounded(num_tokens)
        if (known := self._seconds.get(size)) is not None:
            return known
        sizes, seconds = self._sizes, self._seconds
        place = bisect_left(sizes, size)
        if place == 0:
            return seconds[sizes[0]]
        below = sizes[place - 1]
        if place < len(sizes):
            above = sizes[place]
            share = (size - below) / (above - below)
            return seconds[below] + share * (seconds[above] - seconds[below])
        return seconds[below] * (1 + FIRST_GUESS * (size - below) / max(1, below))

    def _forget(self) -> None:
        for size in self._sizes[1:]:
            if self._noted_at[size] <= self._num_noted - FORGOTTEN:
                del self._seconds[size], self._noted_at[size]
        self._sizes = sorted(self._seconds)


def _rounded(num_tokens: int) -> int:
    """Sizes are told apart to the token up to 16, then to a quarter of a power of two."""
    if num_tokens <= 16:
        return num_tokens
    step = 1 << (num_tokens - 1).bit_length() - 3
    return -(-num_tokens // step) * step


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


def best_lengths(offers: Sequence[Offer], num_rows: int, times: StepTimes, room: int) -> list[int]:
    """How many tokens of each offer to check in a step of `num_rows` requests, so that tokens come fastest.

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
    best_count, best_speed, tokens = 0, num_rows / times.seconds(num_rows), float(num_rows)
    for count, (chance, _) in enumerate(chances[:room], start=1):
        if -chance < LEAST_CHANCE:
            break
        tokens -= chance
        if tokens > best_speed * times.seconds(num_rows + count):
            best_count, best_speed = count, tokens / times.seconds(num_rows + count)
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
