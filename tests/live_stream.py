"""The live page's feed, read as the page reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from http_server import Running


class LiveReader:
    """What a page knows after the events that it has read."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self.nodes: dict[int, list[Any]] = {}
        self.state: dict[str, Any] = {}
        self.raw = ""

    def read(self) -> dict[str, Any]:
        """The next state, once its nodes are known, too."""
        name = "message"
        for line in self._lines:
            self.raw += line + "\n"
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                data = json.loads(line.removeprefix("data: "))
                assert name in ("nodes", "state"), line
                if name == "nodes":
                    self.nodes.update({row[0]: row for row in data["nodes"]})
                    continue
                for number in data["gone"]:
                    del self.nodes[number]
                self.state = data
                return data
        raise AssertionError("the stream has ended")

    def texts(self) -> list[str]:
        """Those of all nodes that have one."""
        return [row[8] for row in self.nodes.values() if row[1] is not None and row[8] is not None]

    def roots(self) -> list[str]:
        """Names of the namespaces."""
        return sorted(row[8] for row in self.nodes.values() if row[1] is None)


@contextmanager
def live(server: Running, key: str | None = None, **headers: str) -> Iterator[LiveReader]:
    """A reader of the feed."""
    with server.http(key).stream("GET", "/v1/cache/live", headers=headers) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield LiveReader(answer.iter_lines())
