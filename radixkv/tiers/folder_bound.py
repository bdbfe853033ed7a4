"""The bound of a folder of stores: how many pages it leaves to one of them."""

from __future__ import annotations

from pathlib import Path

from radixkv.errors import ConfigError
from radixkv.tiers.store_folder import DESCRIPTION, StoreFolder

_SLACK_BYTES = 4096  # the marker, and what a file system rounds up


class FolderBound:
    """What one store may take, so that all files of the folder together keep within `capacity_bytes`."""

    def __init__(self, folder: StoreFolder, path: Path, capacity_bytes: int, slot_bytes: int) -> None:
        self._folder, self._path = folder, path
        self._capacity_bytes, self._slot_bytes = capacity_bytes, slot_bytes
        self.names_bytes = 4096 + capacity_bytes // 256
        """What the names of namespaces may take."""
        self._limit: int | None = None

    def make_room(self, num_slots: int) -> int:
        """Delete stores of other fingerprints, the longest unused first, until `num_slots` fit or none is left.

        Returns: how many slots fit. O(1), unless they did not fit. Raises: OSError.
        """
        if self._limit is None:
            self._limit = self._slots_that_fit()
        while num_slots > self._limit and (other := self._folder.longest_unused(self._path)) is not None:
            self._folder.delete(other)
            self._limit = self._slots_that_fit()
        return self._limit

    def _slots_that_fit(self) -> int:
        description_bytes = (self._path / DESCRIPTION).stat().st_size
        overhead = _SLACK_BYTES + 2 * (self.names_bytes + description_bytes)  # twice: while they are replaced
        left = self._capacity_bytes - overhead - self._folder.other_bytes(self._path)
        return left // self._slot_bytes

    def check(self) -> None:
        """Make sure that a page fits. Raises: ConfigError."""
        limit = self.make_room(1)
        if limit < 1:
            more = (1 - limit) * self._slot_bytes * 64 // 63 + 64  # of which names take a share
            raise ConfigError(
                f"a store whose pages take {self._slot_bytes:,} bytes each needs about "
                f"{self._capacity_bytes + more:,} bytes; its bound is {self._capacity_bytes:,}"
            )
