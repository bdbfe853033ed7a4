"""What a user of the benches can get wrong, and what a baseline can refuse."""

from __future__ import annotations


class BenchError(Exception):
    """A mistake in the command or its files: printed as one line, exit code 2."""


class BaselineError(BenchError):
    """A baseline cannot serve this model or workload; the message says how to leave it out."""
