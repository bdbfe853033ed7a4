"""Files that benches read and write; what cannot be read or written is a BenchError."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from radixkv_bench.common.errors import BenchError

HELD_OUT = Path(__file__).with_name("held_out.txt")
"""A part of the text that the demo model was trained on, kept from its training."""


def check_folder(path: Path | None) -> None:
    """Raises: BenchError if a file to be written has no directory."""
    if path is not None and not path.resolve().parent.is_dir():
        raise BenchError(f"cannot write {path}: there is no directory {path.parent}")


def write_json(figures: Any, path: Path) -> None:
    """Write `figures` as indented JSON. Raises: BenchError if the place cannot be written."""
    try:
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise BenchError(f"cannot write {path}: {error.strerror}") from None


def read_text(path: Path) -> str:
    """The UTF-8 text of a file. Raises: BenchError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"cannot read {path}: {error}") from None


def parse_numbers(option: str, text: str) -> tuple[int, ...]:
    """The different numbers of a comma-separated list, in ascending order. Raises: BenchError for anything else."""
    try:
        return tuple(sorted({int(number) for number in text.split(",")}))
    except ValueError:
        raise BenchError(f"{option} must be numbers, comma-separated, not {text!r}") from None
