"""What the engine asks for drafts, and tells what became of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from radixkv.engine.drafts.drafter import NO_DRAFT, Draft, Drafter, Text
from radixkv.engine.drafts.pacing import Account, Offer, Rates, best_lengths
from radixkv.engine.request import Request
from radixkv.engine.step_times import StepTimes

MOST_TOKENS = 16  # of a draft
MAX_REST = 8  # steps for which a request is not asked about that nothing is found for
IDLE_ROUNDS = 8  # without any draft, until steps are launched ahead again
LOOK_EVERY = 16  # steps: how often they wait for tokens then, and drafts are looked for
NEGLIGIBLE = 0.005  # share of a step that looking may take without resting

logger = logging.getLogger(__name__)


class SourceStats(NamedTuple):
    """How many tokens came from a source of drafts, and how many of them were right."""

    source: str
    drafted_tokens: int
    accepted_tokens: int


class SpeculationStats(NamedTuple):
    """What drafts did since the engine was made.

    Attributes:
        sources: by source, in alphabetical order.
        drafted_steps: how often a draft was checked, of each request.
        drafting_s: the time it took to make them.
    """

    sources: tuple[SourceStats, ...]
    drafted_steps: int
    drafting_s: float

    @property
    def drafted_tokens(self) -> int:
        """Tokens that were guessed and checked."""
        return sum(source.drafted_tokens for source in self.sources)

    @property
    def accepted_tokens(self) -> int:
        """Those that were right."""
        return sum(source.accepted_tokens for source in self.sources)


class _Pace:
    """What is known of one request's drafts."""

    def __init__(self, rates: Rates) -> None:
        self.rates = Rates(rates)
        self.fruitless = 0  # drafts in a row, or searches, that brought nothing
        self.rest = 0  # steps for which it is not asked about


class Speculation:
    """Asks a drafter, decides how much of each draft is worth checking, and learns from what came of it.

    Attributes:
        drafter: what guesses.
        times: how long steps of decodes take.
    """

    def __init__(
        self,
        drafter: Drafter,
        vocab_size: int,
        *,
        times: StepTimes | None = None,
        always: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """A speculation that has learned nothing yet.

        Args:
            times: shared with others who note such steps.
            always: check all of every draft, whatever it costs. For tests.
        """
        self.drafter = drafter
        self._vocab_size = vocab_size
        self._always = always
        self._clock = clock
        self._failed = False
        self._rates = Rates()
        self.times = StepTimes() if times is None else times
        self._account = Account()
        self._paces: dict[int, _Pace] = {}
        self._plain_s = 0.0  # of the last step of decodes, had there been no drafts
        self._looked_s = 0.0  # since the last step was counted
        self._look_s = 0.0  # of one text, on average
        self._sources: dict[str, list[int]] = {}
        self._drafted_steps = 0
        self._idle = 0  # rounds in a row that brought no draft
        self._num_steps = 0
        self._drafting_s = 0.0

    @property
    def is_on(self) -> bool:
        """Whether it would ask the drafter for the next step."""
        return not self._failed and (self._always or self._account.allows)

    @property
    def needs_tokens(self) -> bool:
        """Whether the next step must wait for this step's tokens, to draft after them.

        Where no draft was found for a while, steps may be launched ahead of the tokens again, but for one now and then.
        """
        return self.is_on and (self._always or self._idle < IDLE_ROUNDS or self._num_steps % LOOK_EVERY == 0)

    def stats(self) -> SpeculationStats:
        """What drafts did so far."""
        sources = [SourceStats(source, *counts) for source, counts in sorted(self._sources.items())]
        return SpeculationStats(tuple(sources), self._drafted_steps, self._drafting_s)

    def drafts(self, requests: Sequence[Request], num_tokens: int, room: int) -> list[Draft]:
        """A draft for each of `requests`, which are about to compute their last token; many are empty.

        Args:
            num_tokens: those that the step computes in any case.
            room: tokens that the step has room for besides.
        """
        none = [NO_DRAFT] * len(requests)
        if room < 1 or not self.is_on:
            return none
        started_at = self._clock()
        asked = [(place, request) for place, request in enumerate(requests) if self._asks(request)]
        if not asked:
            return none
        texts = [_text(request) for _, request in asked]
        try:
            found = self.drafter.draft(texts)
            drafts = [self._checked(text, draft) for text, draft in zip(texts, found, strict=True)]
        except Exception:
            self._failed = True
            logger.exception("the drafter failed; the engine goes on without drafts")
            return none
        for (_, request), draft in zip(asked, drafts, strict=True):
            if not len(draft.token_ids):
                self._fruitless(request)
        drafts = self._worth_it([request for _, request in asked], drafts, num_tokens, room)
        for (place, request), draft in zip(asked, drafts, strict=True):
            none[place] = _allowed(request, draft)
        self._idle = 0 if any(len(draft.token_ids) for draft in drafts) else self._idle + 1
        seconds = self._clock() - started_at
        self._looked_s += seconds
        self._drafting_s += seconds
        self._look_s += 0.1 * (seconds / len(asked) - self._look_s)
        return none

    def checked(self, request: Request, draft: Draft, accepted: int) -> None:
        """A draft was checked, and its first `accepted` tokens were right."""
        num_drafted = len(draft.token_ids)
        counts = self._sources.setdefault(draft.source, [0, 0])
        counts[0] += num_drafted
        counts[1] += accepted
        self._drafted_steps += 1
        pace = self._pace(request)
        pace.rates.note(draft.source, draft.evidence, num_drafted, accepted)
        if accepted:
            pace.fruitless = 0
        else:
            self._fruitless(request)

    def stepped(self, num_plain: int, num_tokens: int, accepted: int, seconds: float) -> None:
        """A step that computed tokens of outputs alone took so long.

        Args:
            num_plain: tokens that it would have computed without drafts: one of each request, and those forced.
            num_tokens: with drafts, `accepted` of which were right.
        """
        self._num_steps += 1
        self.times.note(num_tokens, seconds)
        if num_tokens == num_plain:
            plain_s, gained_s = seconds, 0.0
        else:
            plain_s = self.times.seconds(num_plain)
            gained_s = plain_s * (1 + accepted / num_plain) - seconds
        self._plain_s = plain_s
        self._account.step(plain_s, gained_s - self._looked_s)
        self._looked_s = 0.0

    def ended(self, request: Request) -> None:
        """The request runs no more."""
        self._paces.pop(request.id, None)
        try:
            self.drafter.ended(request.id)
        except Exception:
            self._failed = True
            logger.exception("the drafter failed; the engine goes on without drafts")

    def _pace(self, request: Request) -> _Pace:
        pace = self._paces.get(request.id)
        if pace is None:
            pace = self._paces[request.id] = _Pace(self._rates)
        return pace

    def _asks(self, request: Request) -> bool:
        if not request.params.speculate or _most(request) < 1:
            return False
        pace = self._pace(request)
        if pace.rest and not self._always:
            pace.rest -= 1
            return False
        return True

    def _fruitless(self, request: Request) -> None:
        """Let a request rest if looking costs something and nothing came of it for a while."""
        pace = self._pace(request)
        pace.fruitless += 1
        if pace.fruitless >= 4 and self._look_s * len(self._paces) > NEGLIGIBLE * self._plain_s:
            pace.rest = min(MAX_REST, pace.fruitless // 4)

    def _checked(self, text: Text, draft: Draft) -> Draft:
        """The draft as far as it may go and the model knows its tokens."""
        ids = draft.token_ids[: text.most]
        if len(ids):
            unknown = (ids < 0) | (ids >= self._vocab_size)
            if unknown.any():
                ids = ids[: int(unknown.argmax())]
        return draft if len(ids) == len(draft.token_ids) else draft._replace(token_ids=ids)

    def _worth_it(
        self, requests: Sequence[Request], drafts: Sequence[Draft], num_tokens: int, room: int
    ) -> list[Draft]:
        """The drafts, each as long as it is worth checking."""
        if self._always:
            lengths = []
            for draft in drafts:
                lengths.append(min(room, len(draft.token_ids)))
                room -= lengths[-1]
        else:
            offers = [
                Offer(len(draft.token_ids), self._pace(request).rates.of(draft.source, draft.evidence))
                for request, draft in zip(requests, drafts, strict=True)
            ]
            lengths = best_lengths(offers, num_tokens, self.times, room)
        return [
            draft if num == len(draft.token_ids) else draft._replace(token_ids=draft.token_ids[:num])
            for draft, num in zip(drafts, lengths, strict=True)
        ]


def _most(request: Request) -> int:
    """Tokens that a draft may have: a step gives one more, and no request wants more than it has room for."""
    return min(MOST_TOKENS, request.max_new_tokens - len(request.output_ids) - 1)


def _text(request: Request) -> Text:
    return Text(request.id, request.token_ids, len(request.prompt_ids), request.cache_options.namespace, _most(request))


def _allowed(request: Request, draft: Draft) -> Draft:
    """The draft up to where the request's own transform of logits forbids it, if it can tell; if it fails, none."""
    if request.edits is None or not len(draft.token_ids):
        return draft
    try:
        num = request.edits.num_allowed(request.output_ids, draft.token_ids)
    except Exception as error:  # the others go on
        request.finish("error", error)
        return NO_DRAFT
    return draft if num >= len(draft.token_ids) else draft._replace(token_ids=draft.token_ids[:num])
