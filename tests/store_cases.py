"""Stores of small pages, and what is put into them."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from radixkv.cache.page_keys import page_keys, root_key
from radixkv.errors import ConfigError
from radixkv.tiers.disk_store import DiskStore
from radixkv.tiers.fingerprint import Fingerprint
from radixkv.tiers.page_store import NewPage, PageFacts, PageStore

PAGE_SIZE = 4
PAYLOAD_BYTES = 96
FINGERPRINT = Fingerprint(
    weights="c0ffee", dtype="float32", kv_dtype="auto", layout="NHD 1x8", page_size=PAGE_SIZE, model="none"
)
Namespace = tuple[str | None, str | None]
NOBODY: Namespace = (None, None)


class Clock:
    """A wall clock that stands still until it is set."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


def open_store(path: Path, capacity_bytes: int = 40_000, **options: Any) -> DiskStore:
    """A small store on disk."""
    fingerprint = options.pop("fingerprint", FINGERPRINT)
    payload_bytes = options.pop("payload_bytes", PAYLOAD_BYTES)
    options.setdefault("clock", Clock())
    return DiskStore(path, fingerprint, payload_bytes, capacity_bytes, **options)


def holding(path: Path, num_pages: int, **options: Any) -> DiskStore:
    """A small store on disk that holds `num_pages` pages at most."""
    slot_bytes = 120 + options.get("payload_bytes", PAYLOAD_BYTES)
    least = 12_800 + num_pages * slot_bytes
    for capacity in range(least, least * 2, slot_bytes // 3):
        with suppress(ConfigError):
            store = open_store(path, capacity, **options)
            if store.capacity_pages == num_pages:
                return store
            store.close()
    raise AssertionError(f"no bound holds {num_pages} pages")


def ids(*tokens: int) -> bytes:
    """Tokens as stores take them."""
    return array("i", tokens).tobytes()


def facts(
    used_s: float = 0.0,
    hits: int = 0,
    priority: int = 0,
    kept_until_s: float | None = None,
    namespace: Namespace = NOBODY,
) -> PageFacts:
    """What the cache knows of a page."""
    return PageFacts(used_s, hits, priority, kept_until_s, namespace)


def payload_of(parent_key: bytes, tokens: bytes, num_bytes: int = PAYLOAD_BYTES) -> bytes:
    """A payload that no other page has: what a store gives for a page can be checked by the page alone."""
    return random.Random(parent_key + tokens).randbytes(num_bytes)


def chain(tokens: Sequence[int], known: PageFacts | None = None, payload_bytes: int = PAYLOAD_BYTES) -> list[NewPage]:
    """The pages of a sequence, the last one perhaps in part."""
    known = known or facts()
    key, data, pages = root_key(*known.namespace), ids(*tokens), []
    for start, own_key in zip(range(0, len(data), 4 * PAGE_SIZE), page_keys(key, data, PAGE_SIZE), strict=True):
        page = data[start : start + 4 * PAGE_SIZE]
        pages.append(NewPage(key, page, payload_of(key, page, payload_bytes), known))
        key = own_key
    return pages


def found_tokens(store: PageStore, tokens: Sequence[int], namespace: Namespace = NOBODY) -> int:
    """How many first tokens a store has, with the right payloads for all of them."""
    found = store.find(root_key(*namespace), ids(*tokens))
    for page, payload in zip(found, store.read(found), strict=True):
        assert payload == payload_of(page.parent_key, page.tokens, store.payload_bytes)
    return sum(page.num_tokens for page in found)
