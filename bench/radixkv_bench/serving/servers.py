"""Servers in processes of their own on free ports of this machine, each ended by its own handle."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import radixkv_bench
from radixkv_bench.common.errors import BaselineError, BenchError
from radixkv_bench.serving.client import Address

START_S = 300.0
END_S = 60.0
HOST = "127.0.0.1"
BENCH = Path(radixkv_bench.__file__).resolve().parents[1]
RADIXKV = ("-c", "from radixkv.cli import main; main()")
TRANSFORMERS = ("-c", "from transformers.cli.transformers import app; app()")
TRANSFORMERS_NEEDS = ("accelerate", "fastapi", "uvicorn", "openai", "pydantic")
POLL_S = 0.1

T = TypeVar("T")
Settings = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RunningServer:
    """Where a server listens, and the number of its process."""

    pid: int
    address: Address


@contextmanager
def radixkv_server(model: str, settings: Settings, *, profile: Sequence[str] = ()) -> Generator[RunningServer]:
    """`radixkv serve` for `model`; `settings` are its flags by name.

    profile: the arguments of `profiled`, to run under a profiler.
    """
    options = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    start = RADIXKV if not profile else ("-m", "radixkv_bench.serving.profiled", *profile)
    command = (*start, "serve", model, "--host", HOST, "--port", "0", *options)
    with _process(command) as (process, log):
        found = _wait(process, log, lambda: re.search(rb"http://([\d.]+):(\d+)", _content(log)))
        yield RunningServer(process.pid, Address(found[1].decode(), int(found[2])))


@contextmanager
def transformers_server(model: Path, *options: str) -> Generator[RunningServer]:
    """`transformers serve` for a directory, with continuous batching, in float32 on the CPU."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        address = Address(HOST, free.getsockname()[1])
    place = ("serve", str(model), "--host", HOST, "--port", str(address.port))
    how = ("--continuous-batching", "--device", "cpu", "--dtype", "float32")
    with _process((*TRANSFORMERS, *place, *how, *options)) as (process, log):
        _wait(process, log, lambda: True if _is_healthy(address) else None)
        yield RunningServer(process.pid, address)


def check_transformers() -> None:
    """Raises: BaselineError if a package that `transformers serve` needs is missing."""
    missing = [name for name in TRANSFORMERS_NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise BaselineError(f"`transformers serve` needs {', '.join(missing)}: pip install {' '.join(missing)}")


@contextmanager
def _process(arguments: Sequence[str]) -> Generator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """A process of this Python, ended by SIGTERM, and what it prints."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([sys.executable, *arguments], stdout=log, stderr=log, env=_environment())
        try:
            yield process, log
        finally:
            process.terminate()
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _environment() -> Mapping[str, str]:
    path = os.pathsep.join(filter(None, (str(BENCH), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}


def _wait(process: subprocess.Popen[bytes], log: IO[bytes], look: Callable[[], T | None]) -> T:
    """What `look` finds once it finds something. Raises: BenchError if the process ends before, or takes too long."""
    ends_s = time.monotonic() + START_S
    while (found := look()) is None:
        if process.poll() is not None:
            lines = _content(log).decode(errors="replace").strip().splitlines()
            raise BenchError(f"a server did not start: {lines[-1] if lines else 'it printed nothing'}")
        if time.monotonic() > ends_s:
            raise BenchError(f"a server did not start within {START_S:.0f} s")
        time.sleep(POLL_S)
    return found


def _content(log: IO[bytes]) -> bytes:
    """What was printed so far. The process writes where its own handle, shared with this one, stands: so no seek."""
    return os.pread(log.fileno(), 1 << 20, 0)


def _is_healthy(address: Address) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
