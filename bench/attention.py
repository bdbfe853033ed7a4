"""Paged attention against what the machine can do: each backend, plain and over shared prefixes, sizes swept.

python bench/attention.py --help
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress

import attention_report
import machine
from attention_contenders import PLAIN, Contender, make_contenders
from attention_report import Report, Row
from attention_setup import Setup
from attention_shapes import Case, choose_cases
from device_timing import OnStep, interleave
from errors import BenchError, exit_code
from probes import Probes, Speeds
from radixkv.attention.backend import backend_names

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16",)}
ROOFLINES = {
    "cpu": "The roofline is the time to read the KV once or to compute in float32, whichever is longer.",
    "cuda": "The roofline is the time to read the KV once.",
}
REFRESH_S = 0.2

RUN = "How it is run"
FILES = "Files to write"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, slots=True)
class Task:
    """What is measured, and how often."""

    cases: Sequence[Case]
    dtypes: Sequence[str]
    backends: Sequence[str]
    device: torch.device
    rounds: int


@app.command()
def attention(
    case: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A case to run; may be given again.", show_default="all"),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            metavar="|".join(DTYPES),
            help="Of queries and KV; may be given again.",
            show_default="float32 and bfloat16 on the CPU, bfloat16 on CUDA",
        ),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A backend to run beside the plain ways; may be given again.",
            show_default="all that can serve the case",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(rich_help_panel=RUN, help="cpu, cuda, or auto: CUDA if there is one.")
    ] = "auto",
    rounds: Annotated[
        int, typer.Option(rich_help_panel=RUN, help="Turns of each contender, interleaved; the medians count.")
    ] = 11,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", rich_help_panel=FILES, metavar="FILE.json", help="Write all figures as JSON."),
    ] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", rich_help_panel=FILES, metavar="FILE.png", help="Draw the figures.")
    ] = None,
) -> int:
    """Measure the attention of one layer over paged KV, decodes and extends: our backends, and the plain way in torch,
    which gathers the pages and runs scaled_dot_product_attention. Beside them run probes of what the machine reads and
    computes at its best.

    Each call is for another layer, so that no KV is in a cache. All are checked against the reference first.

    \b
    --case decode-8x4096 --dtype float32
    --json attention.json --plot attention.png

    Exits with 2 if the command cannot be run.
    """
    where = machine.choose_device(device)
    task = Task(choose_cases(case or (), where), _dtypes(dtype or (), where), _backends(backend or ()), where, rounds)
    _check(task, json_file, plot_file)
    errors = Console(stderr=True, soft_wrap=True)
    report = measure(task, errors)
    attention_report.print_tables(report, Console())
    if json_file is not None:
        attention_report.write_json(report, json_file)
    if plot_file is not None:
        attention_report.write_plot(report, plot_file)
    for written in filter(None, (json_file, plot_file)):
        errors.print(f"wrote {written}", highlight=False)
    return 0


def _dtypes(names: Sequence[str], device: torch.device) -> Sequence[str]:
    for name in names:
        if name not in DTYPES:
            raise BenchError(f"--dtype must be one of {', '.join(DTYPES)}, not {name!r}")
    return names or DEFAULT_DTYPES[device.type]


def _backends(names: Sequence[str]) -> Sequence[str]:
    for name in names:
        if name not in backend_names():
            raise BenchError(f"there is no backend {name!r}; the backends are {', '.join(backend_names())}")
    return names


def _check(task: Task, json_file: Path | None, plot_file: Path | None) -> None:
    """Find out before the run, not after it, that it cannot be done."""
    if task.rounds < 1:
        raise BenchError(f"--rounds must be at least 1, not {task.rounds}")
    for path in (json_file, plot_file):
        machine.check_place(path)
    if plot_file is not None:
        attention_report.check_plot(plot_file)


# -- measuring -------------------------------------------------------------------------------------------------------


def measure(task: Task, errors: Console, probes: Probes | None = None) -> Report:
    """Run all cases in all dtypes, under a progress bar."""
    probes = probes or Probes(task.device)
    rows: list[Row] = []
    speeds: list[Speeds] = []
    with Progress(console=errors, transient=True, auto_refresh=False) as progress, torch.inference_mode():
        for case in task.cases:
            for dtype in task.dtypes:
                found, speed = _measure_case(case, dtype, task, probes, progress)
                rows += found
                speeds.append(speed)
    overall = Speeds(*(median(values) for values in zip(*map(_values, speeds), strict=True)))
    return Report(rows, overall, _config(task))


def _measure_case(case: Case, dtype: str, task: Task, probes: Probes, progress: Progress) -> tuple[list[Row], Speeds]:
    bar = progress.add_task(f"{case.name} {dtype}", total=None)
    progress.refresh()
    contenders = make_contenders(Setup(case, DTYPES[dtype], task.device), task.backends)
    calls = {**{contender.name: contender.call for contender in contenders}, **probes.calls}
    progress.update(bar, total=task.rounds * len(calls))
    times = interleave(calls, task.rounds, task.device, _steps(progress, bar))
    speeds = probes.speeds(times)
    progress.remove_task(bar)
    ms = {contender.name: 1000 * median(times[contender.name]) for contender in contenders}
    rows = [
        Row(
            case.name,
            contender.name,
            dtype,
            ms[contender.name],
            contender.kv_bytes / ms[contender.name] / 1e6,
            roofline_ms(case, contender, speeds, task.device),
            ms[PLAIN] / ms[contender.name],
        )
        for contender in contenders
    ]
    return rows, speeds


def roofline_ms(case: Case, contender: Contender, speeds: Speeds, device: torch.device) -> float:
    """The least time for the case at these speeds (Williams, Waterman and Patterson, "Roofline", 2009): that of its
    bytes or of its products in float32, whichever is longer; on CUDA that of its bytes.
    """
    read_ms = contender.kv_bytes / speeds.read_gb_s / 1e6
    return read_ms if device.type == "cuda" else max(read_ms, case.flops / speeds.gemm_gflop_s / 1e6)


def _values(speeds: Speeds) -> tuple[float, ...]:
    return speeds.read_gb_s, speeds.gemm_gflop_s, speeds.gemm_bf16_gflop_s


def _steps(progress: Progress, bar: Any) -> OnStep:
    """The bar is drawn between measurements, not by a thread that would run into them."""
    drawn_s = 0.0

    def on_step(steps: int) -> None:
        nonlocal drawn_s
        progress.advance(bar, steps)
        if time.perf_counter() - drawn_s > REFRESH_S:
            progress.refresh()
            drawn_s = time.perf_counter()

    return on_step


def _config(task: Task) -> dict[str, Any]:
    """How it was run, and the machine and the versions that the figures belong to."""
    return {
        "cases": [case.name for case in task.cases],
        "dtypes": list(task.dtypes),
        "rounds": task.rounds,
        "roofline": ROOFLINES[task.device.type],
        **machine.describe(task.device),
    }


def main() -> int:
    """The command; every mistake of its user is one line on stderr and exit code 2."""
    return exit_code(app, "attention")


if __name__ == "__main__":
    sys.exit(main())
