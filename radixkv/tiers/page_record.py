"""How a page is written: a record of its key and facts, and the checksum of its payload.

A record has the same size for every page of a store, so record i lies at i × its size and describes payload i. It
carries a checksum over all of its bytes, in which its number and the store's identity are mixed: a record that was
moved, or copied from another store, is as damaged as one of which a bit was flipped. Bytes that are all zero are a
free record.

The payload's checksum lies in the record. So whatever lies in a payload's place (an older page, half a page, zeros)
is recognised, as long as the record is whole.
"""

from __future__ import annotations

import math
import struct
import zlib
from hashlib import blake2b

import numpy as np

from radixkv.cache.page_keys import KEY_BYTES, root_key
from radixkv.cache.token_ids import TOKEN_BYTES
from radixkv.errors import RadixKVError
from radixkv.tiers.page_index import StoredPage
from radixkv.tiers.page_store import PageFacts

FORMAT = 1
"""The version of everything that stores write. Another one is another store."""

CHECKSUM_BYTES = 16
_WORD = np.dtype("<u8")
_SECTOR_WORDS = 64
_CHECKSUM = struct.Struct("<QII")
_FIXED = struct.Struct(f"<I4xqQdd{KEY_BYTES}s{KEY_BYTES}s{CHECKSUM_BYTES}s")
Namespaces = dict[bytes, tuple[str | None, str | None]]


class DamagedRecordError(RadixKVError):
    """A record is neither free nor whole."""


def payload_checksum(payload: bytes) -> bytes:
    """Tell damage of a payload. 16 bytes; O(bytes), at the speed of memory.

    The sum of the payload's 64-bit words modulo 2**64, the CRC-32 of the first word of each sector of 512 bytes, in
    order, and the CRC-32 of its length and of what is left after the last whole word. A word that changed always
    changes the sum, and of other contents (an older page, half a page) one in 2**64 has the same. Sectors or blocks
    that changed places leave the sum as it is, and change the order of first words. It is meant for accidents, not for
    forgers: who can write a store's files can write records, too.

    It reads pages that were just copied out of the system's cache at 12 GB/s. CRC-32 over all bytes reads 2, SHA-256
    0.9 and BLAKE2b 0.3: slower than the copying, and than many disks.

    >>> payload_checksum(b"KV + KV + KV").hex()
    '4b56202b204b562079d11feb746c69b5'
    """
    num_words = len(payload) // _WORD.itemsize
    words = np.frombuffer(payload, _WORD, num_words)
    rest = payload[num_words * _WORD.itemsize :]
    firsts = words[::_SECTOR_WORDS].tobytes()
    return _CHECKSUM.pack(int(np.add.reduce(words)), zlib.crc32(firsts), zlib.crc32(rest, len(payload) & 0xFFFFFFFF))


class RecordFormat:
    """Writes and reads the records of one store."""

    def __init__(self, page_size: int, identity: bytes) -> None:
        """Records of pages of `page_size` tokens, in the store called `identity` (at most 64 bytes)."""
        self.page_size = page_size
        self.record_bytes = CHECKSUM_BYTES + _FIXED.size + page_size * TOKEN_BYTES
        self._identity = identity
        self._free = bytes(self.record_bytes)

    @property
    def free(self) -> bytes:
        """A free record."""
        return self._free

    def pack(self, page: StoredPage) -> bytes:
        """The record of a page. O(page_size)."""
        facts = page.facts
        kept_until_s = math.nan if facts.kept_until_s is None else facts.kept_until_s
        fixed = _FIXED.pack(
            len(page.tokens) // TOKEN_BYTES,
            facts.priority,
            facts.hits,
            facts.used_s,
            kept_until_s,
            page.parent_key,
            page.root,
            page.checksum,
        )
        body = fixed + page.tokens.ljust(self.page_size * TOKEN_BYTES, b"\0")
        return self._checksum(page.slot, body) + body

    def unpack(self, slot: int, record: bytes, namespaces: Namespaces) -> StoredPage | None:
        """The page of a record; None if it is free. O(page_size).

        The page of a namespace whose names are lost says (None, None), which its `root` belies.

        Raises: DamagedRecordError.
        """
        if record == self._free:
            return None
        body = record[CHECKSUM_BYTES:]
        if len(record) != self.record_bytes or self._checksum(slot, body) != record[:CHECKSUM_BYTES]:
            raise DamagedRecordError(f"record {slot} is damaged")
        num_tokens, priority, hits, used_s, kept_until_s, parent_key, root, checksum = _FIXED.unpack_from(body)
        tokens = body[_FIXED.size : _FIXED.size + num_tokens * TOKEN_BYTES]
        kept = None if math.isnan(kept_until_s) else kept_until_s
        facts = PageFacts(used_s, hits, priority, kept, namespaces.get(root, (None, None)))
        return StoredPage(parent_key, tokens, facts, slot=slot, checksum=checksum, root=root)

    def _checksum(self, slot: int, body: bytes) -> bytes:
        return blake2b(
            slot.to_bytes(8, "little") + body, digest_size=CHECKSUM_BYTES, key=self._identity, person=b"radixkv1 record"
        ).digest()


NO_NAMES: Namespaces = {root_key(None, None): (None, None)}
"""The namespace of requests that name none is known everywhere."""
