"""How long steps take, by the number of their tokens."""

from __future__ import annotations

from bisect import bisect_left, insort

TREND = 0.2  # weight of the newest measurement of a step
OUTLIER = 3.0  # times the known time: a step that took longer was disturbed
FORGOTTEN = 256  # steps
FIRST_GUESS = 0.05  # of a step's time: what each further token costs, before it was measured


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

    def fastest_size(self, least: int, most: int) -> int:
        """Of how many tokens, from `least` to `most`, a step brings most of them a second; `most` if none was measured.

        O(log(most / least)) times O(log sizes).
        """
        if not self._sizes:
            return most
        best, best_speed, size = least, least / self.seconds(least), least
        while size < most:
            size = min(most, _rounded(size + 1))  # what is between takes as long
            if size > best_speed * self.seconds(size):
                best, best_speed = size, size / self.seconds(size)
        return best

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
