"""What a cost router learns while it routes: how fast each replica computes, and what a second copy may cost."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

FIRST_S_PER_TOKEN = 1e-4  # until a prompt was computed; all replicas are equal then, so it decides nothing
KEPT = 0.98  # of what was learned before, at each prompt: about the last 50 count
POOLED_TOKENS = 10_000.0  # a replica is taken to be like all together until it has computed about as much
NOISE = 1.25  # replicas whose speeds differ by a smaller factor are taken to be equal

RECOMPUTED_SHARE = 0.025
PRICE_STEP = 0.2
PRICE_BOUNDS = (1 / 16, 16.0)
MEAN_OVER = 100  # requests


class Speed:
    """Seconds per token of each replica, from how long prompts took.

    A ratio of sums in which older prompts count less and less, as if the replica had also computed `POOLED_TOKENS` at
    the speed of all replicas together. Prompts differ, so that equal replicas seem to differ, and all cold prefixes
    would go to the one that seems fastest. Hence a soft threshold (Donoho, Johnstone, Ideal Spatial Adaptation by
    Wavelet Shrinkage, Biometrika 81(3), 1994): a difference from all together counts as far as it exceeds `NOISE`.

    All calls are O(1).

    >>> speed = Speed()
    >>> for _ in range(50):
    ...     for replica, seconds in (("a", 0.20), ("b", 0.22), ("c", 0.90)):
    ...         speed.learn(replica, tokens=1000, seconds=seconds)
    >>> speed.s_per_token("a") == speed.s_per_token("b") < 0.0005 < speed.s_per_token("c")
    True
    """

    def __init__(self) -> None:
        self._of: dict[str, tuple[float, float]] = {}  # seconds, tokens
        self._relative: dict[str, float] = {}  # seconds per token, divided by those of all together
        self._seconds, self._tokens = FIRST_S_PER_TOKEN, 1.0  # of all together

    @property
    def pooled_s_per_token(self) -> float:
        """Seconds per token of all replicas together."""
        return self._seconds / self._tokens

    def forget(self, replica: str) -> None:
        """Take `replica` to be like all together again."""
        self._of.pop(replica, None)
        self._relative.pop(replica, None)

    def learn(self, replica: str, tokens: int, seconds: float) -> None:
        """`replica` has computed `tokens` in `seconds`."""
        old_seconds, old_tokens = self._of.get(replica, (0.0, 0.0))
        self._of[replica] = KEPT * old_seconds + seconds, KEPT * old_tokens + tokens
        self._seconds = KEPT * self._seconds + seconds
        self._tokens = KEPT * self._tokens + tokens
        self._relative[replica] = self._relative_after(replica, 0, 0.0)

    def s_per_token(self, replica: str) -> float:
        """Seconds per token of `replica`."""
        return self.pooled_s_per_token * self._relative.get(replica, 1.0)

    def s_per_token_of_running(self, replica: str, tokens: int, seconds: float) -> float:
        """As `s_per_token`, of a replica that has computed for `seconds`, and `tokens` are not done yet.

        A replica that hangs gets slower and slower.
        """
        known = self._relative.get(replica, 1.0)
        return self.pooled_s_per_token * max(known, self._relative_after(replica, tokens, seconds))

    def _relative_after(self, replica: str, more_tokens: int, more_seconds: float) -> float:
        seconds, tokens = self._of.get(replica, (0.0, 0.0))
        pooled = self.pooled_s_per_token
        if pooled <= 0:  # a clock that has not moved
            return 1.0
        ratio = (seconds + more_seconds + POOLED_TOKENS * pooled) / (tokens + more_tokens + POOLED_TOKENS) / pooled
        return max(1.0, ratio / NOISE) if ratio > 1 else min(1.0, ratio * NOISE)


class CopyPrice:
    """What a second of computing again counts for, where another replica holds the result: a shadow price.

    The router keeps waiting short under a condition: of the tokens that some replica holds, no more than
    `recomputed_share` are computed again on another one. The price is the multiplier of this condition. It is found by
    dual ascent, one step a request (Boyd, Vandenberghe, Convex Optimization, 2004, chapter 5; online, as for budgets in
    auctions: Balseiro, Gur, Learning in Repeated Auctions with Budgets, Management Science 65(9), 2019):

        price ← price · exp(step · (copied − share · found) / mean found)

    `found` are the most tokens of the prompt that a replica holds, `copied` those that are computed again, where a
    token that k replicas hold counts as 1/k (`copy_tokens`). So the price rises when much is copied, and falls when the
    condition leaves room. It stays within `PRICE_BOUNDS`: where the condition cannot be met, a wait of 16 times what a
    copy costs is reason enough for one.
    """

    def __init__(self, recomputed_share: float = RECOMPUTED_SHARE) -> None:
        self.factor = 1.0
        self._share = recomputed_share
        self._mean_found = 0.0
        self._num_learned = 0

    def learn(self, *, found: float, copied: float) -> None:
        """A request was routed. O(1).

        >>> price = CopyPrice()
        >>> for _ in range(100): price.learn(found=1000, copied=0)
        >>> price.factor < 1
        True
        """
        if found <= 0:
            return
        self._num_learned += 1
        self._mean_found += (found - self._mean_found) / min(self._num_learned, MEAN_OVER)
        step = PRICE_STEP * (copied - self._share * found) / self._mean_found
        lowest, highest = PRICE_BOUNDS
        self.factor = min(highest, max(lowest, self.factor * math.exp(step)))


class CopyTokens(NamedTuple):
    """What of a prompt would be computed again.

    Attributes:
        found: the most tokens that a replica holds.
        by_held: for each number of tokens that a replica holds: how many it would compute that others hold.
    """

    found: int
    by_held: dict[int, float]


def copy_tokens(held: Iterable[int]) -> CopyTokens:
    """What each replica would compute again, from how many leading tokens each one holds. O(n log n).

    A token that k replicas hold counts as 1/k. What many hold, such as a system prompt, is wanted all the time: a copy
    of it is used by whatever comes next, and without one a replica would get nothing.

    >>> copy_tokens([100, 100, 40, 0])      # 60 tokens are held by two, the first 40 by three
    CopyTokens(found=100, by_held={100: 0.0, 40: 30.0, 0: 43.333333333333336})
    """
    by_held: dict[int, float] = {}
    found = level = 0
    copied = 0.0
    for num_holders, tokens in enumerate(sorted(held, reverse=True)):
        if num_holders == 0:
            found = level = tokens
        if tokens < level:
            copied += (level - tokens) / num_holders
            level = tokens
        by_held[tokens] = copied
    return CopyTokens(found, by_held)
