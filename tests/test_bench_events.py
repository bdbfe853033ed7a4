"""The benches of events: one small run of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from radixkv_bench.events import cost, index, losses


def run(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, Any]:
    file = tmp_path / "out.json"
    monkeypatch.setattr("sys.argv", ["bench", *arguments, "--json", str(file)])
    assert module.main() == 0
    figures: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return figures


def test_lookups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--replicas", "4", "--prompts", "6", "--prompt-tokens", "200", "--system-tokens", "64", "--rounds", "1"]
    figures = run(index, tmp_path, monkeypatch, *sizes)
    assert figures["lookups_per_s"] > 0
    assert "lookups a second" in capsys.readouterr().out


def test_lookups_of_conversations_that_nobody_can_hold_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "--holders", "65"])
    assert index.main() == 2
    assert "--holders must be at most --replicas" in capsys.readouterr().err


def losses_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, Any]:
    figures = run(losses, tmp_path, monkeypatch, *arguments)
    assert figures["is_equal"]
    assert figures["wrong_lookups"] == 0
    assert figures["lost_messages"] > 0
    assert figures["pages_compared"] > 100
    return figures


def test_the_index_equals_the_caches_after_losses_and_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = losses_of(tmp_path, monkeypatch, "--events", "2000", "--lost", "0.1", "--restarts", "1", "--pages", "128")
    assert (figures["consumer_restarts"], figures["publisher_restarts"]) == (1, 1)


@pytest.mark.stress
def test_the_index_equals_the_caches_after_many_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = losses_of(tmp_path, monkeypatch, "--events", "100000")
    assert (figures["consumer_restarts"], figures["publisher_restarts"]) == (10, 10)


def test_the_cost_of_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cost, "NUM_LARGE", 2)
    sizes = ["--batch", "2", "--prompt-tokens", "20", "--output-tokens", "3", "--rounds", "1"]
    figures = run(cost, tmp_path, monkeypatch, *sizes)
    assert {name: len(turns) for name, turns in figures["turns"].items()} == dict.fromkeys(
        ["off", "off again", "read", "stalled"], 1
    )
    assert "stalled" in capsys.readouterr().out
