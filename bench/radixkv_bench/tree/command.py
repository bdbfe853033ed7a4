"""What the radix tree costs: each operation as the tree grows, matches against memcpy, metadata, a trace.

python bench/radix_tree.py --help
"""

from __future__ import annotations

import gc
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer
from rich.console import Console
from rich.progress import Progress

from radixkv_bench.common.command import Outcome, command, error_console
from radixkv_bench.common.errors import BenchError
from radixkv_bench.common.files import parse_numbers
from radixkv_bench.common.progress import add_steps, quiet_bar
from radixkv_bench.tree import growth as tree_growth
from radixkv_bench.tree import memory as tree_memory
from radixkv_bench.tree import report as reports
from radixkv_bench.tree.growth import BYTES_A_LEAF, LEAF_TOKENS, LEAVES_A_TENANT, SHAPES
from radixkv_bench.tree.memory import Metadata, Replay
from radixkv_bench.tree.report import Report
from radixkv_bench.tree.tail import Pause, Tail, measure_tails

BUSY = 0.5  # load for each core, above which absolute times mean little
METADATA_PAGE_SIZES = tuple(reports.BYTES_LIMITS)
REPLAY_PAGE_SIZES = (1, 16, 64)
REPLAY_ROUNDS = 5  # at most: a replay is long enough to be steady

SIZES = "How much is measured"
REQUESTS = "Requests"

Count = int | None


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    leaves: tuple[int, ...]
    rounds: int
    path_tokens: tuple[int, ...]
    probes: int
    requests: int
    capacity: int
    tail_calls: int


FULL = Sizes(
    (1_000, 10_000, 100_000, 1_000_000), 51, (2**13, 2**14, 2**15, 2**16, 2**17), 20_000, 2_000, 1_000_000, 100_000
)
QUICK = Sizes((100, 1_000), 3, (2**13, 2**14), 500, 100, 200_000, 200)


PageSize = Annotated[int, typer.Option(min=1, help="Tokens a page, but for metadata and replay, which try several.")]
Leaves = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=SIZES,
        help="Sizes of the trees, comma-separated.",
        show_default=",".join(map(str, FULL.leaves)),
    ),
]
Repeats = Annotated[
    Count,
    typer.Option(
        min=1,
        rich_help_panel=SIZES,
        help="Times everything is run, interleaved; the medians count.",
        show_default=str(FULL.rounds),
    ),
]
Probes = Annotated[
    Count,
    typer.Option(
        min=1,
        rich_help_panel=SIZES,
        help="Prefixes that a tree sees before it is compared with one that saw none.",
        show_default=str(FULL.probes),
    ),
]
TraceFile = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=REQUESTS,
        metavar="TRACE.jsonl",
        help="A trace with hash_ids (Mooncake's format; each block becomes pseudo-random tokens) or token_ids.",
        show_default="random prompts, no replay",
    ),
]
TraceRequests = Annotated[
    Count,
    typer.Option(min=1, rich_help_panel=REQUESTS, help="Lines of the trace to read.", show_default=str(FULL.requests)),
]
Capacity = Annotated[
    Count,
    typer.Option(
        min=max(METADATA_PAGE_SIZES),
        rich_help_panel=REQUESTS,
        help="Tokens that a tree may hold, for metadata and replay.",
        show_default=str(FULL.capacity),
    ),
]


@command("radix_tree")
def main(
    quick: Annotated[bool, typer.Option("--quick", help="Seconds instead of minutes: smaller in every way.")] = False,
    tails_only: Annotated[
        bool, typer.Option("--tails-only", help="Nothing but the slowest calls of a mixed load; draws no picture.")
    ] = False,
    page_size: PageSize = 16,
    leaves: Leaves = None,
    rounds: Repeats = None,
    probes: Probes = None,
    trace: TraceFile = None,
    requests: TraceRequests = None,
    capacity: Capacity = None,
) -> Outcome:
    """Measure the radix tree: match, insert, evict and lock, and how each grows from a small tree to a large one; a
    match of a long path against a copy of its tokens; what probes leave behind; bytes of metadata for each cached
    token; and with a trace, where a request's time goes.

    Tokens are random, the same in every run. A missed target is told, and is no error.

    \b
    --quick
    --trace conversation_trace.jsonl --json tree.json --plot tree.png

    Exits with 2 if the command cannot be run.
    """
    given = {"rounds": rounds, "probes": probes, "requests": requests, "capacity": capacity}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if leaves is not None:
        changes["leaves"] = _parse_leaves(leaves)
    sizes = replace(QUICK if quick else FULL, **changes)
    _check(sizes, page_size)
    errors = error_console()
    load = psutil.getloadavg()[0]
    _warn_if_busy(load, errors)
    measure = _measure_tails if tails_only else _measure
    report = measure(sizes, page_size, trace, load, errors)
    plot = None if tails_only else partial(reports.write_plot, report)
    return Outcome(report.as_dict(), partial(reports.print_tables, report), plot)


def _parse_leaves(text: str) -> tuple[int, ...]:
    sizes = parse_numbers("--leaves", text)
    if len(sizes) < 2 or sizes[0] < LEAVES_A_TENANT:
        raise BenchError(f"--leaves must be two sizes or more, of at least {LEAVES_A_TENANT}, not {text!r}")
    return sizes


def _check(sizes: Sizes, page_size: int) -> None:
    """Find out before the run, not after it, that it cannot be done."""
    if LEAF_TOKENS // 2 % page_size:
        raise BenchError(f"--page-size must divide {LEAF_TOKENS // 2}, for leaves are cut there, not {page_size}")
    needed, free = BYTES_A_LEAF * sum(sizes.leaves) * len(SHAPES), psutil.virtual_memory().available
    if needed > free:
        raise BenchError(
            f"trees of {', '.join(f'{size:,}' for size in sizes.leaves)} leaves need about {needed / 1e9:.1f} GB of "
            f"memory, and {free / 1e9:.1f} GB are free; give smaller --leaves"
        )


def _warn_if_busy(load: float, errors: Console) -> None:
    cores = psutil.cpu_count() or 1
    if load > BUSY * cores:
        errors.print(
            f"warning: the load average is {load:.2f} on {cores} cores; absolute times mean little, ratios are noisy",
            style="yellow",
            highlight=False,
        )


def _measure(sizes: Sizes, page_size: int, trace: Path | None, load: float, errors: Console) -> Report:
    """Run everything, the part that takes most memory last."""
    with quiet_bar(errors) as progress, _collector_off():
        on_step = add_steps(progress, "paths and copies", sizes.rounds)
        memcpy = tree_memory.race_copies(sizes.path_tokens, page_size, sizes.rounds, on_step)
        on_step = add_steps(progress, "probes", sizes.rounds)
        probed = tree_growth.probe(sizes.probes, page_size, sizes.rounds, on_step)
        metadata, replays = _run_requests(sizes, trace, progress)
        on_built = add_steps(progress, "building trees", sum(sizes.leaves) * len(SHAPES))
        on_step = add_steps(progress, "growth", tree_growth.num_rounds(sizes.rounds))
        growth = tree_growth.grow(sizes.leaves, page_size, sizes.rounds, on_built, on_step)
        tails, pauses = _run_tails(sizes, page_size, progress)
    config = _config(sizes, page_size, trace, load)
    return Report(growth, memcpy, probed, metadata, replays, config, tails, pauses)


def _measure_tails(sizes: Sizes, page_size: int, trace: Path | None, load: float, errors: Console) -> Report:
    """Run the tails alone."""
    with quiet_bar(errors) as progress, _collector_off():
        tails, pauses = _run_tails(sizes, page_size, progress)
    return Report([], [], [], [], [], _config(sizes, page_size, trace, load), tails, pauses)


def _run_tails(sizes: Sizes, page_size: int, progress: Progress) -> tuple[list[Tail], list[Pause]]:
    on_built = add_steps(progress, "building trees for tails", sum(sizes.leaves))
    on_step = add_steps(progress, "tails", sizes.tail_calls * len(sizes.leaves))
    return measure_tails(sizes.leaves, page_size, sizes.tail_calls, on_built, on_step)


def _run_requests(sizes: Sizes, trace: Path | None, progress: Progress) -> tuple[list[Metadata], list[Replay]]:
    """Metadata, and the replay if there is a trace."""
    if trace is None:
        prompts = tree_memory.synthetic_prompts(2 * sizes.capacity)
    else:
        prompts = tree_memory.read_prompts(trace, sizes.requests)
    on_step = add_steps(progress, "metadata", tree_memory.num_replays(METADATA_PAGE_SIZES))
    metadata = tree_memory.measure_metadata(prompts, sizes.capacity, METADATA_PAGE_SIZES, on_step)
    if trace is None:
        return metadata, []
    rounds = min(sizes.rounds, REPLAY_ROUNDS)
    on_step = add_steps(progress, "replay", rounds * len(REPLAY_PAGE_SIZES))
    return metadata, tree_memory.replay(prompts, sizes.capacity, REPLAY_PAGE_SIZES, rounds, on_step)


@contextmanager
def _collector_off() -> Iterator[None]:
    """As `timeit` does: what the collector looks at is all of the process, not what is measured."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _config(sizes: Sizes, page_size: int, trace: Path | None, load: float) -> dict[str, Any]:
    """How it was run, and the machine and the versions that the figures belong to."""
    return {
        **asdict(sizes),
        "page_size": page_size,
        "trace": None if trace is None else trace.name,
        "clock": tree_growth.CLOCK_NAME,
        "load_average": load,
        "platform": platform.platform(),
        "cpus": psutil.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
