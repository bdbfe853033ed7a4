"""The bench of states: one small run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from radixkv_bench.states import command


def test_prefills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    sizes = ["--random-model", "hidden=32,layers=2,vocab=200,recurrent=1", "--prompt-tokens", "20"]
    more = ["--interval-tokens", "8", "--rounds", "1", "--json", str(file)]
    monkeypatch.setattr("sys.argv", ["bench", *sizes, *more])
    assert command.main() == 0
    figures = json.loads(file.read_text(encoding="utf-8"))
    assert figures["states_used"] == 3  # after 8, 16 and 20
    assert set(figures["speed"]) == {"kept", "none kept, again", "none kept, in steps of the interval"}
    assert figures["speed_in_equal_steps"] > 0
    assert "a state at each 8 and at the end: 3 of" in capsys.readouterr().out


def test_a_model_without_states(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "--random-model", "hidden=32,layers=1,vocab=200", "--rounds", "1"])
    assert command.main() == 2
    assert "has no recurrent layers" in capsys.readouterr().err
