"""One way to run a bench from the command line: options, --json and --plot, one-line errors, exit codes."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console

from radixkv.errors import RadixKVError
from radixkv_bench.common import files, pictures
from radixkv_bench.common.errors import BenchError

FILES = "Files to write"
JsonFile = Annotated[
    Path | None, typer.Option("--json", rich_help_panel=FILES, metavar="FILE.json", help="Write all figures as JSON.")
]
PlotFile = Annotated[
    Path | None, typer.Option("--plot", rich_help_panel=FILES, metavar="FILE.png", help="Draw the figures.")
]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished run.

    Attributes:
        figures: all figures, ready for JSON.
        show: prints the tables.
        draw: draws the picture into an image file; None for a bench without a picture.
        failures: one line for each wrong result. With any, the exit code is 1.
    """

    figures: Any
    show: Callable[[Console], None]
    draw: Callable[[Path], None] | None = None
    failures: Sequence[str] = ()


def command(name: str, *, plots: bool = True) -> Callable[[Callable[..., Outcome]], Callable[[], int]]:
    """Make a function the command `name`: its parameters become options, its docstring the help.

    The command also takes --json, and --plot unless `plots` is false. Both places are checked before the run and
    written after it. Calling the result runs `sys.argv` and returns the exit code: 0, the 1 of failures, or 2 after a
    mistake of the user, which is one line on stderr.
    """
    extra = {"json_file": JsonFile, "plot_file": PlotFile} if plots else {"json_file": JsonFile}

    def decorate(measure: Callable[..., Outcome]) -> Callable[[], int]:
        def run(*, json_file: Path | None, plot_file: Path | None = None, **options: Any) -> int:
            files.check_folder(json_file)
            pictures.check_plot(plot_file)
            return report(measure(**options), json_file, plot_file)

        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command()(_with_options(run, measure, extra))

        def main() -> int:
            return exit_code(app, name)

        main.__doc__ = measure.__doc__
        return main

    return decorate


def _with_options(
    run: Callable[..., int], measure: Callable[..., Outcome], extra: dict[str, Any]
) -> Callable[..., int]:
    """Give `run` the parameters and the docstring of `measure`, and the `extra` options; typer reads them there."""
    hints = {**get_type_hints(measure, include_extras=True), **extra}
    declared = [
        parameter.replace(annotation=hints[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in inspect.signature(measure).parameters.values()
    ]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hints[name]) for name in extra
    ]
    run.__doc__ = measure.__doc__
    run.__annotations__ = {**hints, "return": int}
    run.__signature__ = inspect.Signature([*declared, *added], return_annotation=int)  # type: ignore[attr-defined]
    return run


def report(outcome: Outcome, json_file: Path | None, plot_file: Path | None) -> int:
    """Print the outcome, write its files, and return the exit code."""
    errors = error_console()
    outcome.show(Console())
    if json_file is not None:
        files.write_json(outcome.figures, json_file)
    if plot_file is not None and outcome.draw is not None:
        outcome.draw(plot_file)
    for written in filter(None, (json_file, plot_file)):
        errors.print(f"wrote {written}", highlight=False)
    for line in outcome.failures:
        errors.print(line, style="red", highlight=False)
    return 1 if outcome.failures else 0


def error_console() -> Console:
    """The console for progress, warnings and errors."""
    return Console(stderr=True, soft_wrap=True)


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
        message = _what_is_allowed(error) or error.format_message()
    print(f"{name}: {message}", file=sys.stderr)
    return 2


def _what_is_allowed(error: Exception) -> str | None:
    """The message for an option whose value is no number, or out of range; None for any other mistake."""
    mistakes = getattr(error.__cause__, "errors", None)
    options = getattr(getattr(error, "param", None), "opts", None)
    if mistakes is None or not options:
        return None
    mistake = mistakes()[0]
    limits = mistake.get("ctx", {})
    allowed = {
        "greater_than_equal": f"at least {limits.get('ge')}",
        "greater_than": f"more than {limits.get('gt')}",
        "less_than_equal": f"at most {limits.get('le')}",
        "less_than": f"less than {limits.get('lt')}",
        "int_parsing": "a whole number",
        "float_parsing": "a number",
    }.get(mistake["type"])
    return None if allowed is None else f"{options[0]} must be {allowed}, not {mistake['input']}"
