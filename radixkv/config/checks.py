"""Checks of one value that a caller gave: the value in Python's own type, or an error of one line.

An error says which value is wrong, what is allowed and what was given.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any, NamedTuple

from radixkv.errors import ConfigError, RadixKVError

SHOWN_CHARS = 60


class Bounds(NamedTuple):
    """The numbers that are allowed: at least `minimum`, more than `above`, at most `maximum`; None is no bound."""

    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None

    def hold(self, value: float) -> bool:
        """Whether `value` lies within. NaN and infinity never do."""
        minimum, above, maximum = self
        return (
            -math.inf < value < math.inf
            and (minimum is None or value >= minimum)
            and (above is None or value > above)
            and (maximum is None or value <= maximum)
        )

    def __str__(self) -> str:
        """As words, with a space before them; empty without a bound.

        >>> str(Bounds(minimum=1)), str(Bounds(above=0, maximum=1)), str(Bounds())
        (' of at least 1', ' in (0, 1]', '')
        """
        lowest = self.minimum if self.above is None else self.above
        if lowest is None:
            return "" if self.maximum is None else f" of at most {self.maximum}"
        if self.maximum is None:
            return f" of at least {lowest}" if self.above is None else f" above {lowest}"
        return f" in {'[' if self.above is None else '('}{lowest}, {self.maximum}]"


def checked_int(
    name: str,
    value: object,
    minimum: int | None = None,
    maximum: int | None = None,
    *,
    error: type[RadixKVError] = ConfigError,
) -> int:
    """`value` as an int from `minimum` to `maximum`, both included. Integers of NumPy are integers, bools are not.

    >>> checked_int("page_size", 16, 1)
    16
    >>> checked_int("page_size", 0, 1)
    Traceback (most recent call last):
    radixkv.errors.ConfigError: page_size must be an integer of at least 1, not 0
    """
    if type(value) is int or (not isinstance(value, bool) and isinstance(value, Integral)):
        number = int(value)
        if (minimum is None or number >= minimum) and (maximum is None or number <= maximum):
            return number
    raise error(f"{name} must be an integer{Bounds(minimum, None, maximum)}, not {shown(value)}")


def checked_number(
    name: str, value: object, bounds: Bounds, *, what: str = "a number", error: type[RadixKVError] = ConfigError
) -> float:
    """`value` as a finite float within `bounds`. Numbers of NumPy are numbers, bools are not.

    >>> checked_number("top_p", 1, Bounds(above=0, maximum=1))
    1.0
    """
    if type(value) is float or (not isinstance(value, bool) and isinstance(value, Real)):
        try:
            number = float(value)
        except OverflowError:  # an int with more digits than a float has
            number = math.inf
        if bounds.hold(number):
            return number
    raise error(f"{name} must be {what}{bounds}, not {shown(value)}")


def checked_flag(name: str, value: object, *, error: type[RadixKVError] = ConfigError) -> bool:
    """`value` as a bool; those of NumPy are bools, 0, 1 and texts are not."""
    kind = type(value)
    if kind is bool or (kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_")):
        return bool(value)
    raise error(f"{name} must be True or False, not {shown(value)}")


def checked_text(name: str, value: object, *, error: type[RadixKVError] = ConfigError) -> str:
    """`value`, which is text."""
    if isinstance(value, str):
        return value
    raise error(f"{name} must be text, not {shown(value)}")


def checked_choice(
    name: str, value: object, choices: Collection[Any], *, error: type[RadixKVError] = ConfigError
) -> str:
    """`value`, which is one of the texts `choices`."""
    if isinstance(value, str) and value in choices:
        return value
    raise error(f"{name} must be one of {', '.join(choices)}, not {shown(value)}")


def shown(value: object) -> str:
    """`value` as messages show it: on one line of at most 60 characters.

    >>> shown("fast"), shown(10**5000)
    ("'fast'", 'an integer of more than 4300 digits')
    """
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python prints no integer of so many digits
        return "an integer of more than 4300 digits"
    return text if len(text) <= SHOWN_CHARS else f"{text[: SHOWN_CHARS - 3]}..."
