"""The command that every bench is: its files, exit codes and one-line errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import pytest
import typer
from rich.console import Console

from radixkv_bench.common.command import Outcome, command
from radixkv_bench.common.errors import BenchError

ROOT = Path(__file__).resolve().parents[1]


@command("count", plots=False)
def count(number: Annotated[int, typer.Option(min=1)] = 1, wrong: bool = False) -> Outcome:
    """Count."""
    if number == 13:
        raise BenchError("--number must not be 13")
    return Outcome({"number": number}, lambda console: console.print(f"counted {number}"), None, ["lost"] * wrong)


@command("draw")
def draw() -> Outcome:
    """Draw."""

    def write(path: Path) -> None:
        path.write_bytes(b"image")

    def show(console: Console) -> None:
        console.print("drawn")

    return Outcome({}, show, write)


def test_figures_are_printed_written_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["count", "--number", "3", "--json", str(file)])
    assert count() == 0
    assert json.loads(file.read_text()) == {"number": 3}
    assert capsys.readouterr() == ("counted 3\n", f"wrote {file}\n")


def test_the_picture_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = tmp_path / "out.png"
    monkeypatch.setattr(sys, "argv", ["draw", "--plot", str(picture)])
    assert draw() == 0
    assert picture.read_bytes() == b"image"


def test_a_wrong_result_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["count", "--wrong"])
    assert count() == 1
    assert capsys.readouterr() == ("counted 1\n", "lost\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--number", "13"], "--number must not be 13"),
        (["--number", "0"], "--number must be at least 1, not 0"),
        (["--number", "many"], "--number must be a whole number, not many"),
        (["--json", "no/such/dir/x"], "cannot write no/such/dir/x: there is no directory no/such/dir"),
        (["--plot", "x.png"], "No such option: --plot"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_printed(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["count", *arguments])
    assert count() == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("count: ")
    assert message in line


def test_the_root_is_not_where_modules_are_looked_for() -> None:
    """There kernels/ would shadow Hugging Face's package of that name."""
    assert str(ROOT / "bench") in sys.path
    assert str(ROOT) not in sys.path
