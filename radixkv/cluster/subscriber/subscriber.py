"""Listens to the sockets of several replicas."""

from __future__ import annotations

import logging
import queue
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple, Self

from radixkv.cluster.index.lower_index import LowerIndex
from radixkv.cluster.index.replica_index import ReplicaIndex
from radixkv.cluster.subscriber.index_sink import IndexSink
from radixkv.cluster.subscriber.stream_state import AnswerEnd, Message, StreamState
from radixkv.config.endpoints import check_endpoint
from radixkv.publish import wire
from radixkv.publish.requirements import PACKAGES

logger = logging.getLogger(__name__)

PROBE_S = 1.0
ANSWER_S = 5.0
MAX_AT_ONCE = 256  # messages of one replica, before others have their turn
MAX_UNREAD = 10_000
CLOSE_S = 5.0


class StreamStats(NamedTuple):
    """What became of the messages of one replica: see `StreamState`."""

    epoch: int | None
    next_seq: int
    is_current: bool
    num_gaps: int
    num_restarts: int
    num_snapshots: int


class _Request:
    """A question to the ROUTER socket of a replica, on a socket of its own, so that no answer meets another's."""

    def __init__(self, asked: Any, *, is_snapshot: bool, until: float) -> None:
        self.socket, self.is_snapshot, self.until = asked, is_snapshot, until
        self.parts: list[Message] = []


class _Replica:
    """The sockets of one replica, and where its messages stand."""

    def __init__(self, name: str, live: Any, replay_endpoint: str, state: StreamState) -> None:
        self.name, self.live, self.replay_endpoint, self.state = name, live, replay_endpoint, state
        self.request: _Request | None = None
        self.probe_at = 0.0


class KVEventSubscriber:
    """Feeds a `ReplicaIndex` from the events of replicas, in a thread of its own; and a `LowerIndex`, if there is one.

    It begins with a snapshot, fills gaps by replay, and takes a snapshot again where a replay cannot help: the replica
    began anew, does not keep the messages any more, or something does not fit. A replica that is silent is asked every
    `probe_s` whether a message was lost.

    Hold `lock` while you use an index: the thread writes under it, one message at a time.
    """

    def __init__(
        self,
        index: ReplicaIndex,
        *,
        lower: LowerIndex | None = None,
        probe_s: float = PROBE_S,
        answer_s: float = ANSWER_S,
    ) -> None:
        """lower: takes in what replicas hold below their pools; else that is left out.
        answer_s: a replica that sends no part of an answer for so long is asked anew.

        Raises: MissingPackageError.
        """
        self._zmq = PACKAGES.module("zmq")
        PACKAGES.module("msgpack")
        self.index, self.lower, self.lock = index, lower, threading.Lock()
        self._probe_s, self._answer_s = probe_s, answer_s
        self._replicas: dict[str, _Replica] = {}
        self._stats: dict[str, StreamStats] = {}
        self._news = threading.Condition()
        self._commands: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._wakers = socket.socketpair()
        self._wakers[0].setblocking(False)
        self._closing = False
        self._context = self._zmq.Context()
        self._poller = self._zmq.Poller()
        self._poller.register(self._wakers[1], self._zmq.POLLIN)
        self._thread = threading.Thread(target=self._run, name="radixkv-subscriber", daemon=True)
        self._thread.start()

    # -- for all threads ---------------------------------------------------------------------------------------------

    def add_replica(self, name: str, endpoint: str, replay_endpoint: str, topic: str = "") -> None:
        """Listen to a replica, from now on. One with the same name is forgotten. Raises: ConfigError.

        The addresses are those that the replica says (`EventSources`), with its host where they have none.
        """
        check_endpoint("endpoint", endpoint)
        check_endpoint("replay_endpoint", replay_endpoint)
        self._do(lambda: self._add(name, endpoint, replay_endpoint, topic))

    def remove_replica(self, name: str) -> None:
        """Listen to a replica no more, and forget what it holds."""
        self._do(lambda: self._remove(name))

    def stats(self) -> dict[str, StreamStats]:
        """How far the messages of each replica were followed. The index may be a message ahead."""
        with self._news:
            return dict(self._stats)

    def wait_for(self, is_so: Callable[[dict[str, StreamStats]], bool], timeout_s: float) -> bool:
        """Wait until `is_so` of the `stats`. Returns: False if that took too long."""
        with self._news:
            return self._news.wait_for(lambda: is_so(self._stats), timeout_s)

    def close(self) -> None:
        """End the thread; the index stays as it is. Idempotent."""
        self._closing = True
        self._wake()
        self._thread.join(CLOSE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closing:
                ready = {where for where, _ in self._poller.poll(1000 * self._wait_s())}
                if self._wakers[1].fileno() in ready:
                    self._wakers[1].recv(4096)
                    while not self._commands.empty():
                        self._commands.get()()
                for replica in list(self._replicas.values()):
                    self._serve(replica, ready)
        except Exception:
            logger.exception("the events of replicas are followed no more")
        finally:
            self._context.destroy(linger=0)
            for waker in self._wakers:
                waker.close()

    def _wait_s(self) -> float:
        now, times = time.monotonic(), [self._probe_s]
        for replica in self._replicas.values():
            times.append((replica.probe_at if replica.request is None else replica.request.until) - now)
            if replica.live.getsockopt(self._zmq.EVENTS) & self._zmq.POLLIN:
                return 0.0
        return max(0.0, min(times))

    def _serve(self, replica: _Replica, ready: set[Any]) -> None:
        now, state = time.monotonic(), replica.state
        request = replica.request
        if request is not None and request.socket in ready:
            self._read_answer(replica, request, now)
        if self._read_live(replica):
            replica.probe_at = now + self._probe_s
        if replica.request is not None and now >= replica.request.until:
            self._end_request(replica)
            replica.probe_at = now
        if replica.request is None:
            if state.wants_snapshot and now >= replica.probe_at:
                self._ask(replica, wire.SNAPSHOT_REQUEST, now)
            elif state.wants_replay or (not state.wants_snapshot and now >= replica.probe_at):
                self._ask(replica, wire.pack_seq(state.next_seq), now)
        self._note(replica)

    def _read_live(self, replica: _Replica) -> bool:
        """Take messages that came. Returns: whether there were any."""
        num_read, wanted_snapshot = 0, replica.state.wants_snapshot
        while num_read < MAX_AT_ONCE and replica.live.poll(0):
            frames = replica.live.recv_multipart()
            num_read += 1
            if len(frames) == 3 and len(frames[1]) == wire.SEQ_BYTES:
                self._take(replica, frames[1], frames[2])
        if replica.state.wants_snapshot and not wanted_snapshot:
            replica.probe_at = 0.0  # ask at once
            return False
        return num_read > 0 and not wanted_snapshot

    def _take(self, replica: _Replica, seq: bytes, payload: bytes) -> None:
        message = _message(seq, payload)
        if message is not None and message.events:
            replica.state.message(message)

    def _read_answer(self, replica: _Replica, request: _Request, now: float) -> None:
        while request.socket.poll(0):
            match request.socket.recv_multipart():
                case [b"", b"", wire.END_SEQ, info]:
                    self._end_answer(replica, request, info)
                    return
                case [b"", _, seq, payload]:
                    if (message := _message(seq, payload)) is not None:
                        request.parts.append(message)
        request.until = now + self._answer_s

    def _end_answer(self, replica: _Replica, request: _Request, info: bytes) -> None:
        self._end_request(replica)
        try:
            said = wire.unpack(info)
            end, num_parts = AnswerEnd(said["epoch"], said["next_seq"], said["is_complete"]), said["num_parts"]
        except Exception:  # msgpack has errors of many kinds
            logger.warning("an answer of %s cannot be read", replica.name, exc_info=True)
            replica.probe_at = self._next_probe()
            return
        if not request.is_snapshot:
            replica.state.replayed(request.parts, end)
        elif len(request.parts) == num_parts:
            replica.state.snapshot([part.events for part in request.parts], end)
        replica.probe_at = 0.0 if replica.state.wants_snapshot and not request.is_snapshot else self._next_probe()

    def _next_probe(self) -> float:
        return time.monotonic() + self._probe_s

    def _ask(self, replica: _Replica, body: bytes, now: float) -> None:
        asked = self._context.socket(self._zmq.DEALER)
        asked.setsockopt(self._zmq.LINGER, 0)
        asked.setsockopt(self._zmq.RCVHWM, 0)
        asked.connect(replica.replay_endpoint)
        asked.send_multipart([b"", body])
        replica.request = _Request(asked, is_snapshot=body == wire.SNAPSHOT_REQUEST, until=now + self._answer_s)
        self._poller.register(asked, self._zmq.POLLIN)

    def _end_request(self, replica: _Replica) -> None:
        if replica.request is not None:
            self._poller.unregister(replica.request.socket)
            replica.request.socket.close()
            replica.request = None

    def _note(self, replica: _Replica) -> None:
        state = replica.state
        stats = StreamStats(
            state.epoch, state.next_seq, state.is_current, state.num_gaps, state.num_restarts, state.num_snapshots
        )
        with self._news:
            if self._stats.get(replica.name) != stats:
                self._stats[replica.name] = stats
                self._news.notify_all()

    def _add(self, name: str, endpoint: str, replay_endpoint: str, topic: str) -> None:
        self._remove(name)
        live = self._context.socket(self._zmq.SUB)
        live.setsockopt(self._zmq.RCVHWM, MAX_UNREAD)
        live.setsockopt(self._zmq.SUBSCRIBE, topic.encode())
        live.connect(endpoint)
        self._poller.register(live, self._zmq.POLLIN)
        state = StreamState(IndexSink(self.index, self.lock, name, self.lower))
        self._replicas[name] = _Replica(name, live, replay_endpoint, state)

    def _remove(self, name: str) -> None:
        replica = self._replicas.pop(name, None)
        if replica is None:
            return
        self._end_request(replica)
        self._poller.unregister(replica.live)
        replica.live.close(linger=0)
        with self.lock:
            self.index.drop_replica(name)
            if self.lower is not None:
                self.lower.drop_replica(name)
        with self._news:
            del self._stats[name]
            self._news.notify_all()

    def _do(self, command: Callable[[], object]) -> None:
        self._commands.put(command)
        self._wake()

    def _wake(self) -> None:
        try:
            self._wakers[0].send(b"\0")
        except OSError:  # it is full, and wakes the thread already; or it was closed, and there is no thread
            return


def _message(seq: bytes, payload: bytes) -> Message | None:
    """A message, or None if it cannot be read: it is missing then, and asked for."""
    try:
        _, events, *_ = wire.unpack(payload)
        if not all(isinstance(event, dict) for event in events):
            raise ValueError("an event is no map")
        return Message(int.from_bytes(seq, "big"), events)
    except Exception:  # msgpack has errors of many kinds
        logger.warning("a message of %d bytes cannot be read", len(payload), exc_info=True)
        return None
