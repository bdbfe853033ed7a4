"""Addresses of ZeroMQ sockets."""

from __future__ import annotations

import re

from radixkv.errors import ConfigError

MAX_PORT = 65535
_TCP = re.compile(r"tcp://(?P<host>\[[0-9A-Fa-f:.]+\]|\*|[^\s:/*]+):(?P<port>\d+)")


def check_endpoint(name: str, value: str) -> None:
    """Raises: ConfigError if `value` is no address that a socket can be bound to."""
    found = _TCP.fullmatch(value)
    if found is not None and int(found["port"]) <= MAX_PORT:
        return
    if value.startswith("ipc://") and len(value) > len("ipc://"):
        return
    raise ConfigError(f"{name} must be an address as tcp://127.0.0.1:5557 or ipc:///run/events, not {value!r}")


def replay_endpoint_of(endpoint: str) -> str:
    """Where replays are served if no setting says so: the next port, or a free one beside a free one.

    >>> replay_endpoint_of("tcp://*:5557"), replay_endpoint_of("tcp://*:0"), replay_endpoint_of("ipc:///run/events")
    ('tcp://*:5558', 'tcp://*:0', 'ipc:///run/events.replay')
    """
    found = _TCP.fullmatch(endpoint)
    if found is None:
        return f"{endpoint}.replay"
    port = int(found["port"])
    return f"tcp://{found['host']}:{port + 1 if port else 0}"


def is_local_endpoint(endpoint: str) -> bool:
    """Whether only this machine can reach it.

    >>> [is_local_endpoint(e) for e in ("tcp://127.0.0.1:1", "tcp://*:1", "ipc:///run/events")]
    [True, False, True]
    """
    found = _TCP.fullmatch(endpoint)
    return found is None or found["host"] in ("localhost", "[::1]") or found["host"].startswith("127.")
