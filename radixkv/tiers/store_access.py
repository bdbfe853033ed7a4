"""Who may use the files of a store, and when."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Condition, Lock

from radixkv.errors import ClosedError, TierError
from radixkv.tiers.store_counts import StoreCounts, error_line


class StoreAccess:
    """Lets any number read and one write at a time; nobody once the store is closed, nor in a forked child.

    Two locks, taken in this order: `io` is the writer's, and `lock` guards what is in memory. That one is held for
    moments only, never while the medium is waited for.
    """

    def __init__(self, path: Path, counts: StoreCounts, *, read_only: bool) -> None:
        """Args: counts: told of the medium's failures in a write."""
        self.io, self.lock = Lock(), Lock()
        self.is_closed = False
        self._path, self._counts, self._read_only = path, counts, read_only
        self._readers, self._no_reader = 0, Condition(self.lock)
        self._pid = os.getpid()

    def check_open(self) -> None:
        """Raises: ClosedError; TierError in a forked child."""
        if os.getpid() != self._pid:
            raise TierError(f"the store {self._path} belongs to process {self._pid}, from which this one was forked")
        if self.is_closed:
            raise ClosedError(f"the store {self._path} is closed")

    @contextmanager
    def reading(self) -> Iterator[None]:
        """The right to read: the files stay open until the block ends. Raises: as `check_open`."""
        self.check_open()  # before the lock, which a forked child may find taken
        with self.lock:
            self.check_open()
            self._readers += 1
        try:
            yield
        finally:
            with self.lock:
                self._readers -= 1
                self._no_reader.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """The right to write, until the block ends. Errors of the medium are counted and become a TierError.

        Raises: as `check_open`; TierError for a store that was opened to be read only.
        """
        self.check_open()
        if self._read_only:
            raise TierError(f"the store {self._path} was opened to be read only")
        with self.io:
            self.check_open()
            try:
                yield
            except OSError as error:
                self._counts.failed(error_line(error))
                raise TierError(f"the store {self._path} cannot be written: {error.strerror}") from error

    def end(self) -> bool:
        """Let nobody in any more, and wait until the last reader has left. A writer may still be at work.

        Returns: whether the files are the caller's to close: not in a forked child, nor a second time.
        """
        if os.getpid() != self._pid:
            return False
        with self.lock:
            if self.is_closed:
                return False
            self.is_closed = True
            self._no_reader.wait_for(lambda: self._readers == 0)  # the files' numbers may be those of others after
        return True
