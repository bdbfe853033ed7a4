"""Writes the events of a replica into an index."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from threading import Lock

import numpy as np

from radixkv.cluster.index.lower_index import LowerIndex
from radixkv.cluster.index.replica_index import ReplicaIndex
from radixkv.cluster.subscriber.stream_state import WireEvent
from radixkv.errors import RadixKVError
from radixkv.publish.wire import POOL, SHARED_KEY

logger = logging.getLogger(__name__)


class IndexSink:
    """What one replica holds, in indexes that others read under `lock`: its pool's in one, its tiers' in another."""

    def __init__(self, index: ReplicaIndex, lock: Lock, replica: str, lower: LowerIndex | None = None) -> None:
        self._index, self._lock, self._replica, self._lower = index, lock, replica, lower

    def clear(self) -> None:
        """Forget all that the replica holds."""
        with self._lock:
            self._clear()

    def apply(self, events: Sequence[WireEvent]) -> bool:
        """Follow events. Returns: False if one of them follows a page that the index should have, and has not."""
        fits = True
        with self._lock:
            for event in events:
                try:
                    fits = self._apply(event) and fits
                except (RadixKVError, KeyError, TypeError, ValueError):
                    logger.warning("an event of %s cannot be read", self._replica, exc_info=True)
                    fits = False
            return fits or self._index.forgotten_tokens > 0

    def _apply(self, event: WireEvent) -> bool:
        index, replica = self._index, self._replica
        if event["type"] == "AllBlocksCleared":
            self._clear()
            return True
        if event["medium"] != POOL:
            self._apply_lower(event)
            return True
        tail = event.get("tail_hash")
        if event["type"] == "BlockRemoved":
            index.remove(replica, [*event["block_hashes"], *([] if tail is None else [tail])])
            return True
        parent, namespace_key = event["parent_block_hash"], event.get("namespace", SHARED_KEY)
        if tail is not None:
            return index.store_tail(replica, parent, namespace_key, tail, _tokens(event["tail_token_ids"]))
        names = event["block_hashes"]
        return not names or index.store(replica, parent, namespace_key, names, _tokens(event["token_ids"]))

    def _apply_lower(self, event: WireEvent) -> None:
        """A tier may lack what lies before a page, so any event fits."""
        if self._lower is not None:
            change = self._lower.remove if event["type"] == "BlockRemoved" else self._lower.store
            change(self._replica, event["medium"], event["block_hashes"])

    def _clear(self) -> None:
        """`AllBlocksCleared` is of all media: what one of them still holds follows it."""
        self._index.clear(self._replica)
        if self._lower is not None:
            self._lower.clear(self._replica)


def _tokens(ids: Sequence[int]) -> bytes:
    return np.array(ids, np.int32).tobytes()
