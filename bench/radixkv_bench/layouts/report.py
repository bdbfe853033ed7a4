"""What bench/layouts.py measured: as a table, as JSON, and as a picture (matplotlib, from the `bench` extra)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from radixkv_bench.common import pictures
from radixkv_bench.common.machine import environment
from radixkv_bench.common.tables import number_table
from radixkv_bench.layouts.memory import Snapshot
from radixkv_bench.layouts.runs import MEGABYTE, Job, Measured, differences, output_tokens_per_s
from radixkv_bench.shared_prompt.report import Report

HEADINGS = (
    "peak\nMB",
    "inter-\nnal MB",
    "exter-\nnal MB",
    "wasted\n%",
    "re-\npeated",
    "kept\nMB",
    "copied\nMB",
    "fit in\n{memory} MB",
    "output\ntok/s",
)
KINDS: Mapping[str, tuple[str, str]] = {
    "needed": ("needed by running requests", "#588b8b"),
    "repeated": ("the same again", "#9dbebb"),
    "internal": ("internal fragmentation", "#c8553d"),
    "external": ("external fragmentation", "#e0a458"),
    "kept": ("kept for later requests", "#e3e3e3"),
}


def build(job: Job, measured: Mapping[str, Measured]) -> Report:
    """The JSON-ready report."""
    sizes, settings = job.traffic.sizes, job.settings
    return {
        "layouts": {name: _layout(job, one) for name, one in measured.items()},
        "tokens_equal": not list(differences(dict(measured))),
        "config": {
            **vars(sizes),
            **vars(settings),
            "static_tokens": job.static_tokens,
            "pool_tokens": job.pool_tokens,
            "kv_bytes_per_token": job.token_bytes,
            "requests": len(job.traffic.asked),
            "longest_tokens": job.traffic.longest_tokens,
            **environment(),
        },
    }


def _layout(job: Job, one: Measured) -> Report:
    mean = one.memory.mean()
    wasted = mean["internal"] + mean["external"]
    return {
        "peak_bytes": one.memory.peak_bytes,
        "footprint_bytes": one.memory.footprint_bytes,
        "mean_bytes": mean,
        "wasted_share": wasted / (wasted + mean["needed"] + mean["repeated"]),
        "copied_bytes": one.memory.copied_bytes,
        "fit": one.fit,
        "output_tokens_per_s": output_tokens_per_s(one, job.traffic),
        "total_s": median(one.total_s),
        "total_s_by_round": one.total_s,
        "steps": len(one.memory.steps),
    }


def print_table(report: Report, console: Console) -> None:
    """A layout a row."""
    config = report["config"]
    console.print(
        f"{config['requests']} requests of {config['sessions']} sessions, {config['running']} at a time, up to "
        f"{config['longest_tokens']:,} tokens; a token takes {config['kv_bytes_per_token']:,} bytes",
        style="bold",
        highlight=False,
        soft_wrap=True,
    )
    headings = (heading.format(memory=f"{config['memory_mb']:g}") for heading in HEADINGS)
    table = number_table(("",), headings, name_style="bold")
    for name, one in report["layouts"].items():
        mean = one["mean_bytes"]
        table.add_row(
            name,
            _mb(one["peak_bytes"]),
            _mb(mean["internal"]),
            _mb(mean["external"]),
            f"{one['wasted_share']:.1%}",
            _mb(mean["repeated"]),
            _mb(mean["kept"]),
            _mb(one["copied_bytes"]),
            f"{one['fit']}",
            f"{one['output_tokens_per_s']:.0f}",
        )
    console.print(table)
    console.print(
        "Peak and copied over the whole run; internal, external, repeated and kept on average over its steps.",
        soft_wrap=True,
    )
    if report["tokens_equal"]:
        console.print("Greedy float32 tokens agree between all of them.", style="green", highlight=False)


def _mb(num_bytes: float) -> str:
    return f"{num_bytes / MEGABYTE:,.2f}"


# -- picture ---------------------------------------------------------------------------------------------------------


def write_plot(report: Report, path: Path) -> None:
    """Draw where the bytes go, how many requests fit, and tokens a second, side by side, into the image at `path`.

    Raises: BenchError without matplotlib, and if the place cannot be written.
    """
    figure = pictures.new_figure(13, 3.6)
    bytes_axes, fit_axes, speed_axes = figure.subplots(1, 3, width_ratios=(1.8, 1, 1))
    _draw_bytes(bytes_axes, report)
    layouts = report["layouts"]
    fits = {name: one["fit"] for name, one in layouts.items()}
    _draw_bars(fit_axes, fits, f"requests that fit in {report['config']['memory_mb']:g} MB (more is better)")
    speeds = {name: round(one["output_tokens_per_s"]) for name, one in layouts.items()}
    _draw_bars(speed_axes, speeds, "output tokens per second (more is better)")
    pictures.save_figure(figure, path)


def _draw_bytes(axes: Any, report: Report) -> None:
    """Bars of what the bytes are for, on average over the steps, with the peak as a stroke."""
    layouts = report["layouts"]
    left = [0.0] * len(layouts)
    for kind in Snapshot._fields:
        label, color = KINDS[kind]
        widths = [one["mean_bytes"][kind] / MEGABYTE for one in layouts.values()]
        axes.barh(list(layouts), widths, left=left, label=label, color=color)
        left = [before + width for before, width in zip(left, widths, strict=True)]
    peaks = [one["peak_bytes"] / MEGABYTE for one in layouts.values()]
    axes.plot(peaks, list(layouts), "|", markersize=12, color="black", label="peak of running requests")
    axes.invert_yaxis()
    axes.legend(fontsize=7.5, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3)
    axes.set_title("MB, on average over the steps (less is better)", fontsize=10)
    pictures.tidy(axes, x_ticks=6)


def _draw_bars(axes: Any, values: Mapping[str, float], title: str) -> None:
    bars = axes.barh(list(values), list(values.values()), color="#4f6d9a")
    axes.bar_label(bars, [f"{value:,}" for value in values.values()], padding=3, fontsize=9)
    axes.set_xlim(right=1.2 * max(values.values()))
    axes.invert_yaxis()
    axes.set_yticks([])
    axes.set_title(title, fontsize=10)
    pictures.tidy(axes, x_ticks=6)
