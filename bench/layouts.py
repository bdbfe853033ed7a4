"""Five ways to lay KV out in memory, over one workload: what each of them holds, wastes and copies, and what fits.

python bench/layouts.py --help
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import transformers
import typer
from rich.console import Console

import layout_report as reports
import models
import plot
from errors import BenchError, exit_code
from layout_runs import Job, Settings, differences
from layout_traffic import Sizes
from report import write_json

SIZES = "Sizes of the workload"
RUN = "How it is run"
FILES = "Files to write"
SIZE_DEFAULTS, DEFAULTS = Sizes(), Settings()

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def layouts(
    sessions: Annotated[
        int, typer.Option(rich_help_panel=SIZES, help="Sessions that come and go.")
    ] = SIZE_DEFAULTS.sessions,
    turns: Annotated[int, typer.Option(rich_help_panel=SIZES, help="Turns of each session.")] = SIZE_DEFAULTS.turns,
    system_tokens: Annotated[
        int, typer.Option(rich_help_panel=SIZES, help="Tokens that all sessions begin with.")
    ] = SIZE_DEFAULTS.system_tokens,
    turn_tokens: Annotated[
        int, typer.Option(rich_help_panel=SIZES, help="Tokens asked a turn: the mean of lengths with a long tail.")
    ] = SIZE_DEFAULTS.turn_tokens,
    output_tokens: Annotated[
        int, typer.Option(rich_help_panel=SIZES, help="Tokens answered a turn: likewise the mean.")
    ] = SIZE_DEFAULTS.output_tokens,
    running: Annotated[
        int, typer.Option(rich_help_panel=SIZES, help="Requests served at one time.")
    ] = SIZE_DEFAULTS.running,
    seed: Annotated[int, typer.Option(rich_help_panel=SIZES, help="Of the lengths.")] = SIZE_DEFAULTS.seed,
    model: Annotated[
        str | None, typer.Option(help="A local directory or a hub id.", show_default="demo: it ships with radixkv")
    ] = None,
    random_model: Annotated[
        str | None,
        typer.Option(
            metavar="SIZES", help="A Llama with random weights instead, as in hidden=512,layers=8,heads=8,kv_heads=2."
        ),
    ] = None,
    rounds: Annotated[
        int, typer.Option(rich_help_panel=RUN, help="Times all are timed, interleaved; the medians count.")
    ] = DEFAULTS.rounds,
    page_size: Annotated[
        int, typer.Option(rich_help_panel=RUN, help="paged, radix: tokens a page.")
    ] = DEFAULTS.page_size,
    chunk_tokens: Annotated[
        int, typer.Option(rich_help_panel=RUN, help="chunked: tokens by which a cache grows.")
    ] = DEFAULTS.chunk_tokens,
    static_tokens: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=RUN,
            help="static: tokens that are preallocated for a request. paged, radix: their pool holds as much as those "
            "of all running requests.",
            show_default="the longest request: the least that serves all",
        ),
    ] = DEFAULTS.static_tokens,
    memory_mb: Annotated[
        float, typer.Option(rich_help_panel=RUN, help="Memory to fill with requests, in 10^6 bytes.")
    ] = DEFAULTS.memory_mb,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", rich_help_panel=FILES, metavar="FILE.json", help="Write all figures as JSON."),
    ] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", rich_help_panel=FILES, metavar="FILE.png", help="Draw the figures.")
    ] = None,
) -> int:
    """Serve the same sessions with their KV contiguous (transformers' DynamicCache), preallocated (StaticCache),
    in chunks (radixkv's ChunkedCache), in pages, and in pages shared through a radix tree; compare their bytes.

    docs/layouts.md says what the figures mean.

    Exits with 1 if tokens differ, with 2 if the command cannot be run.
    """
    if model is not None and random_model is not None:
        raise BenchError("--model and --random-model both say which model to run; give one of them")
    sizes = Sizes(sessions, turns, system_tokens, turn_tokens, output_tokens, running, seed)
    settings = Settings(rounds, page_size, chunk_tokens, static_tokens, memory_mb)
    _check_files(json_file, plot_file)
    source = model or "demo" if random_model is None else models.parse_random_model(random_model)
    return _run(Job(sizes, settings, source), json_file, plot_file)


def _check_files(json_file: Path | None, plot_file: Path | None) -> None:
    """Find out before the run, not after it, that its figures have no place to go."""
    for path in (json_file, plot_file):
        if path is not None and not path.resolve().parent.is_dir():
            raise BenchError(f"cannot write {path}: there is no directory {path.parent}")
    if plot_file is not None:
        plot.check_plot(plot_file)


def _run(job: Job, json_file: Path | None, plot_file: Path | None) -> int:
    """Run, print, write; the exit code."""
    errors = Console(stderr=True, soft_wrap=True)
    measured = job.run(errors)
    report = reports.build(job, measured)
    reports.print_table(report, Console())
    if json_file is not None:
        write_json(report, json_file)
    if plot_file is not None:
        reports.write_plot(report, plot_file)
    for written in filter(None, (json_file, plot_file)):
        errors.print(f"wrote {written}", highlight=False)
    for name, other, request, position in differences(measured):
        where = f"at token {position} of turn {request.turn} of session {request.session}"
        errors.print(f"tokens differ: {where}, {other} answers otherwise than {name}", style="red", highlight=False)
    return 0 if report["tokens_equal"] else 1


def main() -> int:
    """The command; every mistake of its user is one line on stderr and exit code 2."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return exit_code(app, "layouts")


if __name__ == "__main__":
    sys.exit(main())
