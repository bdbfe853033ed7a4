"""What bench/attention.py measured: as a table, as ratios, as JSON, and as a picture (matplotlib, `bench` extra)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from radixkv_bench.attention.contenders import CONTIGUOUS, FLAT, INT8, PLAIN
from radixkv_bench.common import pictures
from radixkv_bench.common.probes import Speeds
from radixkv_bench.common.tables import number_table

COLORS = ("#c8553d", "#588b8b", "#e0a458", "#4f6d9a", "#8a6ba1", "#7a9e4f", "#b5838d", "#3d405b")


@dataclass(frozen=True, slots=True)
class Row:
    """One contender in one case.

    Attributes:
        backend: its name.
        ms: a call, the median of the rounds.
        gb_s: KV that has to be read in that time; what is shared counts once.
        roofline_ms: what the machine would need at its best, by the probes of the same rounds.
        times_plain: how many times as long the plain way took.
    """

    case: str
    backend: str
    dtype: str
    ms: float
    gb_s: float
    roofline_ms: float
    times_plain: float

    @property
    def roofline_fraction(self) -> float:
        return self.roofline_ms / self.ms

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "roofline_fraction": self.roofline_fraction}


@dataclass(frozen=True, slots=True)
class Report:
    """All rows, case by case; `speeds` are medians over all rounds of all cases; `config` tells how and where."""

    rows: list[Row]
    speeds: Speeds
    config: dict[str, Any]

    def by_case(self) -> Iterator[tuple[str, str, list[Row]]]:
        """(case, dtype, its rows)."""
        for (case, dtype), rows in groupby(self.rows, lambda row: (row.case, row.dtype)):
            yield case, dtype, list(rows)

    def ratios(self) -> dict[str, float]:
        """How many times as fast one contender is as another one, where that says something."""
        return {
            f"{case} {dtype}: {name} / {other}": ms[other] / ms[name]
            for case, dtype, rows in self.by_case()
            for ms in [{row.backend: row.ms for row in rows}]
            for name, other in _pairs(ms)
        }

    def as_dict(self) -> dict[str, Any]:
        """All figures by name, for `--json`."""
        return {
            "probe_gb_s": self.speeds.read_gb_s,
            "gemm_gflop_s": self.speeds.gemm_gflop_s,
            "gemm_bf16_gflop_s": self.speeds.gemm_bf16_gflop_s,
            "rows": [row.as_dict() for row in self.rows],
            "ratios": self.ratios(),
            "config": self.config,
        }


def _pairs(ms: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """(contender, the one that it ought to be faster than): our fastest and the plain ways, a cascade and the same
    backend without, and on CUDA our kernels and FlashInfer's.
    """
    ours = [name for name in ms if name not in (PLAIN, CONTIGUOUS, INT8)]
    yield from ((min(ours, key=lambda name: ms[name]), plain) for plain in (PLAIN, CONTIGUOUS) if plain in ms and ours)
    yield from ((name, name + FLAT) for name in ours if name + FLAT in ms)
    yield from ((name, "flashinfer") for name in ("triton", INT8) if name in ms and "flashinfer" in ms)


# -- tables ----------------------------------------------------------------------------------------------------------


def print_tables(report: Report, console: Console) -> None:
    """Every contender, case by case; the ratios; the probes."""
    table = number_table(("case", "backend", "dtype"), ("ms", "GB/s", "% of\nroofline", "times\nplain"))
    for _, _, rows in report.by_case():
        for number, row in enumerate(rows):
            table.add_row(
                row.case if number == 0 else "",
                row.backend,
                row.dtype,
                f"{row.ms:.3f}",
                f"{row.gb_s:,.1f}" if row.gb_s >= 1 else f"{row.gb_s:.3f}",
                f"{100 * row.roofline_fraction:.0f}",
                f"{row.times_plain:.2f}",
                end_section=row is rows[-1],
            )
    console.print(table)
    _print_ratios(report, console)
    speeds = report.speeds
    console.print(
        f"This machine reads {speeds.read_gb_s:,.1f} GB/s and computes {speeds.gemm_gflop_s:,.0f} GFLOP/s in float32, "
        f"{speeds.gemm_bf16_gflop_s:,.0f} in bfloat16. {report.config['roofline']}",
        highlight=False,
    )


def _print_ratios(report: Report, console: Console) -> None:
    console.print("How many times as fast", style="bold")
    table = Table(box=None, padding=(0, 1), pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for about, ratio in report.ratios().items():
        table.add_row(about, f"{ratio:.2f} ×")
    console.print(table)


# -- picture ---------------------------------------------------------------------------------------------------------


def write_plot(report: Report, path: Path) -> None:
    """Draw each contender's share of the roofline, case by case, a panel for each dtype, into the image at `path`.

    Raises: BenchError without matplotlib, and if the place cannot be written.
    """
    dtypes = list(dict.fromkeys(row.dtype for row in report.rows))
    names = list(dict.fromkeys(row.backend for row in report.rows))
    colors = {name: COLORS[index % len(COLORS)] for index, name in enumerate(names)}
    num_cases = len({row.case for row in report.rows})
    figure = pictures.new_figure(max(7.0, 2.0 * num_cases), 0.6 + 3.2 * len(dtypes))
    panels = figure.subplots(len(dtypes), 1, squeeze=False)[:, 0]
    for axes, dtype in zip(panels, dtypes, strict=True):
        _draw(axes, [rows for _, of_dtype, rows in report.by_case() if of_dtype == dtype], colors)
        axes.set_title(f"{dtype}: % of the roofline (more is better), ms on the bars", fontsize=10)
    pictures.save_figure(figure, path)


def _draw(axes: Any, cases: list[list[Row]], colors: dict[str, str]) -> None:
    """A group of bars for each case, and the roofline above them."""
    for place, rows in enumerate(cases):
        width = 0.84 / len(rows)
        for number, row in enumerate(rows):
            x = place + (number - (len(rows) - 1) / 2) * width
            bars = axes.bar(x, 100 * row.roofline_fraction, 0.92 * width, color=colors[row.backend], label=row.backend)
            axes.bar_label(bars, [f"{row.ms:.3g}"], padding=2, fontsize=7)
    axes.axhline(100, color="black", linestyle=":", linewidth=1.2)
    axes.set_xticks(range(len(cases)), [rows[0].case for rows in cases], fontsize=8)
    labels = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))  # each name once
    axes.legend(labels.values(), labels.keys(), fontsize=7.5, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", labelsize=9)
