"""Pages of a store in one file, to carry them to another machine.

    magic                          8 bytes, with the version of the format
    header                         block: {fingerprint, payload_bytes}
    page, any number of times      block: [parent_key, tokens, used_s, hits, priority, kept_until_s, extra_key,
                                   cache_salt, payload_checksum], then the payload as it is
    end                            block: {pages: how many}

A block is its length (uint32, little-endian), its content (msgpack), and a checksum over its number in the file and its
content. A file that was cut, reordered or damaged is recognised at the first page that it concerns.

What an archive says is believed: import archives only from those whom you would let answer in the model's name.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import Any, BinaryIO

from radixkv.cache.page_keys import KEY_BYTES
from radixkv.cache.token_ids import TOKEN_BYTES
from radixkv.errors import TierError
from radixkv.tiers.fingerprint import Fingerprint, differences
from radixkv.tiers.page_record import payload_checksum
from radixkv.tiers.page_store import FoundPage, NewPage, PageFacts, PageStore
from radixkv.tiers.requirements import PACKAGES

MAGIC = b"rkvpage1"
_LENGTH = struct.Struct("<I")
_CHECKSUM_BYTES = 16
_MAX_BLOCK_BYTES = 1 << 24
_BATCH_BYTES = 1 << 24


def export_pages(
    store: PageStore,
    fingerprint: Fingerprint,
    pages: Sequence[tuple[FoundPage, PageFacts]],
    file: BinaryIO,
    *,
    progress: Callable[[int], None] = lambda num_pages: None,
) -> int:
    """Write `pages` of a store, parents before children, as an archive. Returns how many could be read. O(bytes).

    Raises: OSError.
    """
    file.write(MAGIC)
    number = 0
    _write_block(file, number, {"fingerprint": fingerprint.as_dict(), "payload_bytes": store.payload_bytes})
    for batch in _batches(pages, store.payload_bytes):
        payloads = store.read([page for page, _ in batch])
        for (page, facts), payload in zip(batch, payloads, strict=True):
            if payload is not None:
                number += 1
                _write_block(file, number, _written(page, facts, payload_checksum(payload)))
                file.write(payload)
        progress(len(batch))
    _write_block(file, number + 1, {"pages": number})
    return number


def import_pages(
    store: PageStore,
    fingerprint: Fingerprint,
    file: BinaryIO,
    *,
    progress: Callable[[int], None] = lambda num_pages: None,
) -> int:
    """Store the pages of an archive. Returns how many. O(bytes).

    Raises: TierError if it is no archive, of another fingerprint, or damaged; pages before the damage are stored then,
        which the message says.
    """
    theirs, payload_bytes = read_header(file)
    wrong = differences(fingerprint, theirs)
    if not wrong and payload_bytes != store.payload_bytes:
        wrong = [f"a payload has {payload_bytes} bytes there and {store.payload_bytes} here"]
    if wrong:
        raise TierError(f"the archive is of no use here: {'; '.join(wrong)}")
    num_stored = 0
    batch: list[NewPage] = []
    batch_pages = max(_BATCH_BYTES // payload_bytes, 1)
    try:
        for page in _read_pages(file, fingerprint.page_size, payload_bytes):
            batch.append(page)
            if len(batch) == batch_pages:
                num_stored += _store(store, batch, progress)
    except TierError as error:
        num_stored += _store(store, batch, progress)
        raise TierError(f"{error}; {num_stored} pages before it are stored") from None
    return num_stored + _store(store, batch, progress)


def read_header(file: BinaryIO) -> tuple[Fingerprint, int]:
    """Of what an archive is: fingerprint and bytes of a payload. Raises: TierError."""
    magic = file.read(len(MAGIC))
    if magic != MAGIC:
        version = " of this version" if magic[:-1] == MAGIC[:-1] else ""
        raise TierError(f"this is no archive of pages{version}")
    header = _read_block(file, 0, dict)
    payload_bytes = header.get("payload_bytes")
    if not isinstance(payload_bytes, int) or payload_bytes < 1:
        raise TierError("the header of the archive is damaged")
    return Fingerprint.from_dict(header.get("fingerprint")), payload_bytes


def _store(store: PageStore, batch: list[NewPage], progress: Callable[[int], None]) -> int:
    """Write and empty `batch`."""
    store.write(batch)
    progress(len(batch))
    count = len(batch)
    batch.clear()
    return count


def _read_pages(file: BinaryIO, page_size: int, payload_bytes: int) -> Iterator[NewPage]:
    number = 0
    while True:
        number += 1
        content = _read_block(file, number, (list, dict))
        if isinstance(content, dict):
            if content.get("pages") != number - 1:
                raise TierError(f"the archive ends after {number - 1} pages, not after as many as it says")
            return
        page, checksum = _parsed(content, number, page_size, file.read(payload_bytes))
        if len(page.payload) != payload_bytes or payload_checksum(page.payload) != checksum:
            raise TierError(f"page {number} of the archive is damaged")
        yield page


def _written(page: FoundPage, facts: PageFacts, checksum: bytes) -> list[Any]:
    namespace = [None if name is None else name.encode("utf-8", "surrogatepass") for name in facts.namespace]
    kept = facts.kept_until_s
    return [page.parent_key, page.tokens, facts.used_s, facts.hits, facts.priority, kept, *namespace, checksum]


def _parsed(content: list[Any], number: int, page_size: int, payload: bytes) -> tuple[NewPage, bytes]:
    try:
        parent_key, tokens, used_s, hits, priority, kept_until_s, extra_key, cache_salt, checksum = content
        namespace = (_name(extra_key), _name(cache_salt))
        facts = PageFacts(
            float(used_s), int(hits), int(priority), None if kept_until_s is None else float(kept_until_s), namespace
        )
    except (TypeError, ValueError):
        raise TierError(f"page {number} of the archive is damaged") from None
    num_tokens, rest = divmod(len(tokens), TOKEN_BYTES)
    if len(parent_key) != KEY_BYTES or rest or not 1 <= num_tokens <= page_size:
        raise TierError(f"page {number} of the archive is damaged")
    return NewPage(parent_key, tokens, payload, facts), checksum


def _name(written: bytes | None) -> str | None:
    return None if written is None else bytes(written).decode("utf-8", "surrogatepass")


def _write_block(file: BinaryIO, number: int, content: object) -> None:
    packed: bytes = PACKAGES.module("msgpack").packb(content)
    file.write(_LENGTH.pack(len(packed)) + packed + _checksum(number, packed))


def _read_block(file: BinaryIO, number: int, kind: type | tuple[type, ...]) -> Any:
    msgpack = PACKAGES.module("msgpack")
    length = file.read(_LENGTH.size)
    num_bytes = _LENGTH.unpack(length)[0] if len(length) == _LENGTH.size else 0
    packed = file.read(num_bytes) if num_bytes <= _MAX_BLOCK_BYTES else b""
    if not packed or len(packed) < num_bytes or file.read(_CHECKSUM_BYTES) != _checksum(number, packed):
        where = "the header" if number == 0 else f"page {number}"
        raise TierError(f"the archive is damaged or cut short at {where}")
    content = msgpack.unpackb(packed)
    if not isinstance(content, kind):
        raise TierError(f"the archive holds no page where page {number} should be")
    return content


def _checksum(number: int, packed: bytes) -> bytes:
    content = number.to_bytes(8, "little") + packed
    return blake2b(content, digest_size=_CHECKSUM_BYTES, person=b"radixkv1 block").digest()


def _batches(
    pages: Sequence[tuple[FoundPage, PageFacts]], payload_bytes: int
) -> Iterable[Sequence[tuple[FoundPage, PageFacts]]]:
    size = max(_BATCH_BYTES // payload_bytes, 1)
    return (pages[start : start + size] for start in range(0, len(pages), size))
