"""The report as a picture (matplotlib, from the `bench` extra)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from radixkv_bench.common import pictures
from radixkv_bench.shared_prompt.report import Report

COLORS = {
    "radixkv": "#c8553d",
    "radixkv-nocache": "#e3a592",
    "hf-generate": "#588b8b",
    "hf-generate-batch": "#9dbebb",
}


def write_plot(report: Report, path: Path) -> None:
    """Draw throughput, tokens computed or reused, and time to first token, side by side, into the image at `path`.

    Raises: BenchError without matplotlib, and if the place cannot be written.
    """
    figure = pictures.new_figure(13, 3.4)
    throughput, tokens, ttft = figure.subplots(1, 3, width_ratios=(1.2, 1, 1))
    _draw_throughput(throughput, report)
    _draw_ttft(ttft, report)
    _draw_tokens(tokens, report)
    figure.suptitle(report["config"]["title"], fontsize=11)
    pictures.save_figure(figure, path)


def _draw_throughput(axes: Any, report: Report) -> None:
    """Bars of output tokens a second, labelled with the speedup of radixkv over each."""
    runs = report["runs"]
    bars = axes.barh(list(runs), [run["output_tokens_per_s"] for run in runs.values()], color=_colors(runs))
    labels = [f"{run['output_tokens_per_s']:.0f}" for run in runs.values()]
    for index, name in enumerate(runs):
        if name in report["speedup"]:
            labels[index] += f"   radixkv: {report['speedup'][name]:.1f} ×"
    axes.bar_label(bars, labels, padding=3, fontsize=9)
    axes.set_xlim(right=1.4 * max(run["output_tokens_per_s"] for run in runs.values()))
    axes.invert_yaxis()
    axes.set_title("output tokens per second (more is better)", fontsize=10)
    pictures.tidy(axes, x_ticks=6)


def _draw_ttft(axes: Any, report: Report) -> None:
    """Time to first token: by turn where there are turns, else the median with the 95th percentile as a whisker."""
    runs = report["runs"]
    if len(next(iter(runs.values()))["ttft_p50_s_by_turn"]) > 1:
        turns = range(1, len(next(iter(runs.values()))["ttft_p50_s_by_turn"]) + 1)
        for name, run in runs.items():
            axes.plot(turns, run["ttft_p50_s_by_turn"], marker="o", color=COLORS[name], label=name)
        axes.set_xticks(turns)
        axes.set_xlabel("turn")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8, frameon=False)
        axes.set_title("median time to first token, s (less is better)", fontsize=10)
    else:
        p50 = [run["ttft_p50_s"] for run in runs.values()]
        p95 = [run["ttft_p95_s"] for run in runs.values()]
        axes.barh(list(runs), p95, color=_colors(runs), alpha=0.4)
        axes.barh(list(runs), p50, color=_colors(runs))
        axes.invert_yaxis()
        axes.set_yticks([])
        axes.set_title("time to first token, s: p50, pale p95 (less is better)", fontsize=10)
    pictures.tidy(axes, x_ticks=6)


def _draw_tokens(axes: Any, report: Report) -> None:
    """Tokens that went through the model, and those that did not have to."""
    runs = report["runs"]
    computed = [run["computed_tokens"] for run in runs.values()]
    axes.barh(list(runs), computed, color=_colors(runs), label="computed")
    reused = [run["cached_tokens"] for run in runs.values()]
    axes.barh(list(runs), reused, left=computed, color="white", edgecolor=_colors(runs), hatch="///", label="reused")
    axes.invert_yaxis()
    axes.set_yticks([])
    axes.set_title("tokens computed (filled) and reused (hatched)", fontsize=10)
    pictures.tidy(axes, x_ticks=6)


def _colors(runs: Report) -> list[str]:
    return [COLORS[name] for name in runs]
