"""What `radixkv replay` found, as a picture (matplotlib, from the `plot` extra)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from radixkv.errors import ConfigError
from radixkv.replay.simulation import BELADY

if TYPE_CHECKING:
    from radixkv.cli.replay_report import ReplayReport

COLORS = ("#c8553d", "#588b8b", "#e0a458", "#4f6d9a", "#8a6ba1", "#7a9e4f", "#b5838d", "#3d405b")
MARKERS = "os^Dv<>P"
CROWDED = 1.25  # sizes that differ by a smaller factor have no room for a label each


def check_plot(path: Path) -> None:
    """Raises: ConfigError without matplotlib, and for an image format that it cannot write."""
    formats = [name for name in _new_figure().canvas.get_supported_filetypes() if name != "pgf"]  # which needs TeX
    if path.suffix.removeprefix(".").lower() not in formats:
        raise ConfigError(
            f"--plot {path} must name an image format: end it with .png or another of {', '.join(formats)}"
        )


def write_plot(report: ReplayReport, path: Path) -> None:
    """Draw hit rate over capacity, a line for each policy, into the image at `path`.

    Raises: as `check_plot`, and ConfigError if the place cannot be written.
    """
    with save(path, report.title) as axes:
        _draw(axes, report)
        _scale(axes, sorted({result.capacity_tokens for result in report.results}))


@contextmanager
def save(path: Path, title: str) -> Iterator[Any]:
    """Axes to draw on, which are written into the image at `path` at the end, with a legend beside them.

    Raises: as `check_plot`, and ConfigError if the place cannot be written.
    """
    figure = _new_figure()
    axes = figure.subplots()
    yield axes
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    axes.legend(fontsize=9, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


def _new_figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'radixkv[plot]'") from None
    return Figure(figsize=(8, 4.5), layout="constrained")


def _draw(axes: Any, report: ReplayReport) -> None:
    axes.axhline(100 * report.ceiling, color="black", linestyle=":", linewidth=1.2, label="ceiling (no limit)")
    axes.plot(*_line(report, BELADY), color="black", linestyle="--", marker=".", label=f"{BELADY} (optimum)")
    policies = dict.fromkeys(result.policy for result in report.results if result.policy != BELADY)
    for index, policy in enumerate(policies):
        style = {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)]}
        size = 9 - 5 * index / len(policies)  # lines that lie on each other show as rings
        axes.plot(*_line(report, policy), markersize=size, fillstyle="none", label=policy, **style)


def _line(report: ReplayReport, policy: str) -> tuple[list[int], list[float]]:
    """Capacities and hit rates in percent of one policy."""
    results = sorted((r for r in report.results if r.policy == policy), key=lambda r: r.capacity_tokens)
    return [r.capacity_tokens for r in results], [100 * r.hit_rate for r in results]


def _scale(axes: Any, sizes: list[int]) -> None:
    axes.set_xscale("log")
    if all(larger / smaller >= CROWDED for smaller, larger in pairwise(sizes)):
        axes.set_xticks(sizes, labels=[short_count(size) for size in sizes])
        axes.minorticks_off()
    else:
        axes.xaxis.set_major_formatter(lambda size, _: short_count(size))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("capacity, tokens")
    axes.set_ylabel("prompt tokens hit, %")
    axes.grid(axis="y", alpha=0.25)


def short_count(number: float) -> str:
    """A number of tokens in as few characters as tell it.

    >>> short_count(250000), short_count(1500000), short_count(512)
    ('250k', '1.5M', '512')
    """
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.3g}"
