"""bench/kv_quality.py: figures of quantised KV on a few tokens of the demo model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from radixkv_bench.quality import command as kv_quality


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["kv_quality", *arguments])
    return kv_quality.main()


def test_figures_of_each_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"--json": tmp_path / "out.json", "--plot": tmp_path / "out.png"}
    options = [str(part) for option in files.items() for part in option]
    forms = ["--kv-dtype", "int8", "--kv-dtype", "int4"]
    assert command(monkeypatch, *forms, "--window", "300", "--limit", "800", *options) == 0
    shown = capsys.readouterr().out
    assert "800 tokens." in shown
    assert "int8 ≤ 0.5 %: met" in shown.replace("\n", " ")
    exact, int8, int4 = json.loads(files["--json"].read_text())["rows"]
    assert (exact["kv_dtype"], exact["logit_error"], exact["greedy_agreement"]) == ("float32", 0, 1)
    assert 0 < int8["logit_error"] < int4["logit_error"] < 0.5
    assert 0.98 < int8["greedy_agreement"] <= 1
    assert abs(int8["perplexity_percent"]) < 0.5
    assert abs(int4["perplexity_percent"]) < 3
    assert (exact["bytes_per_token"], int8["bytes_per_token"], int4["bytes_per_token"]) == (3072, 816, 480)
    assert files["--plot"].stat().st_size > 1000


def test_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("")
    mistakes = {
        ("--kv-dtype", "int2"): "--kv-dtype must be one of int8, int4, fp8_e4m3, fp8_e5m2, fp4, not 'int2'",
        (str(tmp_path / "none.txt"),): "none.txt",
        (str(tmp_path / "empty.txt"),): "has 0 tokens; give a longer text",
        ("--plot", str(tmp_path / "x.doc")): "must name an image format",
    }
    for arguments, message in mistakes.items():
        assert command(monkeypatch, *arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
