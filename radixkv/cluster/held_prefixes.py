"""What each replica holds, as the router knows: from events where there are some, and from what it sent there."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from radixkv.cluster.index.replica_index import EXPECT_S, ReplicaIndex
from radixkv.cluster.subscriber.subscriber import KVEventSubscriber
from radixkv.errors import RadixKVError
from radixkv.serving.generation import Ids

logger = logging.getLogger(__name__)

EXPECT_WITHOUT_EVENTS_S = 120.0
"""How long a replica without events is believed to hold what it was sent."""
ANY_HOST = ("0.0.0.0", "*", "[::]")


class HeldPrefixes:
    """An index of replicas, and the events that feed it."""

    def __init__(self, page_size: int, *, has_events: bool) -> None:
        """has_events: whether replicas say what they hold. Without, what they evict is not known."""
        self._index = ReplicaIndex(page_size, expect_s=EXPECT_S if has_events else EXPECT_WITHOUT_EVENTS_S)
        self._subscriber: KVEventSubscriber | None = None
        self._lock: AbstractContextManager[Any] = threading.Lock()

    def lookup(self, prompt: Ids, namespace_key: bytes, now: float) -> dict[str, int]:
        """For each replica that holds something of a prompt: how many of its leading tokens. O(prompt)."""
        with self._lock:
            return self._index.lookup(prompt, namespace_key, now)

    def expect(self, replica: str, prompt: Ids, namespace_key: bytes, now: float) -> None:
        """`replica` is about to compute a prompt. O(prompt)."""
        with self._lock:
            self._index.expect(replica, prompt, namespace_key, now)

    def follow(self, replica: str, host: str, sources: Mapping[str, Any] | None) -> None:
        """Listen to the events of a replica, if it has some.

        Args: host: where it is reached; for addresses that name none. sources: `kv_events` of its /server_info.
        """
        if sources is None:
            return
        try:
            if self._subscriber is None:
                self._subscriber = KVEventSubscriber(self._index)
                self._lock = self._subscriber.lock
            addresses = [_with_host(sources[name], host) for name in ("endpoint", "replay_endpoint")]
            self._subscriber.add_replica(replica, addresses[0], addresses[1], sources.get("topic", ""))
        except (RadixKVError, KeyError) as error:
            logger.warning("the events of %s are not followed: %s", replica, error)

    def drop(self, replica: str) -> None:
        """Forget a replica."""
        if self._subscriber is not None:
            self._subscriber.remove_replica(replica)
        with self._lock:
            self._index.drop_replica(replica)

    def is_current(self, replica: str) -> bool | None:
        """Whether all events of a replica were followed; None if it has none."""
        stats = None if self._subscriber is None else self._subscriber.stats().get(replica)
        return None if stats is None else stats.is_current

    def close(self) -> None:
        """End the thread that listens. Idempotent."""
        if self._subscriber is not None:
            self._subscriber.close()


def _with_host(endpoint: str, host: str) -> str:
    """`endpoint`, with `host` where it says that all of a machine's addresses will do.

    >>> _with_host("tcp://0.0.0.0:5557", "10.0.0.7"), _with_host("tcp://127.0.0.1:5557", "10.0.0.7")
    ('tcp://10.0.0.7:5557', 'tcp://127.0.0.1:5557')
    """
    for known in ANY_HOST:
        if endpoint.startswith(f"tcp://{known}:"):
            return endpoint.replace(known, host, 1)
    return endpoint
