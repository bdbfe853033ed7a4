"""Pages in the two files of a disk store: a record and a payload in each slot."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from radixkv.tiers.page_index import StoredPage
from radixkv.tiers.page_record import RecordFormat, payload_checksum
from radixkv.tiers.page_slots import WritePlan
from radixkv.tiers.slot_files import SlotFiles


class PageFiles(SlotFiles):
    """`SlotFiles` that know what a record says of a page.

    Attributes:
        format: of the records.
    """

    def __init__(self, folder: Path, record_format: RecordFormat, payload_bytes: int, *, read_only: bool) -> None:
        """Open the files in `folder`, made if need be."""
        super().__init__(folder, record_format.record_bytes, payload_bytes, read_only=read_only)
        self.format = record_format

    def is_right(self, page: StoredPage, payload: bytes) -> bool:
        """Whether `payload` is what was written for `page`. Reads nothing."""
        return len(payload) == self.payload_bytes and payload_checksum(payload) == page.checksum

    def put_record(self, page: StoredPage) -> None:
        """Write the record of a page whose payload is in its slot."""
        self.write_record(page.slot, self.format.pack(page))

    def free(self, slot: int) -> None:
        """Let a slot have no page, whatever its payload is."""
        self.write_record(slot, self.format.free)

    def carry_out(self, plan: WritePlan) -> None:
        """Write a plan: first what grows the files, so that a full disk is noticed before a page gives way.

        If it fails, none of the new pages has a record; what is `gone` of the old ones is noted in the plan.
        """
        recorded: list[int] = []
        try:
            for page, payload in sorted(plan.new, key=lambda new: (new[0].slot in plan.giving_way, new[0].slot)):
                self.free(page.slot)  # a payload without a record would be a lost one
                plan.gone.add(page.slot)
                self.write_payload(page.slot, payload)
            for page, _ in plan.new:
                recorded.append(page.slot)
                self.put_record(page)
            for page in plan.updated:
                self.put_record(page)
        except BaseException:
            for slot in recorded:
                with suppress(OSError):  # what is left of the plan on disk is right, or found to be damaged
                    self.free(slot)
            raise
