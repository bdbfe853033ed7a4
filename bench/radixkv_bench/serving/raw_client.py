"""A client for many streams at once that only notes what comes, and when: it takes next to nothing from the server.

Client and server share the processor, and the server is to be measured. So nothing is read into an answer before all
of them have ended, but for the beginning of each, until its first text has come; and from there on the client is woken
for many events at a time, and at the end.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Sequence

from radixkv_bench.common.errors import BenchError
from radixkv_bench.serving.client import Address, Body, Reply, parsed_event, reply_of, request_bytes, text_of

RECEIVED_BYTES = 1 << 16  # at a time, at most
WOKEN_BYTES = 1 << 14  # that come between the first text and the end before the client is woken
SILENT_S = 120.0  # until streams that send nothing count as broken


class _Stream:
    """A connection with a stream on it, and what came of it."""

    def __init__(self, address: Address, path: str, body: Body) -> None:
        try:
            self.socket = socket.create_connection((address.host, address.port))
        except OSError as error:
            raise BenchError(f"{address} takes no connection: {error}") from error
        self._what = f"{address}{path}"
        self._received: list[bytes] = []
        self.sent_s = time.perf_counter()
        self.socket.sendall(request_bytes(address, path, body))
        self.socket.setblocking(False)
        self.first_s: float | None = None
        self.last_s = self.sent_s

    def receive(self) -> bool:
        """Take what has come; False at the end."""
        data = self.socket.recv(RECEIVED_BYTES)
        if not data:
            self.socket.close()
            return False
        self._received.append(data)
        self.last_s = time.perf_counter()
        if self.first_s is None and any(map(text_of, map(parsed_event, self._events()))):
            self.first_s = self.last_s
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, WOKEN_BYTES)
        return True

    def reply(self) -> Reply:
        """The answer as a whole. Raises: BenchError."""
        events = [parsed_event(data) for data in self._events()]
        return reply_of(events, self.sent_s, self.first_s, self.last_s, self._what)

    def _events(self) -> list[bytes]:
        """The data of the events so far. Raises: BenchError for another status than 200."""
        head, _, rest = b"".join(self._received).partition(b"\r\n\r\n")
        status = head.split(b"\r\n", 1)[0]
        if b" 200" not in status:
            raise BenchError(f"{self._what} was answered {status.decode()}: {rest[:2000].decode(errors='replace')}")
        whole = b"".join(_chunks(rest)).split(b"\n\n")[:-1]
        return [event.removeprefix(b"data: ") for event in whole if event.startswith(b"data: ")]  # others: comments


def stream_all(address: Address, path: str, bodies: Sequence[Body]) -> list[Reply]:
    """Send all requests with `stream`, read all answers at once, and then look into them. Raises: BenchError."""
    streams = [_Stream(address, path, body) for body in bodies]
    with selectors.DefaultSelector() as selector:
        for stream in streams:
            selector.register(stream.socket, selectors.EVENT_READ, stream)
        while selector.get_map():
            ready = selector.select(SILENT_S)
            if not ready:
                raise BenchError(f"{address}{path} has sent nothing for {SILENT_S:.0f} s")
            for key, _ in ready:
                if not key.data.receive():
                    selector.unregister(key.fileobj)
    return [stream.reply() for stream in streams]


def _chunks(body: bytes) -> list[bytes]:
    """The chunks of a body that have come as a whole.

    >>> _chunks(b"3\\r\\nabc\\r\\n1\\r\\nd\\r\\n2\\r\\ne")
    [b'abc', b'd']
    """
    chunks: list[bytes] = []
    place = 0
    while (end := body.find(b"\r\n", place)) >= 0:
        first, last = end + 2, end + 2 + int(body[place:end], 16)
        if len(body) < last + 2:
            break
        chunks.append(body[first:last])
        place = last + 2
    return chunks
