"""Publishes what a cache stores and removes, from a thread of its own."""

from __future__ import annotations

import logging
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from radixkv.cache.prefix_cache import PrefixCache
from radixkv.config.checks import checked_int
from radixkv.config.endpoints import check_endpoint, replay_endpoint_of
from radixkv.errors import ConfigError
from radixkv.publish import wire
from radixkv.publish.event_queue import EventQueue
from radixkv.publish.following import BATCH_EVENTS, Following
from radixkv.publish.requirements import PACKAGES
from radixkv.publish.tier_feed import TierWatch
from radixkv.publish.wire import WireEvent

logger = logging.getLogger(__name__)

MAX_QUEUED = 16_384  # events of the pool, and of each tier, that wait for the thread
MAX_UNREAD = 10_000  # messages that wait in ZeroMQ for one subscriber, before it loses some
BUFFER_STEPS = 10_000  # messages kept for replay …
BUFFER_BYTES = 64 << 20  # … and their bytes
BATCH_TOKENS = 65_536  # about so many tokens in one message at most
GATHER_S = 0.002  # an event waits so long for others of the same step
CLOSE_S = 5.0
BUSY_MS = 50  # until a tier that was busy is asked again
LINGER_MS = 200
EPOCH_BITS = 53  # any reader of JSON keeps them


class EventSources(NamedTuple):
    """Where events come from, for those who want to listen.

    Attributes:
        endpoint: of the PUB socket.
        replay_endpoint: of the ROUTER socket that answers requests for replays and snapshots.
        topic: the first frame of each message.
        epoch: of this publisher; another one is another cache.
        page_size: tokens a page, `block_size` in the events.
        format: of the events.
    """

    endpoint: str
    replay_endpoint: str
    topic: str
    epoch: int
    page_size: int
    format: str = "vllm-map+radixkv-1"


class EventPublisher:
    """Publishes what a cache and its tiers hold over ZeroMQ, in the format of vLLM; docs/events.md has the fields.

    The cache's thread appends each event to a bounded queue and goes on; a thread of the publisher's own encodes and
    sends. If the queue is full, events are dropped: the stream says so (`dropped`), and all that is cached follows as
    soon as the queue is empty and the cache changes again. The threads of each tier have a queue of their own; if that
    is full, the publisher's thread lists the tier and sends what differs.

    The ROUTER socket answers two requests: `[b"", seq]` with all messages from that number on which are kept, as vLLM
    does, and `[b"", wire.SNAPSHOT_REQUEST]` with all that is cached, parents first. The messages from number
    `next_seq` on, applied to a snapshot, give the cache.

    Make and close it in the thread that owns the cache.

    Attributes:
        sources: where others find it.
        live: the PUB socket, which belongs to the thread.
    """

    def __init__(
        self,
        cache: PrefixCache,
        endpoint: str,
        *,
        tiers: Mapping[str, TierWatch] = MappingProxyType({}),
        replay_endpoint: str | None = None,
        topic: str = "",
        max_queued: int = MAX_QUEUED,
        max_unread: int = MAX_UNREAD,
        buffer_steps: int = BUFFER_STEPS,
    ) -> None:
        """Listen, and begin with all that is cached.

        Args:
            endpoint, replay_endpoint: addresses to bind, such as tcp://127.0.0.1:5557; port 0 takes a free one. By
                default replays are served at the next port.
            tiers: what holds pages below the pool, by medium. What they hold is listed by the publisher's thread.

        Raises: ConfigError if an address is wrong or taken, or a tier has a publisher; MissingPackageError.
        """
        self._zmq = PACKAGES.module("zmq")
        PACKAGES.module("msgpack")
        self._topic, self._epoch = topic.encode(), secrets.randbits(EPOCH_BITS)
        self._max_unread = checked_int("max_unread", max_unread, 1)
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=checked_int("buffer_steps", buffer_steps, 1))
        self._kept_bytes = self._next_seq = 0
        self._closing = threading.Event()
        self._wakers = socket.socketpair()
        self._wakers[0].setblocking(False)
        self._context = self._zmq.Context()
        try:
            self.live, address = self._bind("endpoint", self._zmq.PUB, endpoint, self._max_unread)
            replay_endpoint = replay_endpoint or replay_endpoint_of(endpoint)
            router, kept = self._zmq.ROUTER, 2 * (buffer_steps + 1)
            self._router, replay_address = self._bind("replay_endpoint", router, replay_endpoint, kept)
            max_queued = checked_int("max_queued", max_queued, 1)
            self._held = Following(cache, tiers, epoch=self._epoch, max_queued=max_queued, wake=self._wake)
        except BaseException:
            self._close_sockets()
            raise
        self.sources = EventSources(address, replay_address, topic, self._epoch, cache.page_size)
        self._thread = threading.Thread(target=self._run, name="radixkv-events", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Send what waits, and close the sockets. Idempotent."""
        self._held.stop()
        self._closing.set()
        self._wake()
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            logger.warning("the thread that publishes events did not end in %s s", CLOSE_S)

    @property
    def queue(self) -> EventQueue:
        """Where events of the pool wait for the thread."""
        return self._held.queue

    @property
    def next_seq(self) -> int:
        """The number that the next message will have."""
        return self._next_seq

    @property
    def is_running(self) -> bool:
        """Whether the thread has not ended."""
        return self._thread.is_alive()

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            poller = self._zmq.Poller()
            poller.register(self._router, self._zmq.POLLIN)
            poller.register(self._wakers[1], self._zmq.POLLIN)
            self._publish_waiting()
            while True:
                self._wait(poller)
                self._answer_requests()
                self._publish_waiting()
                if self._closing.is_set() and not self._held.is_behind:
                    return
        except Exception:
            logger.exception("events are published no more")
        finally:
            self._held.abandon()
            self._close_sockets()

    def _wait(self, poller: Any) -> None:
        """Sleep until there is something to do, and a little longer if that are events."""
        self._held.fall_asleep()
        waits = not self._held.is_behind and not self._closing.is_set()
        ready = poller.poll((BUSY_MS if self._held.is_stale else None) if waits else 0)
        self._held.wake_up()
        if any(where == self._wakers[1].fileno() for where, _ in ready):
            self._wakers[1].recv(4096)
            self._closing.wait(GATHER_S)

    def _publish_waiting(self) -> None:
        for events in self._held.take():
            self._publish(events)
        if not self._closing.is_set():  # a store may be closing, too
            for events in self._held.list_stale():
                self._publish(events)

    def _publish(self, events: Iterable[WireEvent]) -> None:
        for batch in _batches(events):
            payload = wire.pack_batch(time.time(), batch)
            self._keep(payload)
            self.live.send_multipart([self._topic, wire.pack_seq(self._next_seq), payload])
            self._next_seq += 1

    def _keep(self, payload: bytes) -> None:
        """Keep a message for replay."""
        if len(self._kept) == self._kept.maxlen:
            self._kept_bytes -= len(self._kept.popleft()[1])
        self._kept.append((self._next_seq, payload))
        self._kept_bytes += len(payload)
        while self._kept_bytes > BUFFER_BYTES and len(self._kept) > 1:
            self._kept_bytes -= len(self._kept.popleft()[1])

    # -- requests ----------------------------------------------------------------------------------------------------

    def _answer_requests(self) -> None:
        while self._router.poll(0):
            match self._router.recv_multipart():
                case [client, b"", wire.SNAPSHOT_REQUEST]:
                    self._answer_snapshot(client)
                case [client, b"", start] if len(start) == wire.SEQ_BYTES:
                    self._answer_replay(client, int.from_bytes(start, "big"))
                case frames:
                    logger.debug("a request for events is ignored: %s frames", len(frames))

    def _answer_replay(self, client: bytes, start: int) -> None:
        for seq, payload in self._kept:
            if seq >= start:
                self._router.send_multipart([client, b"", self._topic, wire.pack_seq(seq), payload])
        self._end_answer(client, 0, is_complete=bool(self._kept) and self._kept[0][0] <= start)

    def _answer_snapshot(self, client: bytes) -> None:
        num_parts = 0
        if not self._held.is_lost:
            for batch in _batches(self._held.mirror.snapshot()):
                payload = wire.pack_batch(time.time(), batch)
                self._router.send_multipart([client, b"", self._topic, wire.pack_seq(self._next_seq), payload])
                num_parts += 1
        self._end_answer(client, num_parts, is_complete=not self._held.is_lost)

    def _end_answer(self, client: bytes, num_parts: int, *, is_complete: bool) -> None:
        info = {
            "epoch": self._epoch,
            "next_seq": self._next_seq,
            "num_parts": num_parts,
            "is_complete": is_complete,
        }
        self._router.send_multipart([client, b"", b"", wire.END_SEQ, wire.pack_info(info)])

    # -- sockets -----------------------------------------------------------------------------------------------------

    def _bind(self, name: str, kind: int, endpoint: str, max_unread: int) -> tuple[Any, str]:
        """A socket, and its address."""
        check_endpoint(name, endpoint)
        bound = self._context.socket(kind)
        bound.setsockopt(self._zmq.SNDHWM, max_unread)
        bound.setsockopt(self._zmq.LINGER, LINGER_MS)
        try:
            bound.bind(endpoint)
        except self._zmq.ZMQError as error:
            raise ConfigError(f"{name} must be an address that is free, not {endpoint!r}: {error}") from error
        return bound, bound.getsockopt(self._zmq.LAST_ENDPOINT).rstrip(b"\0").decode()

    def _wake(self) -> None:
        try:
            self._wakers[0].send(b"\0")
        except OSError:  # it is full, and wakes the thread already; or it was closed, and there is no thread
            return

    def _close_sockets(self) -> None:
        self._context.destroy(linger=LINGER_MS)
        for waker in self._wakers:
            waker.close()


def _batches(events: Iterable[WireEvent]) -> Iterator[Sequence[WireEvent]]:
    """`events`, some together, so that no message is very long."""
    batch: list[WireEvent] = []
    num_tokens = 0
    for event in events:
        batch.append(event)
        num_tokens += len(event.get("token_ids", ())) + len(event.get("block_hashes", ()))
        if num_tokens >= BATCH_TOKENS or len(batch) >= BATCH_EVENTS:
            yield batch
            batch, num_tokens = [], 0
    if batch:
        yield batch
