"""Tiers below the pool: what a store on disk reads and writes, against one file of the same bytes.

python bench/tiers.py --help
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from radixkv_bench.common.command import Outcome, command
from radixkv_bench.common.errors import BenchError
from radixkv_bench.common.machine import environment
from radixkv_bench.common.options import RUN, SIZES
from radixkv_bench.tiers import store

CASES = ("store",)


@command("tiers", plots=False)
def main(
    cases: Annotated[
        str, typer.Option(rich_help_panel=RUN, help=f"What to measure, comma-separated: {', '.join(CASES)}.")
    ] = ",".join(CASES),
    folder: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=RUN, help="store: where to write; a temporary folder by default.", file_okay=False
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, rich_help_panel=RUN, help="store: all figures are medians.")] = 5,
    page_kib: Annotated[
        str, typer.Option(rich_help_panel=SIZES, help="store: KiB of a page, several comma-separated.")
    ] = "192,2048",
    total_mib: Annotated[int, typer.Option(min=1, rich_help_panel=SIZES, help="store: MiB of all pages.")] = 512,
    batch_mib: Annotated[
        int, typer.Option(min=1, rich_help_panel=SIZES, help="store: MiB that are read or written at once.")
    ] = 4,
) -> Outcome:
    """Measure tiers below the pool, each against doing without.

    store: pages written to a store on disk and read from it, against the same bytes in one file, in order; warm (in the
    system's page cache) and cold (dropped from it). Sides alternate; the ratio is that of each round.
    """
    chosen = [case.strip() for case in cases.split(",")]
    unknown = [case for case in chosen if case not in CASES]
    if unknown:
        raise BenchError(f"--cases must be of {', '.join(CASES)}, not {', '.join(unknown)}")
    figures: dict[str, Any] = {"machine": environment()}
    sizes = [_kib(text) for text in page_kib.split(",")]
    figures["store"] = [store.measure(folder, size, total_mib << 20, batch_mib << 20, rounds) for size in sizes]
    return Outcome(figures, lambda console: store.show(console, figures["store"]))


def _kib(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise BenchError(f"--page-kib must be whole numbers of at least 1, not {text.strip()!r}")
    return int(text) << 10
