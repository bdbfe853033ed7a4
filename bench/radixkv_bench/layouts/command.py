"""Five ways to lay KV out in memory, over one workload: what each of them holds, wastes and copies, and what fits.

python bench/layouts.py --help
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from radixkv_bench.common import models
from radixkv_bench.common.command import Outcome, command, error_console
from radixkv_bench.common.options import RUN, ModelName, RandomModelSizes, Rounds, choose_model, size
from radixkv_bench.layouts import report as reports
from radixkv_bench.layouts.runs import Job, Measured, Settings, differences
from radixkv_bench.layouts.traffic import Sizes

SIZE_DEFAULTS, DEFAULTS = Sizes(), Settings()


@command("layouts")
def main(
    sessions: Annotated[int, size("Sessions that come and go.", least=1)] = SIZE_DEFAULTS.sessions,
    turns: Annotated[int, size("Turns of each session.", least=1)] = SIZE_DEFAULTS.turns,
    system_tokens: Annotated[int, size("Tokens that all sessions begin with.", least=0)] = SIZE_DEFAULTS.system_tokens,
    turn_tokens: Annotated[
        int,
        size("Tokens asked a turn: the mean of lengths with a long tail.", least=1),
    ] = SIZE_DEFAULTS.turn_tokens,
    output_tokens: Annotated[
        int, size("Tokens answered a turn: likewise the mean.", least=1)
    ] = SIZE_DEFAULTS.output_tokens,
    running: Annotated[int, size("Requests served at one time.", least=1)] = SIZE_DEFAULTS.running,
    seed: Annotated[int, size("Of the lengths.", least=0)] = SIZE_DEFAULTS.seed,
    model: ModelName = None,
    random_model: RandomModelSizes = None,
    rounds: Rounds = DEFAULTS.rounds,
    page_size: Annotated[
        int, typer.Option(min=1, rich_help_panel=RUN, help="paged, radix: tokens a page.")
    ] = DEFAULTS.page_size,
    chunk_tokens: Annotated[
        int, typer.Option(min=1, rich_help_panel=RUN, help="chunked: tokens by which a cache grows.")
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
) -> Outcome:
    """Serve the same sessions with their KV contiguous (transformers' DynamicCache), preallocated (StaticCache),
    in chunks (radixkv's ChunkedCache), in pages, and in pages shared through a radix tree; compare their bytes.

    docs/layouts.md says what the figures mean.

    Exits with 1 if tokens differ, with 2 if the command cannot be run.
    """
    models.quiet_transformers()
    source = choose_model(model, random_model)
    sizes = Sizes(sessions, turns, system_tokens, turn_tokens, output_tokens, running, seed)
    settings = Settings(rounds, page_size, chunk_tokens, static_tokens, memory_mb)
    job = Job(sizes, settings, source)
    measured = job.run(error_console())
    report = reports.build(job, measured)
    return Outcome(
        report, partial(reports.print_table, report), partial(reports.write_plot, report), _differences(measured)
    )


def _differences(measured: dict[str, Measured]) -> list[str]:
    """One line for each layout that answers otherwise than the first."""
    return [
        f"tokens differ: at token {position} of turn {request.turn} of session {request.session}, {other} answers "
        f"otherwise than {name}"
        for name, other, request, position in differences(measured)
    ]
