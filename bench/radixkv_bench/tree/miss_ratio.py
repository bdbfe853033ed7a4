"""How well the hit rates of caches of other sizes are estimated from live traffic, against replays of each size.

python bench/miss_ratio.py --help
"""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from radixkv import replay_trace
from radixkv.cache.insight.miss_ratio import MissRatioCurve
from radixkv.cache.insight.prefix_hash import namespace_seed
from radixkv.replay.traces import Request
from radixkv_bench.common.command import Outcome, command, error_console
from radixkv_bench.common.errors import BenchError
from radixkv_bench.tree.memory import read_prompts

LIMIT_POINTS = 2.0


class Row(NamedTuple):
    """What an LRU cache of one size hits, and what the estimate said. Both are shares of the prompts' tokens."""

    capacity_tokens: int
    replayed: float
    estimated: float

    @property
    def error_points(self) -> float:
        """How far the estimate is off, in percentage points."""
        return 100 * abs(self.estimated - self.replayed)


@command("miss_ratio", plots=False)
def main(
    trace: Annotated[Path, typer.Argument(metavar="TRACE.jsonl", help="Requests with hash_ids or token ids.")],
    capacity_tokens: Annotated[
        str, typer.Option(help="Sizes of the cache in tokens, parted by commas.")
    ] = "500000,1000000,2000000,4000000,8000000",
    page_size: Annotated[int, typer.Option(min=1, help="Tokens a page of the replayed caches.")] = 16,
    limit: Annotated[int | None, typer.Option(min=1, help="Requests to read at most.", show_default="all")] = None,
) -> Outcome:
    """Feed the prompts of a trace to the estimate that `stats().estimated_hit_rates` shows, once for all sizes, and
    replay them through an LRU tree of each size; compare.
    """
    capacities = _sizes(capacity_tokens)
    prompts = read_prompts(trace, limit if limit is not None else sys.maxsize)
    curve = MissRatioCurve(max(capacities))
    seed = namespace_seed(None, None)
    start = time.perf_counter()
    for prompt in prompts:
        curve.record(prompt, seed)
    us_per_request = (time.perf_counter() - start) / len(prompts) * 1e6
    requests = [Request.of_tokens(prompt, [0]) for prompt in prompts]
    hidden = not sys.stderr.isatty()
    rows = [
        Row(size, replay_trace(requests, "lru", size, page_size).hit_rate, curve.hit_rate(size))
        for size in track(capacities, "replays", console=error_console(), transient=True, disable=hidden)
    ]
    figures = [{**row._asdict(), "error_points": row.error_points} for row in rows]
    return Outcome({"us_per_request": us_per_request, "rows": figures}, partial(_print, rows, us_per_request))


def _sizes(text: str) -> list[int]:
    sizes = [int(size) if size.strip().isdecimal() else 0 for size in text.split(",")]
    if min(sizes) < 1:
        raise BenchError(f"--capacity-tokens must be numbers of tokens parted by commas, not {text!r}")
    return sizes


def _print(rows: list[Row], us_per_request: float, console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("capacity", "replayed", "estimated", "error, points"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            f"{row.capacity_tokens:,}", f"{row.replayed:.2%}", f"{row.estimated:.2%}", f"{row.error_points:.2f}"
        )
    console.print(table)
    worst = max(row.error_points for row in rows)
    console.print(
        f"Largest error {worst:.2f} points; target ≤ {LIMIT_POINTS:g}: {'met' if worst <= LIMIT_POINTS else 'missed'}. "
        f"The estimate took {us_per_request:.0f} µs a request."
    )
