"""Cases of which the default run takes some, and the run under `stress` all."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def some_of(values: Iterable[str], default: Collection[str]) -> list[Any]:
    """`values`, of which those that are not in `default` are marked `stress`."""
    values = list(values)
    assert set(default) <= set(values)
    return [value if value in default else pytest.param(value, marks=pytest.mark.stress) for value in values]
