"""Running the command line in tests, with the demo model."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

from typer.testing import CliRunner, Result

from radixkv import Engine, demo_model
from radixkv.cli.app import app

SMALL = ("--kv-cache-tokens", "2048", "--attention-backend", "torch")  # nothing to compile
PREAMBLE = "First Citizen: Before we proceed any further, hear me speak. All: Speak, speak. "
TEXTS = [PREAMBLE + "First Citizen: You are all", PREAMBLE + "ROMEO: But soft, what", "JULIET:"]


def run(*arguments: object, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin, prog_name="radixkv")


def assert_one_line_error(result: Result, message: str) -> None:
    assert result.exit_code == 2
    assert result.stderr.startswith("radixkv: error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


def small_engine() -> Engine:
    """What `SMALL` asks for."""
    return Engine.from_pretrained("demo", kv_cache_tokens=2048, attention_backend="torch")


def write_lines(path: Path, lines: Iterable[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def demo_copy(directory: Path, *, without: Iterable[str]) -> Path:
    """The demo model in a directory, without some of its files."""
    directory.mkdir()
    for file in demo_model.path().iterdir():
        if file.is_file() and file.name not in without:
            (directory / file.name).symlink_to(file)
    return directory


class FakeTerminal(io.StringIO):
    """What is written to a terminal."""

    def isatty(self) -> bool:
        return True
