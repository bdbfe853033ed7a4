"""bench/gpu_check.py: parts end at their limits, figures meet their targets, and no GPU is one line."""

from __future__ import annotations

import json
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from radixkv_bench.attention.shapes import CASES
from radixkv_bench.gpu import check as gpu_check
from radixkv_bench.gpu import parts as gpu_parts
from radixkv_bench.gpu.check import ROOT, Part

WRITE = "import json, sys; json.dump({'rows': [{'batch': 8, 'step_over_floor': 1.3}]}, open(sys.argv[1], 'w'))"
HANG = "import threading; print('here', flush=True); threading.Event().wait()"


def python(code: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", code, *arguments)


def test_a_part_that_hangs_or_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    parts = [
        Part("conformance", 0.5, python(HANG)),
        Part("engine", 30, python("raise SystemExit('broken')")),
        Part("decode step", 30, python(WRITE, "{json}")),
    ]
    out, printed = tmp_path / "deep" / "out.json", StringIO()
    assert not gpu_check.check(parts, out, Console(file=printed, width=110))
    report = json.loads(out.read_text())
    assert {name: part["outcome"] for name, part in report["parts"].items()} == {
        "conformance": "timed out",
        "engine": "failed",
        "decode step": "ok",
    }
    assert report["parts"]["engine"]["output_tail"] == ["broken"]
    met = {target["about"]: target["met"] for target in report["targets"]}
    assert met.pop("decode step of the whole model / reading weights and KV once") is False
    assert set(met.values()) == {None}
    lines = printed.getvalue().splitlines()
    assert any("1.30" in line and "≤ 1.25" in line and "missed" in line for line in lines)
    assert sum("not measured" in line for line in lines) == 4


def test_parts_fit_into_nine_minutes() -> None:
    parts = gpu_check.parts()
    assert sum(part.limit_s for part in parts) < 9 * 60 - 20  # and some for what comes before
    assert len({part.name for part in parts}) == len(parts)
    for part in parts:
        files = [word for word in part.command if word.endswith(".py") and not word.startswith("--")]
        assert all((ROOT / file).exists() for file in files), part


def test_one_part_reads_fp4_by_every_backend() -> None:
    (part,) = (part for part in gpu_check.parts() if "--kv-dtype" in part.command)
    options = [*zip(part.command, part.command[1:], strict=False)]
    assert ("--kv-dtype", "fp4") in options
    assert {value for option, value in options if option == "--backend"} == set(gpu_check.BACKENDS) >= {"flashinfer"}
    named = {value for option, value in options if option == "--case"}
    assert named == set(gpu_check.FP4_CASES) <= {case.name for case in CASES["cuda"]}


def row(case: str, backend: str, ms: float, fraction: float = 0.5) -> dict[str, Any]:
    return {"case": case, "backend": backend, "ms": ms, "roofline_fraction": fraction}


def test_targets_take_the_worst() -> None:
    rows = [
        row("decode-32x4096", "triton", 2.0, 0.8),
        row("decode-32x4096", "flashinfer", 2.0),
        row("decode-32x4096", "triton int8", 1.0),
        row("decode-64x4096", "triton", 4.0, 0.7),
        row("decode-64x4096", "flashinfer", 3.8),
        row("decode-64x4096", "triton int8", 2.0),
        row("shared-32x4096+128", "triton", 9.0, 0.1),
        row("shared-32x4096+128", "flashinfer", 1.0),
    ]
    figures = {
        gpu_check.DECODES: {"rows": rows},
        "decode step": {"rows": [{"batch": 1, "step_over_floor": 1.1}, {"batch": 8, "step_over_floor": 1.2}]},
        "shared prompt": {"speedup": 3.5},
    }
    found = [(target.worst, target.met) for target in gpu_check.targets(figures)]
    assert found == [(pytest.approx(0.95), True), (0.7, False), (pytest.approx(1.9), True), (1.2, True), (3.5, True)]
    assert [target.met for target in gpu_check.targets({})] == [None] * 5


def test_the_engine_is_wrong_if_exact_answers_differ() -> None:
    same = {"backend": "torch", "dtype": "float32", "cold": 1.0, "warm": 1.0, "batched": 1.0}
    rounded = {**same, "dtype": "bfloat16", "warm": 0.5}
    left_out = {"backend": "numba", "dtype": "float32", "left_out": "runs on the CPU"}
    assert gpu_parts.engine_is_right([same, rounded, left_out])
    assert not gpu_parts.engine_is_right([same, {**same, "batched": 0.5}])


@pytest.mark.stress
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_script_says_so() -> None:
    done = subprocess.run([ROOT / "scripts" / "gpu_check"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("gpu_check: needs an NVIDIA GPU")
