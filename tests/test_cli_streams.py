"""The command line where stdout is ASCII, the disk is full, or Ctrl-C comes early: no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN = "from radixkv.cli import main; main()"
INTERRUPTED_IMPORT = """
import sys
class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name == "radixkv.cli.app":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupts())
"""


def radixkv(
    *arguments: str, code: str = RUN, stdout: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    with open(stdout or os.devnull, "w") as file:
        return subprocess.run(
            [sys.executable, "-c", code, *arguments],
            stdout=file if stdout else subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, **environment},
            check=False,
        )


def test_what_an_ascii_stdout_lacks_is_escaped() -> None:
    result = radixkv("replay", "--help", PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stderr) == (0, "")
    assert "\\u" in result.stdout
    assert result.stdout.isascii()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [("size", "--help"), ("--version",)])
def test_a_full_disk_is_one_line(arguments: tuple[str, ...]) -> None:
    result = radixkv(*arguments, stdout="/dev/full")
    assert result.returncode == 2
    assert result.stderr == "radixkv: error: the output cannot be written: No space left on device\n"


def test_ctrl_c_during_imports_leaves_no_traceback() -> None:
    result = radixkv("--version", code=INTERRUPTED_IMPORT + RUN)
    assert (result.returncode, result.stderr) == (130, "")


def test_the_package_loads_nothing_heavy_before_the_command_line_can_catch_ctrl_c() -> None:
    result = radixkv(
        code="import radixkv.cli, sys; print([m for m in ('numpy', 'typer', 'torch') if m in sys.modules])"
    )
    assert result.stdout == "[]\n"
