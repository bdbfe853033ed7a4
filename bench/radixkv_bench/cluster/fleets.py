"""Replicas in processes of their own: under Ray Serve, or servers behind `radixkv route`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol

from radixkv_bench.common.errors import BenchError
from radixkv_bench.common.server_processes import RADIXKV, children_of, free_port, printed, running_process, wait_for

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
REPLICA_TITLE = "ServeReplica:radixkv:replicas"


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
    command = ("-P", *RADIXKV, "cluster", "up", "demo", "--replicas", str(num_replicas), "--port", str(port), *options)
    with running_process(command, ENVIRONMENT, ends_with_children=True) as (process, log):
        wait_for(process, log, lambda: b"radixkv serves" in printed(log) or None)
        yield _RayFleet(f"http://127.0.0.1:{port}", process)


class _RayFleet:
    def __init__(self, address: str, process: subprocess.Popen[bytes]) -> None:
        self.address = address
        self._process = process

    def kill_one(self) -> None:
        titles = {child.pid: " ".join(child.cmdline()) for child in children_of(self._process.pid)}
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
        process, log = stack.enter_context(
            running_process(("-P", *RADIXKV, "route", "--port", str(port), *addresses), ENVIRONMENT)
        )
        wait_for(process, log, lambda: re.search(rb"routes to .* at", printed(log)))
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
        command = (
            "-P",
            *RADIXKV,
            "serve",
            "demo",
            "--port",
            str(self.port),
            "--kv-events",
            "tcp://127.0.0.1:0",
            *self._options,
        )
        self._process, self._log = self._stack.enter_context(running_process(command, ENVIRONMENT))

    def wait(self) -> None:
        wait_for(self._process, self._log, lambda: b"curl" in printed(self._log) or None)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
