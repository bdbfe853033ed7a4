"""What is on the wire: the events that vLLM publishes, and the fields that are our own.

Three frames on a PUB socket: topic, sequence number (8 bytes, big-endian, unsigned), payload in msgpack. The payload
is an array `[ts, [event, …], rank]`, each event a map with its class under "type". docs/events.md lists all fields.
Readers of vLLM's events skip keys that they do not know, so our own fields harm none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from radixkv.cache.page_keys import root_key
from radixkv.publish.requirements import PACKAGES

WireEvent: TypeAlias = "dict[str, Any]"
POOL = "GPU"  # the medium of the pool, on whatever device: readers know no other name for what attention reads
TIERS = {"host": "CPU", "disk": "STORAGE"}
"""The medium of each tier, by the name of its store. One that others write, too, is not told of."""

NAME_BYTES = 8
SEQ_BYTES = 8
SHARED_KEY = root_key(None, None)
END_SEQ = (-1).to_bytes(SEQ_BYTES, "big", signed=True)
SNAPSHOT_REQUEST = b"radixkv snapshot 1"  # longer than a sequence number, so that none is like it


class Pages(NamedTuple):
    """Whole pages that follow one another, or one tail, as they are named on the wire.

    Attributes:
        names: one for each page.
        parent: the name of the page before; None where a sequence starts.
        namespace_key: the key that the first page of a sequence follows.
        tokens: those in the pages, little-endian int32.
    """

    names: Sequence[int]
    parent: int | None
    namespace_key: bytes
    tokens: bytes
    is_tail: bool


def name_of(page_key: bytes) -> int:
    """What a page is called on the wire: the first 8 bytes of its key as a signed integer."""
    return int.from_bytes(page_key[:NAME_BYTES], "big", signed=True)


def stored(pages: Pages, page_size: int, epoch: int, medium: str) -> WireEvent:
    """`BlockStored` of whole pages, or of none and a tail."""
    names, tokens = list(pages.names), np.frombuffer(pages.tokens, np.int32).tolist()
    event: WireEvent = {
        "type": "BlockStored",
        "block_hashes": [] if pages.is_tail else names,
        "parent_block_hash": pages.parent,
        "token_ids": [] if pages.is_tail else tokens,
        "block_size": page_size,
        "lora_id": None,
        "medium": medium,
        "lora_name": None,
        "epoch": epoch,
    }
    if pages.is_tail:
        event |= {"tail_hash": names[0], "tail_token_ids": tokens}
    if pages.parent is None:
        event["namespace"] = pages.namespace_key
        if pages.namespace_key != SHARED_KEY and not pages.is_tail:
            event["extra_keys"] = [["cache_salt", pages.namespace_key.hex()], *[None] * (len(names) - 1)]
    return event


def removed(names: Sequence[int], epoch: int, medium: str, *, is_tail: bool) -> WireEvent:
    """`BlockRemoved` of whole pages, or of none and a tail."""
    event: WireEvent = {"type": "BlockRemoved", "block_hashes": [] if is_tail else list(names), "medium": medium}
    event["epoch"] = epoch
    if is_tail:
        event["tail_hash"] = names[0]
    return event


def cleared(epoch: int, dropped: int = 0) -> WireEvent:
    """`AllBlocksCleared`, of all media; `dropped` events were lost before it, so that nothing is known for certain."""
    return {"type": "AllBlocksCleared", "epoch": epoch, **({"dropped": dropped} if dropped else {})}


def pack_batch(timestamp: float, events: Sequence[WireEvent]) -> bytes:
    """The payload of one message."""
    packed: bytes = PACKAGES.module("msgpack").packb([timestamp, events, 0])
    return packed


def pack_info(info: dict[str, Any]) -> bytes:
    """What the end of an answer says."""
    packed: bytes = PACKAGES.module("msgpack").packb(info)
    return packed


def unpack(payload: bytes) -> Any:
    """What `pack_batch` or `pack_info` packed. Raises: ValueError and others of msgpack if it is something else."""
    return PACKAGES.module("msgpack").unpackb(payload)


def pack_seq(seq: int) -> bytes:
    """A sequence number as a frame."""
    return seq.to_bytes(SEQ_BYTES, "big")
