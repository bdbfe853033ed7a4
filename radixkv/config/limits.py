"""The largest numbers that the code can count to."""

from __future__ import annotations

MAX_COUNT = 2**31 - 1  # slots and positions are int32
