"""All that a machine with an NVIDIA GPU can show, in one call of less than nine minutes. Run by scripts/gpu_check.

Every part is a process of its own, that ends at its limit: what fails or hangs is told, and the others go on.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from radixkv.attention.backend import backend_names
from radixkv_bench.attention.shapes import CASES
from radixkv_bench.common import machine
from radixkv_bench.common.files import write_json

ROOT = Path(__file__).resolve().parents[3]
CONFORMANCE = ("attention", "triton", "flashinfer", "graphs")  # tests/test_*.py
FP4_CASES = ("decode-32x4096", "shared-32x4096+128", "extend-512on3584")
TAIL_LINES = 30
SHOWN_LINES = 12
DECODES, SHARED = "attention: decodes", "attention: shared prefixes and extends"
FP4, READ_FP4 = "attention: KV in fp4", ("--kv-dtype", "fp4")
BACKENDS = [name for name in ("triton", "flashinfer") if name in backend_names()]

Figures = Mapping[str, Any]
"""What each part wrote, by its name; of parts that wrote nothing there is none."""


@dataclass(frozen=True, slots=True)
class Part:
    """A command; `{json}` in it is where it writes its figures."""

    name: str
    limit_s: float
    command: Sequence[str]


@dataclass(frozen=True, slots=True)
class Result:
    """How a part went: "ok", "failed" or "timed out"."""

    outcome: str
    exit_code: int | None
    seconds: float
    output_tail: list[str]
    figures: Any


@dataclass(frozen=True, slots=True)
class Target:
    """A figure, at its worst among `values`, against what it ought to be."""

    about: str
    sign: str  # "≥" or "≤"
    limit: float
    values: Mapping[str, float]

    @property
    def worst(self) -> float | None:
        """None if nothing was measured."""
        return (min if self.sign == "≥" else max)(self.values.values(), default=None)

    @property
    def met(self) -> bool | None:
        """None if nothing was measured."""
        if self.worst is None:
            return None
        return self.worst >= self.limit if self.sign == "≥" else self.worst <= self.limit

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "worst": self.worst, "met": self.met}


# -- parts -----------------------------------------------------------------------------------------------------------


def parts() -> list[Part]:
    """Limits add up to less than nine minutes."""
    # -P: the root must not be on sys.path, where kernels/ would shadow a package
    pytest = (sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider")
    files = [f"tests/test_{name}.py" for name in CONFORMANCE if (ROOT / f"tests/test_{name}.py").exists()]
    others = [f"--ignore={file}" for file in files]
    cases = {
        part: [case.name for case in CASES["cuda"] if case.name.startswith("decode") == (part == DECODES)]
        for part in (DECODES, SHARED)
    }
    return [
        # the CPU's backend takes long to compile, and shows nothing of the GPU
        Part("conformance", 105, (*pytest, "-m", "not stress", "-k", "not numba", *files)),
        # before the tests, which need the same kernel: FlashInfer compiles it here
        Part(FP4, 60, (*_bench("attention", 3), *_each("--case", FP4_CASES), *_each("--backend", BACKENDS), *READ_FP4)),
        Part("gpu tests", 30, (*pytest, "-m", "gpu and not stress", *others, "tests")),
        Part("engine", 40, (sys.executable, "bench/gpu_parts.py", "engine", "{json}")),
        Part(DECODES, 75, (*_bench("attention", 9), *_each("--case", cases[DECODES]), *_each("--backend", BACKENDS))),
        Part("decode step", 85, _bench("decode_step", 2)),
        Part("shared prompt", 80, (sys.executable, "bench/gpu_parts.py", "shared-prompt", "{json}")),
        Part(SHARED, 40, (*_bench("attention", 5), *_each("--case", cases[SHARED]))),
    ]


def _bench(name: str, rounds: int) -> tuple[str, ...]:
    options = ("--device", "cuda", "--rounds", str(rounds), "--json", "{json}")
    return (sys.executable, f"bench/{name}.py", *options)


def _each(option: str, values: Sequence[str]) -> Iterator[str]:
    return chain.from_iterable((option, value) for value in values)


def run(part: Part, folder: Path) -> Result:
    """Run a part to its end or its limit; then it and all processes that it started are killed."""
    stem = part.name.replace(" ", "-").replace(":", "")
    figures_file, log_file = folder / f"{stem}.json", folder / f"{stem}.log"
    command = [word.replace("{json}", str(figures_file)) for word in part.command]
    started_s = time.perf_counter()
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            exit_code: int | None = process.wait(part.limit_s)
        except subprocess.TimeoutExpired:
            exit_code = None
        finally:
            _kill_group(process)
    return Result(
        outcome={None: "timed out", 0: "ok"}.get(exit_code, "failed"),
        exit_code=exit_code,
        seconds=time.perf_counter() - started_s,
        output_tail=log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:],
        figures=_figures(figures_file),
    )


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended, and left nobody behind
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _figures(path: Path) -> Any:
    """None if the part did not get as far as to write them all."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


# -- targets ---------------------------------------------------------------------------------------------------------


def targets(figures: Figures) -> list[Target]:
    """Each figure that has a target, from what the parts wrote."""
    decodes = _decodes(figures)
    return [
        Target("Triton paged decode: FlashInfer's time / its own", "≥", 0.9, _faster(decodes, "triton", "flashinfer")),
        Target(
            "Triton paged decode: share of the read-only bandwidth probe",
            "≥",
            0.75,
            {case: rows["triton"]["roofline_fraction"] for case, rows in decodes.items() if "triton" in rows},
        ),
        Target(
            "int8 KV, Triton: FlashInfer's time in bfloat16 / its own",
            "≥",
            1.4,
            _faster(decodes, "triton int8", "flashinfer"),
        ),
        Target(
            "decode step of the whole model / reading weights and KV once",
            "≤",
            1.25,
            {f"batch {row['batch']}": row["step_over_floor"] for row in figures.get("decode step", {}).get("rows", ())},
        ),
        Target(
            "shared prompts: generate_batch's time / radixkv's",
            "≥",
            3.0,
            {"few-shot": figures["shared prompt"]["speedup"]} if "shared prompt" in figures else {},
        ),
    ]


def _decodes(figures: Figures) -> dict[str, dict[str, Any]]:
    """Rows of the attention bench by case and backend: decodes, of which all are of batch 32 and 4k tokens at least."""
    rows = [row for row in figures.get(DECODES, {}).get("rows", ()) if row["case"].startswith("decode-")]
    by_case: dict[str, dict[str, Any]] = {}
    for row in rows:
        by_case.setdefault(row["case"], {})[row["backend"]] = row
    return by_case


def _faster(decodes: Mapping[str, Mapping[str, Any]], name: str, other: str) -> dict[str, float]:
    return {
        case: rows[other]["ms"] / rows[name]["ms"] for case, rows in decodes.items() if name in rows and other in rows
    }


# -- the command -----------------------------------------------------------------------------------------------------


def check(all_parts: Sequence[Part], out: Path, console: Console) -> bool:
    """Run the parts, write what they found to `out`, print the targets last. Returns: whether all parts went well."""
    config = machine.describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in all_parts:
            console.print(f"{part.name} (at most {part.limit_s:.0f} s) ...", highlight=False)
            results[part.name] = result = run(part, Path(folder))
            _print_result(part, result, console)
    found = targets({name: result.figures for name, result in results.items() if result.figures is not None})
    report = {
        "parts": {name: asdict(result) for name, result in results.items()},
        "targets": [target.as_dict() for target in found],
        "config": config,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(report, out)
    console.print(f"wrote {out}", highlight=False)
    _print_targets(found, results, console)
    return all(result.outcome == "ok" for result in results.values())


def _print_result(part: Part, result: Result, console: Console) -> None:
    style = "green" if result.outcome == "ok" else "red"
    console.print(f"{part.name}: {result.outcome} after {result.seconds:.0f} s", style=style, highlight=False)
    for line in result.output_tail[-(1 if result.outcome == "ok" else SHOWN_LINES) :]:
        console.print(f"  {line}", style="dim", markup=False, highlight=False)


def _print_targets(found: Sequence[Target], results: Mapping[str, Result], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("")
    for heading in ("worst", "best", "target"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for target in found:
        best: Callable[..., float] = max if target.sign == "≥" else min
        known = target.worst is not None
        table.add_row(
            target.about,
            f"{target.worst:.2f}" if target.worst is not None else "",
            f"{best(target.values.values()):.2f}" if known else "",
            f"{target.sign} {target.limit:g}",
            {None: "[yellow]not measured[/]", True: "[green]met[/]", False: "[red]missed[/]"}[target.met],
        )
    for name, result in results.items():
        colour = "green" if result.outcome == "ok" else "red"
        table.add_row(f"part: {name}", f"{result.seconds:.0f} s", "", "", f"[{colour}]{result.outcome}[/]")
    console.print(table)


def main() -> int:
    """0 if all parts went well, whatever the targets say."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "out" / "gpu_check.json"
    return 0 if check(parts(), out, Console(width=110)) else 1
