"""Sessions that come and go, with prompts and answers of ragged lengths: who asks what, and when.

A request is one turn of a session: the system prompt that all sessions share, what was asked and answered in the
session before, and what is asked now.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from radixkv_bench.common import corpus
from radixkv_bench.common.corpus import Encode

LONGEST_TAIL = 4  # a length is at most so many times the mean


@dataclass(frozen=True)
class Sizes:
    """What the traffic is made of; `turn_tokens` and `output_tokens` are means."""

    sessions: int = 12
    turns: int = 3
    system_tokens: int = 264
    turn_tokens: int = 64
    output_tokens: int = 32
    running: int = 8
    seed: int = 0


class TurnLengths(NamedTuple):
    """Tokens that a turn asks and is answered with."""

    asked: int
    answered: int


class Request(NamedTuple):
    """A turn of a session."""

    session: int
    turn: int


def session_lengths(sizes: Sizes) -> Iterator[list[TurnLengths]]:
    """The turns of one session after another, without end, the same for the same seed.

    Lengths have a long tail, as those of people do: exponential around their mean, at least 1, cut off at four times
    the mean.
    """
    rng = random.Random(sizes.seed)
    while True:
        yield [
            TurnLengths(_ragged(rng, sizes.turn_tokens), _ragged(rng, sizes.output_tokens)) for _ in range(sizes.turns)
        ]


def _ragged(rng: random.Random, mean: int) -> int:
    return min(1 + int(rng.expovariate(1 / mean)), LONGEST_TAIL * mean)


@dataclass(frozen=True)
class Traffic:
    """The system prompt, and of each session what each turn asks and how many tokens answer it."""

    sizes: Sizes
    system: tuple[int, ...]
    lengths: tuple[list[TurnLengths], ...]
    asked: dict[Request, list[int]]

    def prompt(self, request: Request, answers: dict[Request, list[int]]) -> list[int]:
        """The whole prompt of a turn, given the answers to the turns before it."""
        prompt = list(self.system)
        for turn in range(request.turn):
            before = Request(request.session, turn)
            prompt += self.asked[before] + answers[before]
        return prompt + self.asked[request]

    def output_tokens(self, request: Request) -> int:
        """How many tokens answer it."""
        return self.lengths[request.session][request.turn].answered

    @property
    def longest_tokens(self) -> int:
        """The longest prompt with its answer: a session's last turn."""
        return max(len(self.system) + sum(map(sum, turns)) for turns in self.lengths)

    @property
    def total_output_tokens(self) -> int:
        return sum(turn.answered for turns in self.lengths for turn in turns)

    def line(self) -> Line:
        """Who is served next."""
        return Line(self)


def build(sizes: Sizes, encode: Encode) -> Traffic:
    """Traffic of these sizes from the text of the standard library; what is asked is a new stretch of it each time."""
    lengths = tuple(islice(session_lengths(sizes), sizes.sessions))
    source = corpus.source_tokens(encode)
    asked = {
        Request(session, turn): corpus.take(source, turns[turn].asked)
        for session, turns in enumerate(lengths)
        for turn in range(sizes.turns)
    }
    return Traffic(sizes, tuple(corpus.take(corpus.example_tokens(encode), sizes.system_tokens)), lengths, asked)


class Line:
    """Requests that wait, first come first served.

    Twice as many sessions are open as requests run, so that those between two turns lose their place to others. An
    answered turn's successor goes to the end of the line; when a session ends, a new one comes.
    """

    def __init__(self, traffic: Traffic) -> None:
        self._turns = traffic.sizes.turns
        self._newcomers = iter(range(traffic.sizes.sessions))
        self._waiting = deque(Request(session, 0) for session in islice(self._newcomers, 2 * traffic.sizes.running))

    def pop(self) -> Request | None:
        """The request that has waited longest; None if nobody waits."""
        return self._waiting.popleft() if self._waiting else None

    def answered(self, request: Request) -> None:
        """Let the session go on, or the next one come."""
        if request.turn + 1 < self._turns:
            self._waiting.append(Request(request.session, request.turn + 1))
        else:
            self._waiting.extend(Request(session, 0) for session in islice(self._newcomers, 1))
