"""How long a medium that failed is left alone."""

from __future__ import annotations

import logging
from collections.abc import Callable

logger = logging.getLogger(__name__)

FIRST_S, MOST_S = 1.0, 300.0


class Backoff:
    """Counts the failures of one thing, says the first one of a row, and lets it rest longer after each of them.

    Not thread-safe: its owner has a lock.

    >>> now_s = 0.0
    >>> backoff = Backoff("writing to disk", clock=lambda: now_s)
    >>> backoff.rests
    False
    """

    def __init__(self, what: str, clock: Callable[[], float]) -> None:
        self._what, self._clock = what, clock
        self._in_a_row = 0
        self._until = 0.0
        self.errors = 0
        self.last_error: str | None = None

    @property
    def rests(self) -> bool:
        """Whether it should be left alone now."""
        return self._in_a_row > 0 and self._clock() < self._until

    def failed(self, error: BaseException | str) -> None:
        """It failed once more; a warning says so if it had not failed before, or worked again since."""
        self.errors += 1
        self._in_a_row += 1
        self.last_error = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        rest_s = min(MOST_S, FIRST_S * 2.0 ** min(self._in_a_row - 1, 30))
        self._until = self._clock() + rest_s
        if self._in_a_row == 1:
            logger.warning("%s failed, and is tried again from time to time: %s", self._what, self.last_error)

    def worked(self) -> None:
        """It works."""
        if self._in_a_row:
            logger.info("%s works again", self._what)
        self._in_a_row = 0
