"""bench/decode_step.py: what a step has to read, its arithmetic, and one small run of everything."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from radixkv_bench.common import device_timing, models, probes, random_decoders
from radixkv_bench.common.probes import Probes
from radixkv_bench.common.random_decoders import SMALL, Decoder
from radixkv_bench.decode import command as decode_step
from radixkv_bench.decode import report as decode_report
from radixkv_bench.decode import runs as decode_runs
from radixkv_bench.decode.runs import HF, OURS, BatchTimes, Timing

CPU = torch.device("cpu")
SIZES = "hidden=32,layers=2,heads=4,kv_heads=2,intermediate=48,vocab=100"
TINY = Decoder("qwen2", models.parse_random_model(SIZES), tied=True)


@pytest.fixture(autouse=True)
def _small_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "READ_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr(device_timing, "MAX_CALLS", 2)


def test_a_step_reads_all_weights_but_a_table_of_embeddings_alone() -> None:
    tied, untied = (random_decoders.build(replace(TINY, tied=tied), 64, torch.bfloat16, CPU) for tied in (True, False))
    table = 100 * 32
    attention = 32 * 32 + 32 + 2 * (32 * 16 + 16) + 32 * 32  # with the biases of a Qwen2
    layer = attention + 3 * 32 * 48 + 2 * 32
    weights = table + 2 * layer + 32
    assert random_decoders.bytes_a_step(tied) == random_decoders.bytes_a_step(untied) == 2 * weights
    assert sum(p.numel() for p in untied.parameters()) == weights + table


def test_sizes_say_what_the_models_are() -> None:
    sizes = SMALL.sizes
    kv_dim = sizes.kv_heads * sizes.head_dim
    attention = 2 * sizes.hidden**2 + sizes.hidden + 2 * (sizes.hidden * kv_dim + kv_dim)
    layer = attention + 3 * sizes.hidden * sizes.intermediate + 2 * sizes.hidden
    assert round((sizes.layers * layer + (sizes.vocab + 1) * sizes.hidden) / 1e6) == 387
    assert str(SMALL).startswith("qwen2 hidden=896,layers=24,heads=14,kv_heads=2,")


def test_figures_of_a_batch() -> None:
    times = BatchTimes(
        batch=4,
        timings={
            OURS: [Timing(1.0, 2.0), Timing(2.0, 4.0), Timing(1.0, 3.0)],
            HF: [Timing(2.0, 3.0), Timing(2.0, 4.0), Timing(3.0, 6.0)],
        },
        read_gb_s=[2e-6, 4e-6, 3e-6],
    )
    row = decode_report.row(times, prompt_tokens=10, output_tokens=4, weight_bytes=520, kv_token_bytes=10)
    assert (row.step_ms, row.hf_step_ms) == (1000, pytest.approx(4000 / 3))
    assert (row.decode_tok_s, row.hf_decode_tok_s, row.decode_ratio) == (4, 3, 1.5)
    assert (row.prefill_tok_s, row.hf_prefill_tok_s, row.prefill_ratio) == (40, 20, 2)
    assert row.floor_ms == pytest.approx((520 + 4 * 12 * 10) / 3e-6 / 1e6)
    assert row.as_dict()["step_over_floor"] == pytest.approx(1000 / row.floor_ms)


def test_runners_take_turns_and_answer_the_same() -> None:
    """On the same float32 weights, the prompts of one round, backwards in the next."""
    model = random_decoders.build(TINY, 64, torch.float32, CPU)
    runners = decode_runs.make_runners(model, 3, 20, 5, "auto")
    turns = decode_runs.play(runners, 3, 20, 5, vocab=100, rounds=2, probes=Probes(CPU, gemms=False), device=CPU)
    seen = [(name, times) for name, times in turns]
    assert [name for name, _ in seen] == ["warming up", OURS, HF, HF, OURS, "done"]
    times = seen[-1][1]
    assert {name: len(timings) for name, timings in times.timings.items()} == {OURS: 2, HF: 2}
    assert all(min(timing) > 0 for timings in times.timings.values() for timing in timings)
    assert len(times.read_gb_s) == 2
    stats = runners[0].engine.stats()
    assert stats.computed_tokens == 3 * (16 + 2) + 2 * 3 * (20 + 4), "nothing was reused between rounds"


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["decode_step", "--device", "cpu", "--random-model", SIZES, *arguments])
    return decode_step.main()


def test_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    sizes = ("--batch", "8,1", "--prompt-tokens", "24", "--output-tokens", "4", "--rounds", "1")
    assert command(monkeypatch, *sizes, "--json", str(out), "--plot", str(plot)) == 0
    report = json.loads(out.read_text())
    assert [row["batch"] for row in report["rows"]] == [1, 8]
    for row in report["rows"]:
        assert row["decode_tok_s"] == pytest.approx(1000 * row["batch"] / row["step_ms"])
        assert row["decode_ratio"] == pytest.approx(row["hf_step_ms"] / row["step_ms"])
        assert row["step_over_floor"] == pytest.approx(row["step_ms"] / row["floor_ms"])
    assert report["probe_gb_s"] > 0
    assert report["config"]["backend"] == "numba"
    assert plot.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(target in printed for target in ("≥ 1.5", "≥ 1.2", "≥ 1"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch", "1,x"), "--batch must be numbers, comma-separated, not '1,x'"),
        (("--batch", "0,1"), "--batch must be 1 or more, not '0,1'"),
        (("--output-tokens", "1"), "--output-tokens must be at least "),
        (("--rounds", "0"), "--rounds must be at least "),
        (("--dtype", "int8"), "--dtype must be one of float32, bfloat16, float16, not 'int8'"),
        (("--backend", "none"), "unknown attention backend 'none'"),
        (("--random-model", "hidden=32"), "--random-model needs layers"),
        (("--json", "nowhere/out.json"), "cannot write nowhere/out.json: there is no directory nowhere"),
    ],
)
def test_mistakes_are_one_line(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"decode_step: {message}")
