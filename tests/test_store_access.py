"""Who may use the files of a store: readers, one writer, nobody after the end."""

from __future__ import annotations

from pathlib import Path
from threading import Event, Thread

import pytest

from radixkv.errors import ClosedError, TierError
from radixkv.tiers.store_access import StoreAccess
from radixkv.tiers.store_counts import StoreCounts

PATH = Path("store")


def test_nobody_comes_in_after_the_end() -> None:
    access = StoreAccess(PATH, StoreCounts(), read_only=False)
    with access.reading(), access.reading(), access.writing():
        access.check_open()
    assert access.end()
    assert not access.end(), "the files are closed once"
    for use in (access.reading, access.writing):
        with pytest.raises(ClosedError), use():
            pass


def test_the_end_waits_for_readers() -> None:
    access = StoreAccess(PATH, StoreCounts(), read_only=False)
    ended = Event()

    def end() -> None:
        access.end()
        ended.set()

    thread = Thread(target=end)
    with access.reading():
        thread.start()
        while not access.is_closed:  # set before it waits
            pass
        assert not ended.is_set()
    thread.join()
    assert ended.is_set()


def test_failures_of_the_medium_are_counted_and_let_others_in() -> None:
    counts = StoreCounts()
    access = StoreAccess(PATH, counts, read_only=False)
    with pytest.raises(TierError, match="cannot be written: full"), access.writing():
        raise OSError(28, "full")
    with access.writing():
        pass
    stats = counts.stats(0, 0, 0)
    assert (stats.errors, stats.last_error) == (1, "full")


def test_what_is_read_only_is_not_written() -> None:
    access = StoreAccess(PATH, StoreCounts(), read_only=True)
    with access.reading():
        pass
    with pytest.raises(TierError, match="read only"), access.writing():
        pass
