"""Opening a disk store: its records are read, and brought below its bound."""

from __future__ import annotations

from contextlib import suppress

from radixkv.errors import TierError
from radixkv.tiers.fingerprint import Fingerprint, differences
from radixkv.tiers.page_files import PageFiles
from radixkv.tiers.page_index import PageIndex, StoredPage
from radixkv.tiers.page_record import DamagedRecordError, Namespaces
from radixkv.tiers.page_slots import PageSlots
from radixkv.tiers.store_folder import StoreFolder, read_description


def load_records(index: PageIndex, files: PageFiles, namespaces: Namespaces, now_s: float) -> list[int]:
    """Add the pages of all whole records to `index`. Returns the slots of all others that are not free. O(pages).

    Raises: OSError.
    """
    num_payloads = files.num_payloads
    pages: dict[bytes, StoredPage] = {}
    unfit = []
    for slot, record in enumerate(files.records()):
        try:
            page = files.format.unpack(slot, record, namespaces)
        except DamagedRecordError:
            unfit.append(slot)
            continue
        if page is None:
            continue
        if slot >= num_payloads or page.place in pages:  # a twin: of an older file
            unfit.append(slot)
            continue
        page.facts = page.facts._replace(used_s=min(page.facts.used_s, now_s))  # of a clock that went wrong
        pages[page.place] = page
    index.fill(pages)
    return unfit + list(range(files.num_records, num_payloads))  # whose records are gone


def fit_to_limit(slots: PageSlots, files: PageFiles, now_s: float) -> int:
    """Give up the pages that are too many, and move those beyond the limit below it. Returns how many gave way.

    Raises: OSError.
    """
    index, num_evicted = slots.index, 0
    while len(index) > slots.limit:
        page = index.first_to_go(now_s)
        assert page is not None, "the page that nothing follows can always give way"
        slots.drop(page)
        files.free(page.slot)
        num_evicted += 1
    if slots.used > slots.limit:
        for page in [page for page in index if page.slot >= slots.limit]:
            payload = files.payload(page.slot)
            old, new = slots.move_below_limit(page)
            files.write_payload(new, payload)
            files.free(old)
            files.put_record(page)
        files.cut(slots.limit)
        slots.cut()
    return num_evicted


def other_fingerprint(folder: StoreFolder, fingerprint: Fingerprint, payload_bytes: int) -> str | None:
    """Why nothing of what lies in `folder` can be used, in a line; None if nothing lies there. Raises: OSError."""
    described = []
    stores = list(folder.stores())
    for path in stores:
        with suppress(TierError):
            described.append(read_description(path))
    if not stores:
        return None
    why = "what it holds is not described there any more"
    if described:
        nearest = min(described, key=lambda there: len(differences(fingerprint, there.fingerprint)))
        found = differences(fingerprint, nearest.fingerprint)
        why = "; ".join(found) or f"a payload has {nearest.payload_bytes} bytes there and {payload_bytes} here"
    return f"nothing in {folder.path} is of use here: {why}"
