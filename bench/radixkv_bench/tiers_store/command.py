"""What a store on disk reads and writes, against one file of the same bytes.

python bench/tiers_store.py --help
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from radixkv_bench.common.command import Outcome, command
from radixkv_bench.common.errors import BenchError
from radixkv_bench.common.machine import environment
from radixkv_bench.common.options import RUN, SIZES
from radixkv_bench.tiers_store import store


@command("tiers_store", plots=False)
def main(
    folder: Annotated[
        Path | None,
        typer.Option(rich_help_panel=RUN, help="Where to write; a temporary folder by default.", file_okay=False),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, rich_help_panel=RUN, help="All figures are medians.")] = 5,
    page_kib: Annotated[
        str, typer.Option(rich_help_panel=SIZES, help="KiB of a page, several comma-separated.")
    ] = "192,2048",
    total_mib: Annotated[int, typer.Option(min=1, rich_help_panel=SIZES, help="MiB of all pages.")] = 512,
    batch_mib: Annotated[
        int, typer.Option(min=1, rich_help_panel=SIZES, help="MiB that are read or written at once.")
    ] = 4,
) -> Outcome:
    """Write pages to a store on disk and read them, against the same bytes in one file, in order.

    Warm pages are in the system's page cache, cold ones were dropped from it. Both sides take turns, batch by batch, so
    that what else the machine does slows both alike.
    """
    figures: dict[str, Any] = {"machine": environment()}
    sizes = [_kib(text) for text in page_kib.split(",")]
    figures["store"] = [store.measure(folder, size, total_mib << 20, batch_mib << 20, rounds) for size in sizes]
    return Outcome(figures, lambda console: store.show(console, figures["store"]))


def _kib(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise BenchError(f"--page-kib must be whole numbers of at least 1, not {text.strip()!r}")
    return int(text) << 10
