"""bench/tiers.py on the demo model, with few tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from radixkv_bench.common.redis_server import NO_SERVER, SERVER
from radixkv_bench.tiers import command as tiers


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["tiers", *arguments])
    return tiers.main()


def test_cases_give_their_ratios(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--prompt-tokens", "96", "--sessions", "3", "--turns", "2", "--turn-tokens", "32", "--new-tokens", "4"]
    assert (
        command(
            monkeypatch, *sizes, "--cases", "restart,working-set", "--rounds", "1", "--json", str(tmp_path / "out.json")
        )
        == 0
    )
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert list(found) == ["restart", "working-set"]
    assert "loaded / found" in " ".join(shown.split())
    assert found["restart"]["loaded / computed"] > 0
    rates = {name: value for name, value in found["working-set"].items() if name.startswith("hit rate")}
    assert rates["hit rate, small with disk"] > 0


def test_an_unknown_case_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, "--cases", "restart,nothing") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "unknown case 'nothing'; the cases are restart, killed, working-set, idle-cost, throttled, shared" in line


FEW = ["--prompt-tokens", "96", "--sessions", "2", "--rounds", "1"]


@pytest.mark.skipif(SERVER is None, reason=NO_SERVER)
def test_a_second_engine_on_the_same_server_computes_next_to_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(monkeypatch, *FEW, "--cases", "shared", "--json", str(tmp_path / "out.json")) == 0
    found = json.loads((tmp_path / "out.json").read_text())["cases"]["shared"]
    assert 0 < found["computed by the second / by the first"] <= 2 / 96


@pytest.mark.stress
def test_a_killed_engines_prompt_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command(monkeypatch, *FEW, "--cases", "killed", "--json", str(tmp_path / "out.json")) == 0
    assert json.loads((tmp_path / "out.json").read_text())["cases"]["killed"]["loaded / computed"] > 0
