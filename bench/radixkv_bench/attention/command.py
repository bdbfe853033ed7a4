"""Paged attention against what the machine can do: each backend, plain and over shared prefixes, sizes swept.

python bench/attention.py --help
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from radixkv.attention.backend import backend_names
from radixkv.memory.kv_codes import CODE_FORMS
from radixkv_bench.attention import report as reports
from radixkv_bench.attention.contenders import PLAIN, Contender, make_coded_contenders, make_contenders
from radixkv_bench.attention.report import Report, Row
from radixkv_bench.attention.setup import Setup
from radixkv_bench.attention.shapes import Case, choose_cases
from radixkv_bench.common import machine
from radixkv_bench.common.command import Outcome, command, error_console
from radixkv_bench.common.device_timing import interleave
from radixkv_bench.common.errors import BenchError
from radixkv_bench.common.options import DTYPES, Device, Rounds, choose_dtype
from radixkv_bench.common.probes import Probes, Speeds
from radixkv_bench.common.progress import add_steps, quiet_bar

DEFAULT_DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16",)}
ROOFLINES = {
    "cpu": "The roofline is the time to read the KV once or to compute in float32, whichever is longer.",
    "cuda": "The roofline is the time to read the KV once.",
}


@dataclass(frozen=True, slots=True)
class Task:
    """What is measured, and how often."""

    cases: Sequence[Case]
    dtypes: Sequence[str]
    backends: Sequence[str]
    codes: Sequence[str]
    device: torch.device
    rounds: int


@command("attention")
def main(
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
    kv_dtype: Annotated[
        list[str] | None,
        typer.Option(
            metavar="|".join(CODE_FORMS),
            help="Codes to keep KV in, read in place, beside KV as it is; may be given again.",
            show_default="none",
        ),
    ] = None,
    device: Device = "auto",
    rounds: Rounds = 11,
) -> Outcome:
    """Measure the attention of one layer over paged KV, decodes and extends: our backends, and the plain way in torch,
    which gathers the pages and runs scaled_dot_product_attention. Beside them run probes of what the machine reads and
    computes at its best.

    Each call is for another layer, so that no KV is in a cache. All are checked against the reference first.

    \b
    --case decode-8x4096 --dtype float32 --kv-dtype int4 --kv-dtype fp4
    --json attention.json --plot attention.png

    Exits with 2 if the command cannot be run.
    """
    where = machine.choose_device(device)
    task = Task(
        choose_cases(case or (), where),
        _dtypes(dtype or (), where),
        _backends(backend or ()),
        _codes(kv_dtype or ()),
        where,
        rounds,
    )
    report = measure(task, error_console())
    return Outcome(report.as_dict(), partial(reports.print_tables, report), partial(reports.write_plot, report))


def _dtypes(names: Sequence[str], device: torch.device) -> Sequence[str]:
    for name in names:
        choose_dtype(name)
    return names or DEFAULT_DTYPES[device.type]


def _backends(names: Sequence[str]) -> Sequence[str]:
    for name in names:
        if name not in backend_names():
            raise BenchError(f"unknown backend {name!r}; the backends are {', '.join(backend_names())}")
    return names


def _codes(names: Sequence[str]) -> Sequence[str]:
    for name in names:
        if name not in CODE_FORMS:
            raise BenchError(f"--kv-dtype must be one of {', '.join(CODE_FORMS)}, not {name!r}")
    return names


# -- measuring -------------------------------------------------------------------------------------------------------


def measure(task: Task, errors: Console, probes: Probes | None = None) -> Report:
    """Run all cases in all dtypes, under a progress bar."""
    probes = probes or Probes(task.device)
    rows: list[Row] = []
    speeds: list[Speeds] = []
    with quiet_bar(errors) as progress, torch.inference_mode():
        for case in task.cases:
            for dtype in task.dtypes:
                found, speed = _measure_case(case, dtype, task, probes, progress)
                rows += found
                speeds.append(speed)
    overall = Speeds(*(median(values) for values in zip(*map(_values, speeds), strict=True)))
    return Report(rows, overall, _config(task))


def _measure_case(case: Case, dtype: str, task: Task, probes: Probes, progress: Progress) -> tuple[list[Row], Speeds]:
    contenders = make_contenders(Setup(case, DTYPES[dtype], task.device), task.backends)
    for code in task.codes:
        contenders += make_coded_contenders(Setup(case, DTYPES[dtype], task.device, kv_dtype=code), task.backends)
    calls = {**{contender.name: contender.call for contender in contenders}, **probes.calls}
    on_step = add_steps(progress, f"{case.name} {dtype}", task.rounds * len(calls))
    times = interleave(calls, task.rounds, task.device, on_step)
    speeds = probes.speeds(times)
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


def _config(task: Task) -> dict[str, Any]:
    """How it was run, and the machine and the versions that the figures belong to."""
    return {
        "cases": [case.name for case in task.cases],
        "dtypes": list(task.dtypes),
        "kv_dtypes": list(task.codes),
        "rounds": task.rounds,
        "roofline": ROOFLINES[task.device.type],
        **machine.describe(task.device),
    }
