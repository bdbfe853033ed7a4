"""Pictures of figures (matplotlib, from the `bench` extra)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from radixkv_bench.common import files
from radixkv_bench.common.errors import BenchError


def check_plot(path: Path | None) -> None:
    """Raises: BenchError without a directory, without matplotlib, and for an image format that it cannot write."""
    files.check_folder(path)
    if path is None:
        return
    formats = new_figure(1, 1).canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in formats:
        raise BenchError(
            f"--plot {path} must name an image format: end it with .png or another of {', '.join(formats)}"
        )


def new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches. Raises: BenchError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BenchError("--plot needs matplotlib: pip install 'radixkv[bench]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Write it as an image. Raises: BenchError if the place cannot be written."""
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise BenchError(f"cannot write {path}: {error.strerror}") from None


def tidy(axes: Any, *, x_ticks: int | None = None) -> None:
    """Drop the frame's top and right, and make the labels small; `x_ticks` limits the marks below."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    if x_ticks is not None:
        axes.locator_params(axis="x", nbins=x_ticks)
