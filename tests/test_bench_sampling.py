"""bench/sampling.py: one small run of everything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from radixkv_bench.sampling import command


def test_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sampling.json"
    sizes = ["--rows", "5", "--vocab-size", "300", "--prompt-tokens", "9", "--output-tokens", "4", "--rounds", "2"]
    monkeypatch.setattr("sys.argv", ["sampling", *sizes, "--json", str(file)])
    assert command.main() == 0
    choices = json.loads(file.read_text(encoding="utf-8"))["choices"]
    assert [(one["asked"], one["rows_asking"]) for one in choices] == [
        ("alone", 0),
        ("nothing", 0),
        *((name, asking) for name in list(command.ASKED)[1:] for asking in (5, 2)),
    ]
    assert choices[0]["times_alone"] == 1
    assert "5 rows of 300 logits" in capsys.readouterr().out
