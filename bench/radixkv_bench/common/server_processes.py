"""Servers in processes of their own: started, waited for until they answer, and each ended by its own handle."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, TypeVar

import psutil

from radixkv_bench.common.errors import BenchError

HOST = "127.0.0.1"
RADIXKV = ("-c", "from radixkv.cli import main; main()")
START_S = 400.0
END_S = 90.0
POLL_S = 0.1

T = TypeVar("T")
Process = tuple["subprocess.Popen[bytes]", IO[bytes]]


@contextmanager
def running_process(
    arguments: Sequence[str], environment: Mapping[str, str], *, ends_with_children: bool = False
) -> Generator[Process]:
    """A process of this Python, ended by SIGTERM, and what it prints; what is left then is killed.

    environment: goes before that of this process. ends_with_children: kill its children, too, if it left them.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
        )
        try:
            yield process, log
        finally:
            children = children_of(process.pid) if ends_with_children else []
            if process.poll() is None:
                process.terminate()
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            _, left = psutil.wait_procs(children, timeout=END_S / 3)
            for child in left:
                child.kill()


def children_of(pid: int) -> list[psutil.Process]:
    """All processes that a process has started, and they have, and that run."""
    return [child for child in psutil.Process(pid).children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]


def wait_for(process: subprocess.Popen[bytes], log: IO[bytes], look: Callable[[], T | None]) -> T:
    """What `look` finds once it finds something. Raises: BenchError if the process ends before, or takes too long."""
    ends_s = time.monotonic() + START_S
    while (found := look()) is None:
        if process.poll() is not None:
            lines = printed(log).decode(errors="replace").strip().splitlines()
            raise BenchError(f"a server did not start: {lines[-1] if lines else 'it printed nothing'}")
        if time.monotonic() > ends_s:
            raise BenchError(f"a server did not start within {START_S:.0f} s")
        time.sleep(POLL_S)
    return found


def printed(log: IO[bytes]) -> bytes:
    """What was printed so far. The process writes where its own handle, shared with this one, stands: so no seek."""
    return os.pread(log.fileno(), 1 << 20, 0)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
