"""What choosing a step's tokens costs, with few and many requests running and waiting.

python bench/scheduler.py --help
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from radixkv_bench.common.command import Outcome, command, error_console
from radixkv_bench.common.errors import BenchError
from radixkv_bench.common.files import parse_numbers
from radixkv_bench.common.options import RUN, SIZES
from radixkv_bench.common.progress import add_steps, quiet_bar
from radixkv_bench.scheduler import report as reports
from radixkv_bench.scheduler.load import Load, Short, measure


@command("scheduler")
def main(
    running: Annotated[
        str, typer.Option(rich_help_panel=SIZES, help="Requests that run, comma-separated.")
    ] = "1,64,256",
    waiting: Annotated[
        str, typer.Option(rich_help_panel=SIZES, help="Requests that wait, comma-separated.")
    ] = "0,1000,10000",
    prompt_tokens: Annotated[int, typer.Option(min=64, rich_help_panel=SIZES, help="Tokens of each prompt.")] = 8000,
    steps: Annotated[
        int, typer.Option(min=1, max=1000, rich_help_panel=RUN, help="Steps to time for each load.")
    ] = 200,
    admissions: Annotated[
        int, typer.Option(min=1, max=500, rich_help_panel=RUN, help="Admissions to time where rows are short.")
    ] = 50,
    seed: Annotated[int, typer.Option(min=0, rich_help_panel=RUN, help="Of the prompts.")] = 0,
) -> Outcome:
    """Time the scheduler's steps over a model that costs nothing.

    Every running request decodes. Those that wait lack a row (as many run as may), or pages: then each step looks for
    one that fits. Of every eight prompts in a row the first three quarters are the same.

    Exits with 2 if the command cannot be run.
    """
    if min(parse_numbers("--running", running)) < 1 or min(parse_numbers("--waiting", waiting)) < 0:
        raise BenchError(f"--running must be at least 1 and --waiting at least 0, not {running} and {waiting}")
    loads = [
        Load(runs, waits, prompt_tokens, short)
        for short in Short
        for runs in parse_numbers("--running", running)
        for waits in parse_numbers("--waiting", waiting)
        if waits or short is Short.ROWS
    ]
    with quiet_bar(error_console()) as progress:
        advance = add_steps(progress, "loads", len(loads))
        measured = []
        for load in loads:
            measured.append((load, measure(load, steps=steps, admissions=admissions, seed=seed)))
            advance(1)
    report = reports.build(measured)
    return Outcome(report, partial(reports.print_table, report), partial(reports.write_plot, report))
