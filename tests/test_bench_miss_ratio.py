"""bench/miss_ratio.py: the estimate against replays, on a small trace."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from radixkv_bench.tree import miss_ratio


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Conversations that come back at random, each time a little longer."""
    rng = np.random.default_rng(1)
    chats = [rng.integers(0, 1000, 64).tolist() for _ in range(40)]
    lines = []
    for chat in rng.integers(0, len(chats), 400):
        chats[chat] += rng.integers(0, 1000, 48).tolist()
        lines.append(json.dumps({"token_ids": chats[chat]}))
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(lines))
    return path


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["miss_ratio", *arguments])
    return miss_ratio.main()


def test_estimates_come_close(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    assert command(monkeypatch, str(trace), "--capacity-tokens", "4000,16000", "--json", str(out)) == 0
    small, large = json.loads(out.read_text())["rows"]
    assert 0 < small["replayed"] < large["replayed"] < 1
    assert max(small["error_points"], large["error_points"]) < 4  # leaves of whole prompts, in so small a cache
    assert "target ≤ 2" in capsys.readouterr().out


def test_mistakes_are_one_line(
    trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, str(trace), "--capacity-tokens", "4000,x") == 2
    assert command(monkeypatch, str(trace.with_name("none.jsonl"))) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "not '4000,x'" in first
    assert "none.jsonl" in second
