"""How soon what was used is used again: counted by kind and age, and turned into what it is worth to wait."""

from __future__ import annotations

from array import array
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]

NUM_BINS = 32
EDGES = np.unique(np.rint(2 ** (np.arange(2 * NUM_BINS) / 2)).astype(np.int64))[:NUM_BINS] - 1
"""Where the bins of ages begin: 0, 1, 2, 3, 5, 7, 10, 15, …, each about sqrt(2) times as wide as the one before."""
WIDTHS = np.diff(EDGES, append=2 * EDGES[-1]).astype(np.float64)
NUM_EPOCHS = 256

_EDGES: list[int] = EDGES.tolist()
BIN_OF_AGE = (np.searchsorted(EDGES, np.arange(EDGES[-1] + 1), side="right") - 1).astype(np.uint8).tobytes()
MAX_AGE = len(BIN_OF_AGE)


def bin_of(age: int) -> int:
    """The bin of an age in ticks; the last one has no end. O(1)."""
    return BIN_OF_AGE[age] if age < MAX_AGE else NUM_BINS - 1


class Wait:
    """Something that was used, is of some kind, and is watched until it is used again or given up.

    Attributes:
        kind: its row in the `ReuseTable`; stays the same while it is watched.
        is_watched: whether the table counts it.
        last_use: the tick since which it waits.
        first_age: how many ticks it had waited when it began to be watched.
    """

    __slots__ = ("first_age", "is_watched", "kind", "last_use")

    def __init__(self, kind: int) -> None:
        self.kind = kind
        self.is_watched = False
        self.last_use = self.first_age = 0


class ReuseTable:
    """A life table in which a use is what ends a life, for each kind.

    For each bin of ages it counts how many were used at that age, and how many ticks were spent waiting at that age.
    Their quotient estimates the hazard of reuse: the probability of a use in a tick, given that there was none
    before. What still waits, was given up or was not watched from its last use on counts for the ticks in which it
    was watched, so that it does not bias the estimate (Kaplan, Meier, Nonparametric Estimation from Incomplete
    Observations, Journal of the American Statistical Association 53, 1958, section 2).

    What waits is not looked at one by one, but counted by kind and by the epoch of its last use; epochs grow twice as
    long when there are too many. Memory: 5 kB a kind, whatever is watched.

    >>> table = ReuseTable(num_kinds=1)
    >>> for last_use in range(0, 4000, 40):                   # each used again 30 ticks later, but one of ten never
    ...     wait = Wait(kind=0)
    ...     table.watch(wait, last_use, tick=last_use)
    ...     table.end(wait, last_use + 30, reused=last_use % 400 > 0)
    >>> hazards = table.hazards(tick=4000)[0]
    >>> [float(hazards[bin_of(age)].round(3)) for age in (10, 30, 50)]
    [0.001, 0.112, 0.012]
    """

    def __init__(self, num_kinds: int, *, pool_prior: float = 3.0, kind_prior: float = 1.0) -> None:
        """`pool_prior`, `kind_prior`: how many reuses in each bin the assumptions of `hazards` weigh as much as."""
        self.num_kinds = num_kinds
        self.pool_prior = pool_prior
        self.kind_prior = kind_prior
        self._reuses = self._zeros(NUM_BINS)
        # Of waits that are over: those that reached a bin and no later one, and the ticks that they spent in it. If
        # one was not watched from age 0 on, what it spent before counts negative. Of those that are not over, only
        # that negative part: the rest follows from `_waiting`.
        self._over, self._over_ticks = self._zeros(NUM_BINS), self._zeros(NUM_BINS)
        self._open, self._open_ticks = self._zeros(NUM_BINS), self._zeros(NUM_BINS)
        self._waiting = self._zeros(NUM_EPOCHS)  # [epochs, kinds], the others [kinds, bins]
        self._epoch_ticks = 1
        self._first_tick = 0

    @property
    def num_reuses(self) -> float:
        """Waits that a use ended; old ones count less. O(kinds * bins)."""
        return float(np.frombuffer(self._reuses).sum())

    @property
    def num_waiting(self) -> int:
        """Waits that are not over. O(kinds * epochs)."""
        return round(float(np.frombuffer(self._waiting).sum()))

    def watch(self, wait: Wait, last_use: int, tick: int) -> None:
        """Begin to watch, at `tick`, what was last used at `last_use`. O(1)."""
        wait.is_watched = True
        wait.last_use = last_use
        wait.first_age = age = tick - last_use
        age_bin = bin_of(age)
        cell = wait.kind * NUM_BINS + age_bin
        self._open[cell] -= 1
        self._open_ticks[cell] -= age - _EDGES[age_bin]
        self._waiting[self._epoch(last_use) * self.num_kinds + wait.kind] += 1

    def end(self, wait: Wait, tick: int, *, reused: bool) -> None:
        """The wait is over: because of a use, or because nobody would see one. O(1)."""
        wait.is_watched = False
        row = wait.kind * NUM_BINS
        age_bin = bin_of(wait.first_age)
        cell, ticks = row + age_bin, wait.first_age - _EDGES[age_bin]
        self._open[cell] += 1
        self._open_ticks[cell] += ticks
        self._over[cell] -= 1
        self._over_ticks[cell] -= ticks
        self._waiting[self._epoch(wait.last_use) * self.num_kinds + wait.kind] -= 1
        age_bin = bin_of(tick - wait.last_use)
        cell = row + age_bin
        self._over[cell] += 1
        self._over_ticks[cell] += tick - wait.last_use - _EDGES[age_bin]
        if reused:
            self._reuses[cell] += 1

    def discount(self, factor: float) -> None:
        """Let what is over count only `factor` as much as before. O(kinds * bins)."""
        for counts in (self._reuses, self._over, self._over_ticks):
            np.frombuffer(counts)[:] *= factor

    def hazards(self, tick: int) -> Floats:
        """The estimated probability of a use in a tick, float64 [kinds, bins]. O(kinds * epochs).

        Where a kind was seen little, its hazard is assumed to be that of all kinds at that age; where these were seen
        little, to fall with the root of the age, since LRU is right more often than not.
        """
        reuses = self._by_kind(self._reuses)
        exposure = self.exposure(tick)
        expected = 1 / np.sqrt(EDGES + WIDTHS / 2)
        expected *= (reuses.sum() + 1) / ((exposure * expected).sum() + 1)
        pool = (reuses.sum(axis=0) + self.pool_prior) / (exposure.sum(axis=0) + self.pool_prior / expected)
        hazards: Floats = (reuses + self.kind_prior) / (exposure + self.kind_prior / pool)
        return hazards

    def exposure(self, tick: int) -> Floats:
        """The ticks that were spent waiting in each bin of ages, [kinds, bins]."""
        ages = np.maximum(tick - self._first_tick - (np.arange(NUM_EPOCHS) + 0.5) * self._epoch_ticks, 0)
        bins = np.searchsorted(EDGES, ages, side="right") - 1
        in_bin = np.arange(NUM_BINS) == bins[:, None]  # [epochs, bins]
        waiting = np.frombuffer(self._waiting).reshape(NUM_EPOCHS, self.num_kinds).T
        reached = self._by_kind(self._over) + self._by_kind(self._open) + waiting @ in_bin
        ticks = self._by_kind(self._over_ticks) + self._by_kind(self._open_ticks)
        ticks += waiting @ (in_bin * (ages - EDGES[bins])[:, None])
        beyond = reached[:, ::-1].cumsum(axis=1)[:, ::-1] - reached
        exposure: Floats = np.maximum(beyond * WIDTHS + ticks, 0)
        return exposure

    def _epoch(self, tick: int) -> int:
        epoch = (tick - self._first_tick) // self._epoch_ticks
        while epoch >= NUM_EPOCHS:
            self._make_room()
            epoch = (tick - self._first_tick) // self._epoch_ticks
        return max(epoch, 0)

    def _make_room(self) -> None:
        """Drop the first half of the epochs if nothing waits since then; else make all of them twice as long."""
        waiting, half = np.frombuffer(self._waiting).reshape(NUM_EPOCHS, self.num_kinds), NUM_EPOCHS // 2
        if waiting[:half].any():
            waiting[:half] = waiting[::2] + waiting[1::2]
            self._epoch_ticks *= 2
        else:
            waiting[:half] = waiting[half:]
            self._first_tick += half * self._epoch_ticks
        waiting[half:] = 0

    def _zeros(self, num_columns: int) -> array[float]:
        return array("d", bytes(8 * self.num_kinds * num_columns))  # counting one costs half of an ndarray's time

    def _by_kind(self, counts: array[float]) -> Floats:
        return np.frombuffer(counts).reshape(self.num_kinds, NUM_BINS)


class Worth(NamedTuple):
    """What it is worth to go on waiting, by kind and bin of ages: float64 [kinds, bins] each.

    Attributes:
        density: expected uses a tick of waiting, if one gives up when it is best to.
        surplus: expected uses beyond what the ticks of waiting cost, if one gives up when it is best to. Where that is
            never more than nothing, by what share `density` falls short of the price: from -1 to 0.
    """

    density: Floats
    surplus: Floats


def worth_of(hazards: Floats, price: float) -> Worth:
    """What it is worth to wait, where a tick of waiting costs `price` uses. O(kinds * bins²).

    With S(t | a) the probability that there is no use from age a to age t, waiting until then brings
    U = 1 - S(t | a) uses and takes T = ∫ S(u | a) du ticks, on average. The density at age a is the largest U / T over
    all t > a (the index of Gittins, Bandit Processes and Dynamic Allocation Indices, Journal of the Royal Statistical
    Society B 41, 1979), the surplus the largest U - price * T. Within a bin the hazard is constant.

    >>> hazards = np.full((1, NUM_BINS), 1e-6)
    >>> hazards[0, bin_of(30)] = 1.0                          # what is ever used again is after 22 to 30 ticks
    >>> worth = worth_of(hazards, price=0.03)
    >>> [float(worth.density[0, bin_of(age)].round(3)) for age in (0, 10, 22, 31)]
    [0.043, 0.077, 1.0, 0.0]
    >>> [float(worth.surplus[0, bin_of(age)].round(2)) for age in (0, 10, 22, 31)]
    [0.31, 0.61, 0.97, -1.0]
    """
    risk = hazards * WIDTHS
    used = -np.expm1(-risk)  # in this bin, if not before
    ticks = used / hazards
    risk_before = risk.cumsum(axis=1) - risk
    unused = np.triu(np.exp(-np.maximum(risk_before[:, None, :] - risk_before[:, :, None], 0)))  # S, [kinds, a, t]
    uses = (unused * used[:, None, :]).cumsum(axis=2)
    waits = (unused * ticks[:, None, :]).cumsum(axis=2)
    reached = np.triu(np.ones((NUM_BINS, NUM_BINS), np.bool_))
    index = np.divide(uses, waits, out=np.zeros_like(uses), where=reached).max(axis=2)
    surplus = (uses - price * waits).max(axis=2, where=reached, initial=-np.inf)
    short = np.minimum(index / max(price, 1e-300) - 1, 0)
    return Worth(index, np.where(surplus > 0, surplus, short))
