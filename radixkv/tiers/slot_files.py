"""The two files of a disk store: records of pages, and their payloads, both in slots of one size.

They are read and written through their descriptors and never mapped: to read past the end of a file that was cut
short is then a short read, not a SIGBUS that ends the process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

INDEX = "index"
PAYLOADS = "payloads"
_READ_BYTES = 1 << 22


class SlotFiles:
    """Records and payloads by slot. All methods raise OSError; thread-safe, as each does one positioned call."""

    def __init__(self, folder: Path, record_bytes: int, payload_bytes: int, *, read_only: bool) -> None:
        """Open the files in `folder`, made if need be."""
        self.record_bytes, self.payload_bytes = record_bytes, payload_bytes
        flags = os.O_CLOEXEC | (os.O_RDONLY if read_only else os.O_RDWR | os.O_CREAT)
        self._index = os.open(folder / INDEX, flags, 0o600)
        try:
            self._payloads = os.open(folder / PAYLOADS, flags, 0o600)
        except OSError:
            os.close(self._index)
            raise

    @property
    def num_slots(self) -> int:
        """Slots that the larger of the two files reaches into."""
        return max(self.num_records, -(-os.fstat(self._payloads).st_size // self.payload_bytes))

    @property
    def num_records(self) -> int:
        """Records that are there, the last one perhaps in part."""
        return -(-os.fstat(self._index).st_size // self.record_bytes)

    @property
    def num_payloads(self) -> int:
        """Payloads that are there in their full length."""
        return os.fstat(self._payloads).st_size // self.payload_bytes

    def records(self) -> Iterator[bytes]:
        """All records from slot 0 on; the last one may be short."""
        step = max(_READ_BYTES // self.record_bytes, 1) * self.record_bytes
        offset = 0
        while block := _read(self._index, step, offset):
            for start in range(0, len(block), self.record_bytes):
                yield block[start : start + self.record_bytes]
            offset += len(block)
            if len(block) < step:
                return

    def record(self, slot: int) -> bytes:
        """One record; shorter than one if the file ends in it or before it."""
        return _read(self._index, self.record_bytes, slot * self.record_bytes)

    def payload(self, slot: int) -> bytes:
        """One payload; shorter than one if the file ends in it or before it."""
        return _read(self._payloads, self.payload_bytes, slot * self.payload_bytes)

    def write_record(self, slot: int, record: bytes) -> None:
        """Write one record."""
        _write(self._index, record, slot * self.record_bytes)

    def write_payload(self, slot: int, payload: bytes) -> None:
        """Write one payload."""
        _write(self._payloads, payload, slot * self.payload_bytes)

    def cut(self, num_slots: int) -> None:
        """Give up all slots from `num_slots` on."""
        for file, size in ((self._index, self.record_bytes), (self._payloads, self.payload_bytes)):
            if os.fstat(file).st_size > num_slots * size:
                os.ftruncate(file, num_slots * size)

    def sync(self) -> None:
        """Wait until all that was written is on the medium."""
        os.fdatasync(self._payloads)
        os.fdatasync(self._index)

    def close(self) -> None:
        """Close both. Call it once."""
        os.close(self._index)
        os.close(self._payloads)


def _read(file: int, num_bytes: int, offset: int) -> bytes:
    data = os.pread(file, num_bytes, offset)
    while 0 < len(data) < num_bytes:  # a read of more than 2 GiB, or a signal
        more = os.pread(file, num_bytes - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def _write(file: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written
