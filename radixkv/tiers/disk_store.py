"""Pages on disk: bounded, checked, and there again after a restart.

The index is in memory, and in a file of records of fixed size that are written in place (`page_record`); payloads lie
in a second file, in slots of fixed size (`slot_files`). There is no log to compact and nothing to fragment, so the
files have their final size from the start of their last slot on. Why not an embedded database: those that map their
files (LMDB) end the process with SIGBUS or an abort when a file was cut short or a page of theirs damaged, and a cache
must survive that.

A page is written in this order: its slot's old record is freed, the payload is written, then the record. A process
that is killed in between loses that page alone. After a power cut the medium may hold any of these writes and not the
others; then a checksum does not fit, and the page is missed. Nothing waits for the medium but `close`.

Pages give way from the end of a chain on, so that what is there can be found (`PageIndex`). One that is damaged takes
those after it out of reach; they are found again when it has been computed and written again, or give way in time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from radixkv.cache.page_keys import root_key
from radixkv.errors import ConfigError, InvariantError, TierError
from radixkv.tiers.disk_opening import fit_to_limit, load_records, other_fingerprint
from radixkv.tiers.fingerprint import Fingerprint
from radixkv.tiers.folder_bound import FolderBound
from radixkv.tiers.forking import leave_to_parent
from radixkv.tiers.memory_store import found_whole
from radixkv.tiers.name_table import NameTable
from radixkv.tiers.page_files import PageFiles
from radixkv.tiers.page_index import PageIndex, StoredPage
from radixkv.tiers.page_lines import Names, guaranteed_pages, share_uses
from radixkv.tiers.page_record import RecordFormat, payload_checksum
from radixkv.tiers.page_slots import PageSlots, check_page
from radixkv.tiers.page_store import FoundPage, NewPage, PageFacts, StoreStats
from radixkv.tiers.page_watch import PageWatch
from radixkv.tiers.store_access import StoreAccess
from radixkv.tiers.store_counts import StoreCounts, error_line
from radixkv.tiers.store_folder import (
    Description,
    StoreFolder,
    folder_bytes,
    store_identity,
    write_description,
)

logger = logging.getLogger(__name__)

DAMAGED, EVICTED, UNREADABLE = "damaged", "evicted", "unreadable"


class CheckedPage(NamedTuple):
    """A page of a store, and whether its payload is what was written."""

    page: FoundPage
    facts: PageFacts
    is_right: bool


class DiskStore:
    """A `PageStore` in a folder. See the module's docstring.

    Invariants: the files of the folder, those of stores with other fingerprints included, never take more than
    `capacity_bytes`. `_slots` keeps its own invariants.
    """

    finds_at_once = True
    name = "disk"

    def __init__(
        self,
        path: str | Path,
        fingerprint: Fingerprint,
        payload_bytes: int,
        capacity_bytes: int,
        *,
        policy: str = "lru",
        read_only: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open the store of `fingerprint` in the folder `path`, made if need be. O(pages).

        Stores of other fingerprints in that folder give way first, whole, when this one needs their room.

        Args:
            read_only: open what is there as it is now, without owning the folder; nothing can be written then.

        Raises: TierError if it cannot be opened or has an owner, ConfigError if not even one page fits the capacity.
        """
        if payload_bytes < 1:
            raise ConfigError(f"payload_bytes must be at least 1, not {payload_bytes}")
        self.page_size, self.payload_bytes, self.capacity_bytes = fingerprint.page_size, payload_bytes, capacity_bytes
        self.fingerprint = fingerprint
        self.notes: list[str] = []
        """What to tell about how it was opened, a line each: another fingerprint, damaged records."""
        self._clock = clock
        self._index = PageIndex(fingerprint.page_size, policy)
        self._slots = PageSlots(self._index, limit=0)
        self._counts = StoreCounts()
        self._folder = StoreFolder(path, read_only=read_only)
        try:
            self._open(store_identity(fingerprint, payload_bytes))
        except OSError as error:
            self._folder.close()
            raise TierError(f"the store {path} cannot be opened: {error.strerror}") from error
        except BaseException:
            self._folder.close()
            raise
        for line in self.notes:
            logger.warning("%s", line)
        leave_to_parent(self)

    # Opening

    def _open(self, identity: bytes) -> None:
        self._path = self._folder.store_path(identity)
        described = Description(self._path, self.fingerprint, self.payload_bytes, self.capacity_bytes)
        if not self._path.exists():
            note = other_fingerprint(self._folder, self.fingerprint, self.payload_bytes)
            self.notes += [] if note is None else [note]
            if self._folder.read_only:
                raise TierError(note or f"there is no store at {self._folder.path}")
            self._path.mkdir(mode=0o700)
        if not self._folder.read_only:
            write_description(described)
        record_format = RecordFormat(self.page_size, identity)
        self._slot_bytes = record_format.record_bytes + self.payload_bytes
        self._bound = FolderBound(self._folder, self._path, self.capacity_bytes, self._slot_bytes)
        self._names = NameTable(self._path, self._bound.names_bytes)
        read_only = self._folder.read_only
        self._access = StoreAccess(self._path, self._counts, read_only=read_only)
        self._files = PageFiles(self._path, record_format, self.payload_bytes, read_only=read_only)
        try:
            self._load()
        except BaseException:
            self._files.close()
            raise

    def _load(self) -> None:
        now_s = self._clock()
        unfit = load_records(self._index, self._files, self._names.names, now_s)
        self._slots.start(self._files.num_slots)
        if self._folder.read_only:
            self._slots.limit = self._slots.used
        else:
            for slot in unfit:
                self._files.free(slot)
            self._slots.limit = self._bound.make_room(max(self._slots.used, 1))
            self._bound.check()
            self._counts.written(0, fit_to_limit(self._slots, self._files, now_s))
        if unfit:
            self._counts.missed(DAMAGED, len(unfit))
            self.notes.append(f"{len(unfit)} damaged records of {self._path} are left out")

    # Finding and reading

    def find(self, parent_key: bytes, tokens: bytes) -> list[FoundPage]:
        """As `PageStore.find`. Raises: ClosedError; TierError in a forked child."""
        self._access.check_open()
        with self._access.lock:
            return self._index.find(parent_key, tokens)

    def read(self, pages: Sequence[FoundPage]) -> list[bytes | None]:
        """As `PageStore.read`; in the order of the file, whatever the order of `pages`, as the system reads ahead then.

        Ask for a few MiB at a time: memory that is used again is faster than memory that the system must clear first.

        Raises: ClosedError; TierError in a forked child.
        """
        with self._access.reading():
            return self._read(pages)

    def _read(self, pages: Sequence[FoundPage]) -> list[bytes | None]:
        with self._access.lock:
            stored = [self._index.get(page.parent_key, page.tokens) for page in pages]
        payloads: list[bytes | None] = [None] * len(stored)
        order = sorted((page.slot, number, page) for number, page in enumerate(stored) if page is not None)
        for _, number, page in order:
            payloads[number] = self._read_one(page)
        self._counts.missed(EVICTED, stored.count(None))
        self._counts.read(len(payloads) - payloads.count(None))
        return payloads

    def _read_one(self, page: StoredPage) -> bytes | None:
        slot = page.slot
        try:
            payload = self._files.payload(slot)
        except OSError as error:
            self._counts.failed(error_line(error))
            self._counts.missed(UNREADABLE)
            return None
        if self._files.is_right(page, payload):
            return payload
        with self._access.io, self._access.lock:  # it may have given way while it was read
            is_there = self._index.get(page.parent_key, page.tokens) is page and page.slot == slot
            self._counts.missed(DAMAGED if is_there else EVICTED)
            if is_there:
                self._drop(page)
        return None

    def _drop(self, page: StoredPage) -> None:
        """Take a page out; its slot is free. With both locks held."""
        self._slots.drop(page)
        if self._folder.read_only:
            return
        try:
            self._files.free(page.slot)
        except OSError as error:  # it would be found out again
            self._counts.failed(error_line(error))

    def hottest(self, max_pages: int) -> list[tuple[FoundPage, PageFacts]]:
        """As `PageStore.hottest`. O(pages × log pages), of which others wait for O(pages)."""
        self._access.check_open()
        with self._access.lock:
            pages = list(self._index)
        by_worth = self._index.by_worth(pages, self._clock())
        with self._access.lock:
            return [(found_whole(page), page.facts) for page in self._index.chains(by_worth, max_pages)]

    def check(self) -> Iterator[CheckedPage]:
        """Read every page and compare it with its checksum; changes nothing. Another process may write meanwhile.

        Raises: ClosedError, OSError.
        """
        self._access.check_open()
        with self._access.lock:
            pages = sorted(self._index, key=lambda page: page.slot)
        for page in pages:
            with self._access.reading():
                record = self._files.format.pack(page)
                is_right = self._files.is_right(page, self._files.payload(page.slot))
                is_there = is_right or self._files.record(page.slot) == record  # else it gave way or was used since
            if is_there:
                yield CheckedPage(found_whole(page), page.facts, is_right)

    # Writing

    def write(self, pages: Sequence[NewPage]) -> None:
        """As `PageStore.write`.

        A page for which there is no room because all others are kept, of a higher priority, or before it in its own
        chain, counts as evicted at once. The medium's failure may cost the pages that were giving way.

        Raises: TierError, InvalidPagesError, ClosedError.
        """
        for page in pages:
            check_page(page, self.page_size, self.payload_bytes)
        checksums = [payload_checksum(page.payload) for page in pages]
        with self._access.writing():
            self._store(list(zip(pages, checksums, strict=True)))

    def _store(self, pages: list[tuple[NewPage, bytes]]) -> None:
        roots = {root_key(*page.facts.namespace) for page, _ in pages}
        named = [(page, checksum) for page, checksum in pages if self._has_name(page.facts, roots)]
        with self._access.lock:
            new = sum(self._index.get(page.parent_key, page.tokens) is None for page, _ in named)
        limit = self._bound.make_room(self._slots.used - self._slots.num_free + new)
        with self._access.lock:
            self._slots.limit = limit
            plan = self._slots.plan(named, self._clock())
        try:
            self._files.carry_out(plan)
        except BaseException:
            with self._access.lock:
                self._slots.undo(plan)
            self._counts.written(0, len(plan.gone & set(plan.giving_way)))
            raise
        with self._access.lock:
            self._slots.commit(plan)
        self._counts.written(len(plan.new), len(plan.giving_way) + plan.left_out + len(pages) - len(named))

    def _has_name(self, facts: PageFacts, roots: set[bytes]) -> bool:
        """Whether the names of a namespace are written down, or could be now; those of `roots` are needed, too."""
        return self._names.add(root_key(*facts.namespace), facts.namespace, lambda: self._used_roots() | roots)

    def _used_roots(self) -> set[bytes]:
        with self._access.lock:
            return {page.root for page in self._index}

    def touch(self, pages: Iterable[tuple[bytes, bytes, PageFacts]]) -> None:
        """As `PageStore.touch`. Raises: TierError, ClosedError."""
        with self._access.writing():
            for parent_key, tokens, facts in pages:
                with self._access.lock:
                    page = self._index.get(parent_key, tokens)
                if page is not None and self._has_name(facts, set()):
                    with self._access.lock:
                        self._index.update(page, facts)
                    self._files.put_record(page)

    def remove(self, parent_key: bytes) -> int:
        """As `PageStore.remove`. Raises: TierError, ClosedError."""
        with self._access.writing():
            with self._access.lock:
                pages = self._index.below(parent_key)
            return self._give_up(pages)

    def remove_unused(self, time_s: float) -> int:
        """Forget what was not used after `time_s` and is not kept. Returns how many pages. O(pages).

        Raises: TierError, ClosedError.
        """
        with self._access.writing():
            with self._access.lock:
                pages = self._index.unused_since(time_s, self._clock())
            return self._give_up(pages)

    def _give_up(self, pages: list[StoredPage]) -> int:
        with self._access.lock:
            for page in pages:
                self._slots.drop(page)
        for page in pages:
            self._files.free(page.slot)
        return len(pages)

    def compact(self) -> None:
        """Give the room of free slots back to the file system; all else waits meanwhile. O(bytes that move).

        Raises: TierError, ClosedError.
        """
        with self._access.writing(), self._access.lock:
            limit, self._slots.limit = self._slots.limit, len(self._index)
            try:
                fit_to_limit(self._slots, self._files, self._clock())
            finally:
                self._slots.limit = limit

    # The rest

    def check_shares(self, guaranteed_bytes: Mapping[Names, int]) -> dict[Names, int]:
        """How many pages `set_shares` would guarantee. Raises: ConfigError if they are more than the capacity."""
        return guaranteed_pages(guaranteed_bytes, self._slot_bytes, self.capacity_bytes)

    def set_shares(self, guaranteed_bytes: Mapping[Names, int]) -> None:
        """Guarantee bytes to namespaces, in place of what was guaranteed before, for as long as it is open.

        Pages of those that hold more than their share give way first; none is pushed below its share by others. A salt
        without a share of its own counts to its `extra_key`. Waits for no medium. O(pages × log pages).

        Raises: ConfigError if they are more than the capacity; ClosedError; TierError in a forked child.
        """
        pages = self.check_shares(guaranteed_bytes)
        self._access.check_open()
        with self._access.lock:
            self._index.set_shares(pages)

    @property
    def capacity_pages(self) -> int:
        """Pages that it holds at most, as long as stores of other fingerprints keep their room."""
        return self._slots.limit

    @property
    def watch(self) -> PageWatch:
        """How to follow what it holds. Closing it is no change: the pages stay on disk."""
        return PageWatch(self._index, self._access.lock)

    @property
    def num_bytes(self) -> int:
        """Bytes of the files of this store, free slots included."""
        return folder_bytes(self._path)

    @property
    def path(self) -> Path:
        """The folder of this store, within the one that it was opened with."""
        return self._path

    def pages(self) -> list[tuple[FoundPage, PageFacts]]:
        """All pages, those of one parent together; the names of some may be lost, then both are None. O(pages)."""
        self._access.check_open()
        with self._access.lock:
            return [(found_whole(page), page.facts) for page in self._index]

    def stats(self) -> StoreStats:
        """As `PageStore.stats`; `bytes` are those of the pages that are there."""
        num_pages = len(self._index)
        stats = self._counts.stats(num_pages, num_pages * self._slot_bytes, self.capacity_bytes)
        return stats._replace(namespaces=share_uses(self._index.uses(), self._slot_bytes))

    def check_invariants(self) -> None:
        """Prove the invariants. O(pages × log pages). Raises: InvariantError."""
        with self._access.io, self._access.lock:
            self._slots.check_invariants()
            taken = folder_bytes(self._path) + self._folder.other_bytes(self._path)
            if taken > self.capacity_bytes:
                raise InvariantError(f"the files take {taken} of {self.capacity_bytes} bytes")

    def flush(self) -> None:
        """Wait until the medium has all that was written. Raises: TierError, ClosedError."""
        with self._access.writing():
            self._files.sync()

    def close(self) -> None:
        """As `PageStore.close`. Raises: TierError if the medium does not take what was written."""
        if not self._access.end():
            return
        with self._access.io, self._access.lock:
            try:
                if not self._folder.read_only:
                    self._names.keep({page.root for page in self._index})
                    self._files.sync()
            except OSError as error:
                raise TierError(f"the store {self._path} failed as it was closed: {error.strerror}") from error
            finally:
                self._let_go()

    def _let_go(self) -> None:
        self._files.close()
        self._folder.close()

    def let_go_in_child(self) -> None:
        """Leave the store to the parent, in a process that was forked from it."""
        if not self._access.is_closed:
            self._let_go()
