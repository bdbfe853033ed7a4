"""Processes of their own that run a test's code."""

from __future__ import annotations

import os
from pathlib import Path

TESTS = Path(__file__).parent


def child_environment(**more: str) -> dict[str, str]:
    """The environment in which a process can import what tests import: their helpers, and those of the benches."""
    folders = os.pathsep.join(map(str, [TESTS, TESTS.parent / "bench"]))
    return {**os.environ, "PYTHONPATH": folders, **more}
