"""What bench/decode_step.py measured: as a table, as JSON, and as a picture (matplotlib, from the `bench` extra)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from radixkv_bench.common import pictures
from radixkv_bench.common.tables import number_table
from radixkv_bench.decode.runs import HF, OURS, BatchTimes

DECODE_TARGETS: Mapping[int, float] = {1: 1.5, 8: 1.2}  # times Hugging Face's speed, by batch size, on the CPU
PREFILL_TARGET = 1.0
STEP_TARGET = 1.25  # times the floor, on CUDA
COLORS = {OURS: "#c8553d", HF: "#588b8b", "floor": "#3d405b"}


@dataclass(frozen=True, slots=True)
class Row:
    """One batch size. Ratios are medians of those within each round.

    Attributes:
        step_ms: a decode step of radixkv; hf_step_ms: one of Hugging Face's generate.
        floor_ms: the time to read the weights and the batch's KV once, by the probe of the same rounds.
        decode_ratio, prefill_ratio: how many times as fast as Hugging Face.
    """

    batch: int
    step_ms: float
    hf_step_ms: float
    floor_ms: float
    decode_tok_s: float
    hf_decode_tok_s: float
    decode_ratio: float
    prefill_tok_s: float
    hf_prefill_tok_s: float
    prefill_ratio: float

    @property
    def step_over_floor(self) -> float:
        return self.step_ms / self.floor_ms

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "step_over_floor": self.step_over_floor}


def row(times: BatchTimes, *, prompt_tokens: int, output_tokens: int, weight_bytes: int, kv_token_bytes: int) -> Row:
    """The figures of a batch size. In the middle of the decode a sequence has half of its output behind it."""
    steps, batch = output_tokens - 1, times.batch
    ours, theirs = times.timings[OURS], times.timings[HF]
    decode_s, hf_decode_s = (median(t.decode_s for t in timings) for timings in (ours, theirs))
    prefill_s, hf_prefill_s = (median(t.prefill_s for t in timings) for timings in (ours, theirs))
    read_bytes = weight_bytes + round(batch * (prompt_tokens + output_tokens / 2) * kv_token_bytes)
    return Row(
        batch=batch,
        step_ms=1000 * decode_s / steps,
        hf_step_ms=1000 * hf_decode_s / steps,
        floor_ms=read_bytes / median(times.read_gb_s) / 1e6,
        decode_tok_s=batch * steps / decode_s,
        hf_decode_tok_s=batch * steps / hf_decode_s,
        decode_ratio=median(hf.decode_s / own.decode_s for own, hf in zip(ours, theirs, strict=True)),
        prefill_tok_s=batch * prompt_tokens / prefill_s,
        hf_prefill_tok_s=batch * prompt_tokens / hf_prefill_s,
        prefill_ratio=median(hf.prefill_s / own.prefill_s for own, hf in zip(ours, theirs, strict=True)),
    )


@dataclass(frozen=True, slots=True)
class Report:
    """All batch sizes; `config` tells how and where."""

    rows: list[Row]
    probe_gb_s: float
    config: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """All figures by name, for `--json`."""
        return {"probe_gb_s": self.probe_gb_s, "rows": [row.as_dict() for row in self.rows], "config": self.config}


def print_table(report: Report, console: Console) -> None:
    """A batch size a row; beside each ratio that has a target whether it was met."""
    console.print(report.config["title"], style="bold", highlight=False, soft_wrap=True)
    headings = ("batch", "step\nms", "floor\nms", "step /\nfloor", "decode\ntok/s", "HF", "ratio")
    table = number_table((), (*headings, "prefill\ntok/s", "HF", "ratio"))
    on_cpu = report.config["device"] == "cpu"
    for row in report.rows:
        table.add_row(
            f"{row.batch}",
            f"{row.step_ms:.1f}",
            f"{row.floor_ms:.1f}",
            _against(row.step_over_floor, None if on_cpu else STEP_TARGET, at_most=True),
            f"{row.decode_tok_s:,.1f}",
            f"{row.hf_decode_tok_s:,.1f}",
            _against(row.decode_ratio, DECODE_TARGETS.get(row.batch) if on_cpu else None),
            f"{row.prefill_tok_s:,.0f}",
            f"{row.hf_prefill_tok_s:,.0f}",
            _against(row.prefill_ratio, PREFILL_TARGET if on_cpu else None),
        )
    console.print(table)
    console.print(
        f"The floor: weights and KV read once, at {report.probe_gb_s:,.1f} GB/s. Ratios: times as fast as Hugging "
        "Face's generate. Green: target met.",
        highlight=False,
    )


def _against(value: float, target: float | None, *, at_most: bool = False) -> str:
    if target is None:
        return f"{value:.2f}"
    met = value <= target if at_most else value >= target
    return f"[{'green' if met else 'red'}]{value:.2f}[/] {'≤' if at_most else '≥'} {target:g}"


# -- picture ---------------------------------------------------------------------------------------------------------


def write_plot(report: Report, path: Path) -> None:
    """Draw step times with their floors, and prefill speeds, side by side, into the image at `path`.

    Raises: BenchError without matplotlib, and if the place cannot be written.
    """
    figure = pictures.new_figure(10, 3.6)
    steps, prefill = figure.subplots(1, 2)
    rows = report.rows
    _draw_bars(steps, rows, {OURS: [row.step_ms for row in rows], HF: [row.hf_step_ms for row in rows]})
    for place, row in enumerate(rows):
        steps.hlines(row.floor_ms, place - 0.45, place + 0.45, color=COLORS["floor"], label="floor", linestyle=":")
    steps.set_title("decode step, ms (less is better)", fontsize=10)
    steps.legend(*_once(steps), fontsize=8, frameon=False)
    _draw_bars(prefill, rows, {OURS: [row.prefill_tok_s for row in rows], HF: [row.hf_prefill_tok_s for row in rows]})
    prefill.set_title("prefill, tokens per second (more is better)", fontsize=10)
    figure.suptitle(report.config["title"], fontsize=10)
    pictures.save_figure(figure, path)


def _draw_bars(axes: Any, rows: list[Row], series: dict[str, list[float]]) -> None:
    for number, (name, values) in enumerate(series.items()):
        places = [place + 0.4 * (number - 0.5) for place in range(len(rows))]
        axes.bar_label(axes.bar(places, values, 0.38, color=COLORS[name], label=name), fmt="{:,.0f}", fontsize=8)
    axes.set_xticks(range(len(rows)), [f"batch {row.batch}" for row in rows])
    pictures.tidy(axes)


def _once(axes: Any) -> tuple[list[Any], list[str]]:
    """Handles and labels of the legend, each name once."""
    by_label = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    return list(by_label.values()), list(by_label)
