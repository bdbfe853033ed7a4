"""bench/tiers_store.py: small stores, written and read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from radixkv_bench.tiers_store import command as tiers_store


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["tiers_store", *map(str, arguments)])
    return tiers_store.main()


def test_a_store_is_measured_against_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.json"
    sizes = ["--page-kib", "16,64", "--total-mib", 1, "--batch-mib", 1, "--rounds", 2]
    assert command(monkeypatch, *sizes, "--folder", tmp_path, "--json", file) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "64 KiB warm read" in shown
    assert "16 KiB: 64 pages opened in" in shown
    small, large = json.loads(file.read_text())["store"]
    assert (small["pages"], large["pages"]) == (64, 16)
    assert set(small["ratios"]) == {"write", "cold read", "warm read"}
    assert all(ratio > 0 for ratio in small["ratios"].values())
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_a_mistake_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for size in ("0", "192,x"):
        assert command(monkeypatch, "--page-kib", size) == 2
        assert "--page-kib must be whole numbers of at least 1" in capsys.readouterr().err
