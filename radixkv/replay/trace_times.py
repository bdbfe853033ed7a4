"""Arrival times of a trace, whatever its clock counts."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from reprlib import repr as short_repr
from typing import Any

from radixkv.errors import InvalidRequestError

NANOSECONDS = "arrival_time_ns"
TIMES = (NANOSECONDS, "timestamp")
LARGEST = 1e21

SECONDS_SINCE_1970 = 1e9  # from 2001 on; smaller numbers count from a time of the trace's own
MILLISECONDS_SINCE_1970 = 1e10  # from April 1970 on
MICROSECONDS_SINCE_1970 = 1e14  # from 1973 on; as milliseconds they are years from 5138 on
NANOSECONDS_SINCE_1970 = 1e17  # from 1973 on

MIN_GAP_MS = 1.0
"""A clock of fewer units between two requests counts seconds: 1,000 requests a second are more than traces have."""
MAX_GAP_S = 60.0
"""A clock with fractions and more units between two requests counts milliseconds, not seconds."""


class TraceClock:
    """Reads the times of one trace's requests, and finds out what its clock counts.

    - "arrival_time_ns": nanoseconds.
    - "timestamp" as text: an ISO 8601 time, in UTC unless it names another zone.
    - "timestamp" as a number from 1e9 on: seconds, milliseconds, microseconds or nanoseconds since 1970, by its size.
    - "timestamp" as a smaller number: milliseconds of the trace's own clock, as Mooncake writes them, or seconds. All
      requests decide together, see `scale`.
    """

    def __init__(self) -> None:
        self._own: list[float] = []
        self._num_others = 0

    def time_s(self, row: Mapping[str, Any]) -> float:
        """When the request in `row` arrived, if the trace's own clock counts milliseconds. 0 if it has no time.

        Raises: InvalidRequestError if the time is neither a number that is not negative nor an ISO 8601 time.
        """
        field = next((field for field in TIMES if row.get(field) is not None), None)
        if field is None:
            return 0.0
        time = row[field]
        if field != NANOSECONDS and isinstance(time, str):
            self._num_others += 1
            return _iso_8601_s(field, time)
        if isinstance(time, bool) or not isinstance(time, int | float) or not 0 <= time < LARGEST:
            expected = "a number of at least 0" + ("" if field == NANOSECONDS else " or an ISO 8601 time from 1970 on")
            raise InvalidRequestError(f'"{field}" must be {expected}, not {short_repr(time)}')
        if field != NANOSECONDS and time < SECONDS_SINCE_1970:
            self._own.append(time)
            return time / 1e3
        self._num_others += 1
        if field == NANOSECONDS or time >= NANOSECONDS_SINCE_1970:
            return time / 1e9
        if time >= MICROSECONDS_SINCE_1970:
            return time / 1e6
        return time / 1e3 if time >= MILLISECONDS_SINCE_1970 else float(time)

    @property
    def scale(self) -> float:
        """What to multiply all times of the trace by: 1000 if its own clock counts seconds, else 1. O(requests).

        Numbers without fractions are milliseconds, unless they lie so close together that this cannot be
        (`MIN_GAP_MS`). Numbers with fractions are seconds, unless they lie too far apart for that (`MAX_GAP_S`).
        """
        if not self._own or self._num_others:
            return 1.0
        mean_gap = (max(self._own) - min(self._own)) / max(1, len(self._own) - 1)
        if any(time % 1 for time in self._own):
            return 1000.0 if mean_gap <= MAX_GAP_S else 1.0
        return 1000.0 if 0 < mean_gap < MIN_GAP_MS else 1.0


def _iso_8601_s(field: str, text: str) -> float:
    try:
        time = datetime.fromisoformat(text.strip())
        seconds = (time if time.tzinfo is not None else time.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        seconds = -1.0
    if seconds < 0:
        raise InvalidRequestError(
            f'"{field}" must be a number of at least 0 or an ISO 8601 time from 1970 on, not {short_repr(text)}'
        )
    return seconds
