"""What bench/scheduler.py measured: as tables, as JSON, and as a picture (matplotlib, from the `bench` extra)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from radixkv_bench.common import pictures
from radixkv_bench.common.machine import environment
from radixkv_bench.common.tables import number_table
from radixkv_bench.scheduler.load import Costs, Load, Short

Report = dict[str, Any]


def build(measured: Sequence[tuple[Load, Costs]]) -> Report:
    """The JSON-ready report."""
    return {"loads": [_cell(load, costs) for load, costs in measured], "config": environment()}


def _cell(load: Load, costs: Costs) -> dict[str, Any]:
    return {
        "running": load.running,
        "waiting": load.waiting,
        "prompt_tokens": load.prompt_tokens,
        "short_of": load.short.value,
        "step_us": _spread(costs.steps),
        "admission_us": _spread(costs.admissions),
        "share_us": _spread(costs.shares),
        "match_us": _spread(costs.matches),
    }


def _spread(times: Sequence[float]) -> dict[str, float] | None:
    if not times:
        return None
    return {"median": float(np.median(times)), "p99": float(np.percentile(times, 99)), "max": max(times)}


def print_table(report: Report, console: Console) -> None:
    """A load a row."""
    loads = report["loads"]
    console.print(
        f"prompts of {loads[0]['prompt_tokens']:,} tokens; processor time in µs, without garbage collection",
        style="bold",
        highlight=False,
    )
    headings = ("running", "waiting", "step\nmedian", "step\np99", "admission\nmedian", "of that\nmatch", "sharing")
    table = number_table(("short of",), headings)
    for cell in loads:
        step = cell["step_us"]
        of_admissions = [cell[name] for name in ("admission_us", "match_us", "share_us")]
        table.add_row(
            cell["short_of"],
            f"{cell['running']:,}",
            f"{cell['waiting']:,}",
            f"{step['median']:,.0f}",
            f"{step['p99']:,.0f}",
            *(f"{spread['median']:,.0f}" if spread else "-" for spread in of_admissions),
        )
    console.print(table)


def write_plot(report: Report, path: Path) -> None:
    """Time of a step against what waits; a line for each number of running requests and each shortage."""
    loads = report["loads"]
    figure = pictures.new_figure(7, 4.5)
    axes = figure.add_subplot()
    for short, style in ((Short.ROWS, "-"), (Short.PAGES, "--")):
        for running in sorted({cell["running"] for cell in loads}):
            cells = [c for c in loads if (c["running"], c["short_of"]) == (running, short.value)]
            points = [(cell["waiting"], cell["step_us"]["median"]) for cell in cells]
            if points:
                axes.plot(*zip(*points, strict=True), style, marker="o", label=f"{running} run, short of {short}")
    axes.set_xscale("symlog", linthresh=10)
    axes.set(xlabel="waiting requests", ylabel="µs a step", title="What choosing a step's tokens costs")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=9)
    pictures.tidy(axes)
    pictures.save_figure(figure, path)
