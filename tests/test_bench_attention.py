"""bench/attention.py: its cases and arithmetic, that contenders are checked, and one small run of everything."""

from __future__ import annotations

import doctest
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from radixkv_bench.attention import command as attention
from radixkv_bench.attention import report as attention_report
from radixkv_bench.attention import setup as attention_setup
from radixkv_bench.attention import shapes as attention_shapes
from radixkv_bench.attention.contenders import CONTIGUOUS, PLAIN, Contender, make_coded_contenders, make_contenders
from radixkv_bench.attention.report import Report, Row
from radixkv_bench.attention.setup import Setup
from radixkv_bench.attention.shapes import CASES, Case
from radixkv_bench.common import device_timing, files, machine, probes
from radixkv_bench.common.errors import BenchError
from radixkv_bench.common.probes import Probes, Speeds

CPU = torch.device("cpu")
SMALL = {"q_heads": 4, "kv_heads": 2, "head_dim": 16}
TINY = (
    Case("decode-3x40", 3, 40, **SMALL),
    Case("decode-2x21-page1", 2, 21, page_size=1, **SMALL),
    Case("shared-4x32+17", 4, 49, shared=32, **SMALL),
    Case("extend-9on24", 1, 33, new=9, **SMALL),
)
OWN = ("numba", "torch")


def setup(case: Case, dtype: torch.dtype = torch.float32) -> Setup:
    """With three layers."""
    return Setup(case, dtype, CPU, cold_bytes=2 * case.kv_bytes(dtype) + 1)


# -- cases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_work_is_what_loops_count(case: Case) -> None:
    products = sum(position + 1 for _ in range(case.batch) for position in range(case.context - case.new, case.context))
    assert case.flops == 2 * 2 * case.q_heads * case.head_dim * products
    slots = {
        (page, offset)
        for row in setup(case).page_table
        for token in range(case.context)
        for page, offset in [(int(row[token // case.page_size]), token % case.page_size)]
    }
    assert case.distinct_tokens == len(slots)
    assert case.kv_bytes(torch.bfloat16) == len(slots) * case.kv_heads * case.head_dim * 2 * 2


def test_requests_share_their_prefix_and_nothing_else() -> None:
    table = setup(TINY[2]).page_table
    assert (table[:, :2] == table[0, :2]).all()
    own = table[:, 2:].ravel()
    assert len(np.unique(own)) == len(own)
    assert not np.isin(own, table[0, :2]).any()
    assert (np.diff(table[0]) != 1).any(), "pages lie in random order"


def test_every_case_fits_its_pages_and_has_a_name_of_its_own() -> None:
    for cases in CASES.values():
        assert len({case.name for case in cases}) == len(cases)
        assert all(case.shared % case.page_size == 0 for case in cases)
        assert all(case.q_heads % case.kv_heads == 0 for case in cases)


def test_an_unknown_case_is_told_with_the_known_ones() -> None:
    with pytest.raises(BenchError, match="unknown case 'decode-9' on cpu; the cases are decode-1x4096, "):
        attention_shapes.choose_cases(["decode-8x4096", "decode-9"], CPU)
    assert [case.name for case in attention_shapes.choose_cases(["decode-8x4096"], CPU)] == ["decode-8x4096"]
    assert attention_shapes.choose_cases([], CPU) is CASES["cpu"]


def test_examples() -> None:
    assert doctest.testmod(attention_shapes).failed == 0


# -- contenders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_contenders_compute_what_the_reference_does(case: Case, dtype: torch.dtype) -> None:
    shared, made = bool(case.shared), setup(case, dtype)
    assert made.num_layers == 3
    contenders = make_contenders(made, OWN)
    expected = ["numba", *["numba flat"] * shared, "torch", PLAIN, *[CONTIGUOUS] * (case.new > 1)]
    assert [contender.name for contender in contenders] == expected
    first = contenders[0]
    for contender in contenders:
        for _ in range(made.num_layers):  # each of the layers
            torch.testing.assert_close(contender.call().float(), first.call().float(), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("kv_dtype", ["int4", "fp4"])
def test_codes_are_checked_against_what_they_stand_for(kv_dtype: str) -> None:
    case = TINY[0]
    coded = Setup(case, torch.float32, CPU, kv_dtype=kv_dtype, cold_bytes=1)
    (contender,) = make_coded_contenders(coded, OWN)
    assert contender.name == f"numba {kv_dtype}"
    num_bytes = {"int4": 8 + 4, "fp4": 8 + 1}[kv_dtype]  # of a vector of 16
    assert contender.kv_bytes == case.distinct_tokens * case.kv_heads * 2 * num_bytes
    with pytest.raises(BenchError, match="computes something else"):
        setup(case).check(contender.name, contender.call())


def test_only_the_cascade_knows_what_is_shared() -> None:
    made = setup(TINY[2])
    (node,) = made.metadata(with_path=True).shared_nodes
    assert (node.sequences, node.first, node.last) == ((0, 1, 2, 3), 0, 32)
    assert made.metadata(with_path=False).shared_nodes == ()


def test_a_wrong_result_is_not_timed() -> None:
    made = setup(TINY[0])
    right = make_contenders(made, OWN)[0].call()
    made.check("right", right)
    for wrong in (right * 1.01, right.roll(1, dims=1), torch.full_like(right, float("nan"))):
        with pytest.raises(BenchError, match="wrong computes something else than the reference in decode-3x40"):
            made.check("wrong", wrong)


def test_int8_pages_hold_what_was_there() -> None:
    attention_int8 = pytest.importorskip("radixkv_bench.attention.int8", exc_type=ImportError)
    x = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(0))
    codes, scales = attention_int8.quantise(x)
    assert codes.dtype == torch.int8
    assert scales.shape == (5, 3)
    torch.testing.assert_close(codes * scales[..., None], x, atol=float(x.abs().max()) / 254, rtol=0)
    if attention_int8.triton_paged.INTERPRETED:
        made = setup(TINY[0])
        run, kv_bytes = attention_int8.make(made)
        made.check("int8", run(1), attention_int8.TOLERANCE)
        assert kv_bytes == TINY[0].kv_bytes(torch.int8) + 3 * 40 * 2 * 2 * scales.element_size()


# -- timing ----------------------------------------------------------------------------------------------------------


def test_rounds_go_back_and_forth() -> None:
    turns: list[str] = []
    steps: list[int] = []

    def call(name: str) -> None:
        if turns[-1:] != [name]:
            turns.append(name)

    times = device_timing.interleave({n: lambda n=n: call(n) for n in "abc"}, 3, CPU, steps.append)
    assert "".join(turns) == "abcabcbabc", "warming up, then abc, cba, abc"
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3, "c": 3}
    assert sum(steps) == 9
    assert min(min(seconds) for seconds in times.values()) > 0


def test_the_fastest_way_is_taken() -> None:
    large = torch.ones(300, 300)
    ways = {"slow": lambda: [large @ large for _ in range(50)], "fast": lambda: None}
    assert device_timing.fastest(ways, CPU) == "fast"


def test_speeds_are_medians_of_the_fastest_reads() -> None:
    made = Probes(CPU, read_bytes=1 << 20, gemm_size=64)
    norm, total, product = probes.READS
    times = {
        norm: [1.0, 4.0, 2.0],
        total: [2.0, 2.0, 9.0],
        product: [3.0, 5.0, 8.0],
        **{name: [3.0, 1.0, 2.0] for name in probes.GEMMS},
    }
    speeds = made.speeds(times)
    assert speeds.read_gb_s == pytest.approx((1 << 20) / 2 / 1e9)
    assert speeds.gemm_gflop_s == speeds.gemm_bf16_gflop_s == pytest.approx(2 * 64**3 / 2 / 1e9)
    assert list(made.calls) == list(times)
    for call in made.calls.values():
        call()


def test_the_roofline_is_the_longer_of_reading_and_computing() -> None:
    case, speeds = TINY[0], Speeds(read_gb_s=2e-6, gemm_gflop_s=1e-3, gemm_bf16_gflop_s=1.0)
    contender = Contender("", lambda: torch.empty(0), kv_bytes=10_000)
    computing = case.flops / 1e3
    assert attention.roofline_ms(case, contender, speeds, CPU) == pytest.approx(max(5000.0, computing))
    slower = replace(speeds, gemm_gflop_s=1e-6)
    assert attention.roofline_ms(case, contender, slower, CPU) == pytest.approx(1000 * computing)
    assert attention.roofline_ms(case, contender, slower, torch.device("cuda")) == pytest.approx(5000)


# -- report ----------------------------------------------------------------------------------------------------------


def row(name: str, ms: float, case: str = "a") -> Row:
    return Row(case, name, "float32", ms, gb_s=1.0, roofline_ms=1.0, times_plain=1.0)


def test_ratios() -> None:
    shared = [row("numba", 2), row("numba flat", 3), row("torch", 5), row(PLAIN, 10)]
    on_gpu = [row("triton", 4, "b"), row("flashinfer", 3, "b"), row("triton int8", 2, "b"), row(PLAIN, 12, "b")]
    extend = [row("numba", 2, "c"), row(PLAIN, 3, "c"), row(CONTIGUOUS, 1, "c")]
    assert Report(shared + on_gpu + extend, Speeds(1, 1, 1), {}).ratios() == {
        f"a float32: numba / {PLAIN}": 5,
        "a float32: numba / numba flat": 1.5,
        f"b float32: flashinfer / {PLAIN}": 4,
        "b float32: triton / flashinfer": 0.75,
        "b float32: triton int8 / flashinfer": 1.5,
        f"c float32: numba / {PLAIN}": 1.5,
        f"c float32: numba / {CONTIGUOUS}": 0.5,
    }


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases, probes and turns that take no time."""
    monkeypatch.setattr(attention_shapes, "CASES", {"cpu": TINY})
    monkeypatch.setattr(attention_setup, "COLD_BYTES", 1 << 10)
    monkeypatch.setattr(probes, "READ_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr(probes, "GEMM_SIZE", {"cpu": 32})
    monkeypatch.setattr(device_timing, "MAX_CALLS", 2)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["attention", "--device", "cpu", *arguments])
    return attention.main()


@pytest.mark.usefixtures("tiny")
def test_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    chosen = ("--case", "shared-4x32+17", "--case", "extend-9on24", "--backend", "numba", "--rounds", "2")
    chosen += ("--kv-dtype", "fp4")
    assert command(monkeypatch, *chosen, "--json", str(out), "--plot", str(plot)) == 0
    report = json.loads(out.read_text())
    assert all(report[name] > 0 for name in ("probe_gb_s", "gemm_gflop_s", "gemm_bf16_gflop_s"))
    names = {
        "shared-4x32+17": ["numba", "numba flat", PLAIN, "numba fp4"],
        "extend-9on24": ["numba", PLAIN, CONTIGUOUS, "numba fp4"],
    }
    expected = [(case, n, dtype) for case in names for dtype in ("float32", "bfloat16") for n in names[case]]
    assert [(r["case"], r["backend"], r["dtype"]) for r in report["rows"]] == expected
    for found in report["rows"]:
        case = next(case for case in TINY if case.name == found["case"])
        kv_bytes = case.kv_bytes(getattr(torch, found["dtype"]))
        if found["backend"] == "numba fp4":
            kv_bytes = case.kv_bytes(torch.uint8) * 9 // 16  # half a byte, and a scale for each 16
        assert found["gb_s"] == pytest.approx(kv_bytes / found["ms"] / 1e6)
        assert found["roofline_fraction"] == pytest.approx(found["roofline_ms"] / found["ms"])
    assert plot.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "shared-4x32+17 float32: numba / numba flat" in printed
    assert "This machine reads" in printed


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--case", "decode-4"), "unknown case 'decode-4' on cpu; the cases are decode-3x40, "),
        (("--dtype", "int4"), "--dtype must be one of float32, bfloat16, float16, not 'int4'"),
        (("--kv-dtype", "int2"), "--kv-dtype must be one of int8, int4, fp8_e4m3, fp8_e5m2, fp4, not 'int2'"),
        (("--backend", "cuda"), "unknown backend 'cuda'; the backends are "),
        (("--rounds", "0"), "--rounds must be at least "),
        (("--json", "nowhere/out.json"), "cannot write nowhere/out.json: there is no directory nowhere"),
        (("--plot", "out.txt"), "--plot out.txt must name an image format"),
        (("--device", "tpu"), "--device must be auto, cpu or cuda, not 'tpu'"),
    ],
)
def test_mistakes_are_one_line(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"attention: {message}")


def test_a_gpu_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.choose_device("auto") == CPU
    with pytest.raises(BenchError, match="needs an NVIDIA GPU"):
        machine.choose_device("cuda")


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    report = Report([row("numba", 1)], Speeds(1, 1, 1), {})
    with pytest.raises(BenchError, match="cannot write"):
        files.write_json(report.as_dict(), tmp_path / "none" / "x.json")
    with pytest.raises(BenchError, match="cannot write"):
        attention_report.write_plot(report, tmp_path / "none" / "x.png")
