"""Servers in processes of their own on free ports of this machine, each ended by its own handle."""

from __future__ import annotations

import importlib.util
import os
import re
import urllib.error
import urllib.request
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import radixkv_bench
from radixkv_bench.common.errors import BaselineError
from radixkv_bench.common.server_processes import HOST, RADIXKV, free_port, printed, running_process, wait_for
from radixkv_bench.serving.client import Address

BENCH = Path(radixkv_bench.__file__).resolve().parents[1]
TRANSFORMERS = ("-c", "from transformers.cli.transformers import app; app()")
TRANSFORMERS_NEEDS = ("accelerate", "fastapi", "uvicorn", "openai", "pydantic")

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
    with running_process(command, _environment()) as (process, log):
        found = wait_for(process, log, lambda: re.search(rb"http://([\d.]+):(\d+)", printed(log)))
        yield RunningServer(process.pid, Address(found[1].decode(), int(found[2])))


@contextmanager
def transformers_server(model: Path, *options: str) -> Generator[RunningServer]:
    """`transformers serve` for a directory, with continuous batching, in float32 on the CPU."""
    address = Address(HOST, free_port())
    place = ("serve", str(model), "--host", HOST, "--port", str(address.port))
    how = ("--continuous-batching", "--device", "cpu", "--dtype", "float32")
    with running_process((*TRANSFORMERS, *place, *how, *options), _environment()) as (process, log):
        wait_for(process, log, lambda: True if _is_healthy(address) else None)
        yield RunningServer(process.pid, address)


def check_transformers() -> None:
    """Raises: BaselineError if a package that `transformers serve` needs is missing."""
    missing = [name for name in TRANSFORMERS_NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise BaselineError(f"`transformers serve` needs {', '.join(missing)}: pip install {' '.join(missing)}")


def _environment() -> Mapping[str, str]:
    path = os.pathsep.join(filter(None, (str(BENCH), os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def _is_healthy(address: Address) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
