"""bench/streaming.py: a text beyond the window and a few tokens beyond it, on the demo model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from radixkv_bench.streaming import command as streaming


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["streaming", *arguments])
    return streaming.main()


def test_reads_and_writes_beyond_the_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"--json": tmp_path / "out.json", "--plot": tmp_path / "out.png"}
    options = [str(part) for option in files.items() for part in option]
    sizes = ["--window", "64", "--tokens", "450", "--everything", "400", "--generate", "40"]
    assert command(monkeypatch, *sizes, *options) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "4 sinks + window 60" in shown
    assert "40 tokens generated in one request. KV: 1.18 MB from the first to the last" in shown
    figures = json.loads(files["--json"].read_text())
    everything, window, sinks = figures["readings"]
    assert [reading["num_tokens"] for reading in (everything, window, sinks)] == [400, 451, 451]
    assert window["pool_bytes"] <= sinks["pool_bytes"] < everything["pool_bytes"] * 1.1
    assert sinks["perplexity"] == pytest.approx(window["perplexity"], rel=0.2)
    assert len(figures["writing"]["seconds"]) == 10
    assert figures["writing"]["window_pages"] <= figures["writing"]["pool_pages"]
    assert files["--plot"].stat().st_size > 1000


def test_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("ROMEO:")
    mistakes = {
        ("--window", "8", "--sinks", "8"): "--sinks 8 leave nothing of --window 8",
        (str(tmp_path / "none.txt"),): "none.txt",
        (str(tmp_path / "short.txt"),): "give a longer text",
        ("--window", "9000"): "window=9000 and sinks=0 are more than the 4096 tokens",
        ("--plot", str(tmp_path / "x.doc")): "must name an image format",
    }
    for arguments, message in mistakes.items():
        assert command(monkeypatch, *arguments, "--everything", "0") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
