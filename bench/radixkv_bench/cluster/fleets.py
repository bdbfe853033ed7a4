"""Replicas in processes of their own: under Ray Serve, or servers behind `radixkv route`."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import IO, Protocol, TypeVar

import psutil

from radixkv_bench.common.errors import BenchError
from radixkv_bench.serving.servers import HOST, RADIXKV

START_S = 400.0
END_S = 90.0
POLL_S = 0.1
REPLICA_TITLE = "ServeReplica:radixkv:replicas"

T = TypeVar("T")


class RunningFleet(Protocol):
    """Replicas behind one address."""

    address: str

    def kill_one(self) -> None:
        """End a replica by SIGKILL."""
        ...

    def add_one(self) -> None:
        """See to it that there is one more; it may take a while to start."""
        ...


@contextmanager
def ray_fleet(num_replicas: int, options: Sequence[str]) -> Generator[RunningFleet]:
    """`radixkv cluster up`. Ends all of Ray that it started."""
    port = free_port()
    command = ("cluster", "up", "demo", "--replicas", str(num_replicas), "--port", str(port), *options)
    with _process(command, ends_with_children=True) as (process, log):
        _wait(process, log, lambda: b"radixkv serves" in _content(log) or None)
        yield _RayFleet(f"http://127.0.0.1:{port}", process)


class _RayFleet:
    def __init__(self, address: str, process: subprocess.Popen[bytes]) -> None:
        self.address = address
        self._process = process

    def kill_one(self) -> None:
        titles = {child.pid: " ".join(child.cmdline()) for child in _children(self._process.pid)}
        pids = [pid for pid, title in titles.items() if REPLICA_TITLE in title or "#replicas#" in title]
        if not pids:
            raise BenchError(f"no process of a replica was found among {sorted(titles.values())}")
        os.kill(min(pids), signal.SIGKILL)

    def add_one(self) -> None:
        """Ray Serve does it itself, as soon as one is missing."""


@contextmanager
def routed_fleet(num_replicas: int, options: Sequence[str]) -> Generator[RunningFleet]:
    """`radixkv serve`, several times, behind `radixkv route`."""
    with ExitStack() as stack:
        servers = [_Served(stack, free_port(), options) for _ in range(num_replicas)]
        for server in servers:
            server.wait()
        port = free_port()
        addresses = [text for server in servers for text in ("--replica", f"http://127.0.0.1:{server.port}")]
        process, log = stack.enter_context(_process(("route", "--port", str(port), *addresses)))
        _wait(process, log, lambda: re.search(rb"routes to .* at", _content(log)))
        yield _RoutedFleet(f"http://127.0.0.1:{port}", servers)


class _RoutedFleet:
    def __init__(self, address: str, servers: list[_Served]) -> None:
        self.address, self._servers = address, servers

    def kill_one(self) -> None:
        self._servers[0].kill()

    def add_one(self) -> None:
        """A new process, at the address of the one that was killed."""
        self._servers[0].start()


class _Served:
    """A server that can be killed and started anew."""

    def __init__(self, stack: ExitStack, port: int, options: Sequence[str]) -> None:
        self.port, self._options, self._stack = port, options, stack
        self.start()

    def start(self) -> None:
        command = ("serve", "demo", "--port", str(self.port), "--kv-events", "tcp://127.0.0.1:0", *self._options)
        self._process, self._log = self._stack.enter_context(_process(command))

    def wait(self) -> None:
        _wait(self._process, self._log, lambda: b"curl" in _content(self._log) or None)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def _process(
    arguments: Sequence[str], *, ends_with_children: bool = False
) -> Generator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """A process of `radixkv`, and what it prints; it is ended by SIGTERM, and what is left then is killed."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-P", *RADIXKV, *arguments], stdout=log, stderr=log, env=environment
        )
        try:
            yield process, log
        finally:
            children = _children(process.pid) if ends_with_children else []
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


def free_port() -> int:
    """A port that nobody listens on, for a server that is to come back where it was."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _children(pid: int) -> list[psutil.Process]:
    return [child for child in psutil.Process(pid).children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]


def _wait(process: subprocess.Popen[bytes], log: IO[bytes], found: Callable[[], T | None]) -> T:
    """What is `found` in the log. Raises: BenchError if the process ends, or takes too long."""
    until = time.monotonic() + START_S
    while (result := found()) is None:
        if process.poll() is not None or time.monotonic() > until:
            raise BenchError(f"{process.args} did not start: {_content(log)[-2000:].decode(errors='replace')}")
        time.sleep(POLL_S)
    return result


def _content(log: IO[bytes]) -> bytes:
    return os.pread(log.fileno(), 1 << 20, 0)
