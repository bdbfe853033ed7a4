"""Numbers of tokens on a command line."""

from __future__ import annotations

import re

UNITS = {"": 1, "k": 1_000, "M": 1_000_000, "G": 1_000_000_000}


def token_count(text: str) -> int | None:
    """The positive number of tokens that `text` tells, with k, M or G for thousands, millions and billions; or None.

    >>> token_count("1_500"), token_count("1.5M"), token_count("0"), token_count("1Q")
    (1500, 1500000, None, None)
    """
    match = re.fullmatch(r"\s*(\d[\d_]*(?:\.\d+)?)([kMG]?)\s*", text)
    if match is None:
        return None
    count = float(match[1]) * UNITS[match[2]]
    return int(count) if count >= 1 and count.is_integer() else None
