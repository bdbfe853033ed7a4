"""A Redis or Valkey server of the system, started on a free port of the loopback."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SERVER = shutil.which("valkey-server") or shutil.which("redis-server")
NO_SERVER = "neither valkey-server nor redis-server is on the PATH"


class RunningRedis:
    """A server process."""

    def __init__(self, folder: Path, port: int, *options: str) -> None:
        self.port = port
        self.url = f"redis://127.0.0.1:{port}/0"
        self._folder, self._options = folder, options
        self.start()

    def start(self) -> None:
        """Start it, and wait until it says that it is ready."""
        assert SERVER is not None
        command = [SERVER, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self._folder)]
        self.process = subprocess.Popen([*command, *self._options], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        said = []
        for line in self.process.stdout:
            said.append(line)
            if "eady to accept connections" in line:
                return
        self.stop()
        raise OSError("".join(said))

    def client(self) -> Any:
        """A client of one's own."""
        import redis

        return redis.Redis(port=self.port)

    def hang(self) -> None:
        """Let it answer no more."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Undo `hang`."""
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """End it, as a crash does."""
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


@contextmanager
def running_redis(folder: Path, *options: str) -> Iterator[RunningRedis]:
    """A server that ends with the block."""
    for attempt in range(5):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        try:
            server = RunningRedis(folder, port, *options)
            break
        except OSError:  # another process took the port
            if attempt == 4:
                raise
    try:
        yield server
    finally:
        server.go_on()
        server.stop()
