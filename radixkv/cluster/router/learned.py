"""What a cost router learns while it routes: how fast each replica computes, and what a second copy may cost."""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = "NDArray[np.float64]"

FIRST_S_PER_TOKEN = 1e-4  # until a prompt was computed; all replicas are equal then, so it decides nothing
KEPT = 0.98  # of what was learned before, at each prompt: about the last 50 count
POOLED_TOKENS = 10_000.0  # a replica is taken to be like all together until it has computed about as much
NOISE = 1.25  # replicas whose speeds differ by a smaller factor are taken to be equal

RECOMPUTED_SHARE = 0.025
PRICE_STEP = 0.2
PRICE_BOUNDS = (1.0, 16.0)
MEAN_OVER = 100  # requests


class Work(NamedTuple):
    """What a replica has computed, and how long it took."""

    tokens: float
    seconds: float

    def then(self, tokens: int, seconds: float) -> Work:
        """With one prompt more; those before it count a little less."""
        return Work(KEPT * self.tokens + tokens, KEPT * self.seconds + seconds)


NO_WORK = Work(0.0, 0.0)
FIRST_WORK = Work(1.0, FIRST_S_PER_TOKEN)  # of all replicas together


def relative_slowness(
    done_tokens: Floats, done_s: Floats, running_tokens: Floats, running_s: Floats, pooled_s_per_token: float
) -> Floats:
    """How many times as long as all replicas together each one takes for a token. O(replicas).

    A ratio of sums in which older prompts count less and less, as if the replica had also computed `POOLED_TOKENS` at
    the speed of all together. Prompts differ, so that equal replicas seem to differ, and all cold prefixes would go to
    the one that seems fastest. Hence a soft threshold (Donoho, Johnstone, Ideal Spatial Adaptation by Wavelet
    Shrinkage, Biometrika 81(3), 1994): a difference from all together counts as far as it exceeds `NOISE`. What is
    computed now counts as soon as it takes longer than it should, so a replica that hangs gets slower and slower.

    Args:
        done_tokens, done_s: what each has computed, as `Work` counts it.
        running_tokens, running_s: of the prompt that is computed there, and for how long; 0 if there is none.
        pooled_s_per_token: of all together.

    >>> done = np.full(3, 50_000.0), np.array([10.0, 11.0, 40.0])
    >>> running = np.zeros(3), np.zeros(3)
    >>> relative_slowness(*done, *running, pooled_s_per_token=0.0002).round(2)
    array([1. , 1. , 2.8])
    """
    tokens = done_tokens + POOLED_TOKENS
    seconds = done_s / pooled_s_per_token + POOLED_TOKENS  # as tokens of all together
    late = (seconds + running_s / pooled_s_per_token) / (tokens + running_tokens)
    ratios: Floats = np.maximum(seconds / tokens, late)
    return np.where(ratios > 1, np.maximum(1.0, ratios / NOISE), np.minimum(1.0, ratios * NOISE))


def copy_tokens(held: Floats) -> Floats:
    """How many tokens each replica would compute that others hold, of what each one holds. O(n log n).

    A token that k replicas hold counts as 1/k. What many hold, such as a system prompt, is wanted all the time: a copy
    of it is used by whatever comes next, and without one a replica would get nothing.

    >>> copy_tokens(np.array([100.0, 0.0, 100.0, 40.0])).round(1)   # the last 60 are held by two, the 40 by three
    array([ 0. , 43.3,  0. , 30. ])
    """
    order = np.argsort(-held, kind="stable")
    most_first = held[order]
    copied = np.zeros(len(held))
    copied[order[1:]] = np.cumsum((most_first[:-1] - most_first[1:]) / np.arange(1, len(held)))
    return copied


class CopyPrice:
    """What a second of computing again counts for, where another replica holds the result: a shadow price.

    The router keeps waiting short under a condition: of the tokens that some replica holds, no more than
    `recomputed_share` are computed again on another one. The price is the multiplier of this condition. It is found by
    dual ascent, one step a request (Boyd, Vandenberghe, Convex Optimization, 2004, chapter 5; online, as for budgets in
    auctions: Balseiro, Gur, Learning in Repeated Auctions with Budgets, Management Science 65(9), 2019):

        price ← price · exp(step · (copied − share · found) / mean found)

    `found` are the most tokens of the prompt that a replica holds, `copied` those that are computed again, where a
    token that k replicas hold counts as 1/k (`copy_tokens`). So the price rises when much is copied, and falls when the
    condition leaves room. It is at least 1, since a second of computing again is a second that others wait or that
    their prefixes are worth, and at most 16: where the condition cannot be met, a wait of 16 times what a copy costs is
    reason enough for one.
    """

    def __init__(self, recomputed_share: float = RECOMPUTED_SHARE) -> None:
        self.factor = PRICE_BOUNDS[0]
        self._share = recomputed_share
        self._mean_found = 0.0
        self._num_learned = 0

    def learn(self, *, found: float, copied: float) -> None:
        """A request was routed. O(1).

        >>> price = CopyPrice()
        >>> for _ in range(10): price.learn(found=1000, copied=900)     # dear: much more than 2.5 % is copied
        >>> 5 < price.factor < 16
        True
        """
        if found <= 0:
            return
        self._num_learned += 1
        self._mean_found += (found - self._mean_found) / min(self._num_learned, MEAN_OVER)
        step = PRICE_STEP * (copied - self._share * found) / self._mean_found
        lowest, highest = PRICE_BOUNDS
        self.factor = min(highest, max(lowest, self.factor * math.exp(step)))
