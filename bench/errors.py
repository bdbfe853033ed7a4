"""What a user of the benches can get wrong, and what a baseline can refuse."""

from __future__ import annotations

import sys
from typing import Any

import typer

from radixkv.errors import RadixKVError


class BenchError(Exception):
    """A mistake in the command or its files: printed as one line, exit code 2."""


class BaselineError(BenchError):
    """A baseline cannot serve this model or workload; the message says how to leave it out."""


def exit_code(app: typer.Typer, name: str) -> int:
    """Run the command `name`; every mistake of its user is one line on stderr and exit code 2."""
    try:
        result: Any = app(standalone_mode=False)
        return int(result or 0)
    except (BenchError, RadixKVError) as error:
        message = str(error)
    except typer.Abort:
        message = "interrupted"
    except Exception as error:
        if not hasattr(error, "format_message"):  # what typer raises for a wrong command line
            raise
        message = error.format_message()
    print(f"{name}: {message}", file=sys.stderr)
    return 2
