"""bench/tiers.py: small stores, written and read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from radixkv_bench.tiers import command as tiers


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["tiers", *map(str, arguments)])
    return tiers.main()


def test_a_store_is_measured_against_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.json"
    sizes = ["--page-kib", "16,64", "--total-mib", 1, "--batch-mib", 1, "--rounds", 2, "--cases", "store"]
    assert command(monkeypatch, *sizes, "--folder", tmp_path, "--json", file) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "64 KiB warm read" in shown
    assert "16 KiB: 64 pages opened in" in shown
    small, large = json.loads(file.read_text())["store"]
    assert (small["pages"], large["pages"]) == (64, 16)
    assert set(small["ratios"]) == {"write", "cold read", "warm read"}
    assert all(ratio > 0 for ratio in small["ratios"].values())
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cases", "stores"), "--cases must be of store, not stores"),
        (("--page-kib", "0"), "--page-kib must be whole"),
    ],
)
def test_mistakes_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, str], message: str
) -> None:
    assert command(monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err
