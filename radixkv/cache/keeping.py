"""How strongly a request asks the cache to keep its tokens: checks of what callers give."""

from __future__ import annotations

from numbers import Real
from typing import Any

from radixkv.config.checks import checked_int, shown
from radixkv.errors import InvalidRequestError

MAX_KEEP_FOR_S = 10 * 365 * 24 * 3600  # ten years
MIN_PRIORITY, MAX_PRIORITY = -(2**63), 2**63 - 1


def checked_keep_for_s(value: object) -> float | None:
    """`value` as seconds in [0, MAX_KEEP_FOR_S], or None.

    Raises: InvalidRequestError if it is something else: a bool, text, NaN, infinity, a number out of that range.

    >>> checked_keep_for_s(60), checked_keep_for_s(None)
    (60.0, None)
    """
    if value is None:
        return None
    seconds: Any = value
    if isinstance(value, bool) or not isinstance(value, Real) or not seconds >= 0:
        raise InvalidRequestError(f"keep_for_s must be a number of seconds of at least 0, not {shown(value)}")
    if seconds > MAX_KEEP_FOR_S:
        raise InvalidRequestError(f"keep_for_s must be at most {MAX_KEEP_FOR_S} s (ten years), not {shown(value)}")
    return float(seconds)


def checked_priority(value: object) -> int:
    """`value` as an int. Raises: InvalidRequestError if it is no integer, or does not fit in 64 bits."""
    priority = checked_int("priority", value, error=InvalidRequestError)
    if not MIN_PRIORITY <= priority <= MAX_PRIORITY:
        raise InvalidRequestError(f"priority must lie from -2**63 to 2**63 - 1, not be {shown(value)}")
    return priority
