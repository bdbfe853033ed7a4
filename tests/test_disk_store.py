"""Disk stores: what they keep, their bound, who may open them, and what they say when they fail."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from child_process import child_environment
from radixkv.cache.page_keys import root_key
from radixkv.errors import ClosedError, ConfigError, TierError
from radixkv.tiers.disk_store import DiskStore
from radixkv.tiers.page_store import NewPage, PageFacts
from store_cases import (
    FINGERPRINT,
    PAYLOAD_BYTES,
    Clock,
    chain,
    facts,
    found_tokens,
    holding,
    ids,
    open_store,
)


def folder_size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def test_a_store_opened_again_has_pages_order_and_facts(tmp_path: Path) -> None:
    tenant = ("tenant", "salt \ud800 ünï")
    known = PageFacts(500.5, 7, -(2**63), 2000.0, tenant)
    store = open_store(tmp_path / "kv")
    store.write(chain(range(10), known))
    store.write(chain(range(6), facts(used_s=400)))
    before = store.hottest(99)
    store.close()
    store.close()
    with_clock = open_store(tmp_path / "kv")
    assert with_clock.hottest(99) == before
    assert before[0][1] == known
    assert found_tokens(with_clock, range(10), tenant) == 10
    assert found_tokens(with_clock, range(10)) == 6
    assert with_clock.notes == []
    with_clock.check_invariants()
    with_clock.close()


def test_what_was_touched_last_stays_after_a_restart(tmp_path: Path) -> None:
    store = holding(tmp_path / "kv", 3)
    for number in (1, 2, 3):
        store.write(chain([number] * 4, facts(used_s=number)))
    capacity = store.capacity_bytes
    store.touch([(page.parent_key, page.tokens, facts(used_s=9)) for page in chain([1] * 4)])
    store.close()
    store = open_store(tmp_path / "kv", capacity)
    store.write(chain([4] * 4, facts(used_s=4)))
    assert [found_tokens(store, [number] * 4) for number in (1, 2, 3, 4)] == [4, 0, 4, 4]
    store.close()


def test_files_are_private_and_never_pass_the_bound(tmp_path: Path) -> None:
    store = open_store(tmp_path / "kv", 30_000)
    for number in range(400):
        store.write(chain([number, *range(6)], facts(used_s=number, namespace=(f"tenant {number}", None))))
        assert folder_size(tmp_path / "kv") <= 30_000
    store.check_invariants()
    assert store.stats().pages >= store.capacity_pages // 2
    assert store.stats().pages_evicted > 300
    for path in [tmp_path / "kv", *(tmp_path / "kv").rglob("*")]:
        expected = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == expected, path
    store.close()
    assert folder_size(tmp_path / "kv") <= 30_000


def test_a_smaller_bound_keeps_the_hottest_pages(tmp_path: Path) -> None:
    store = open_store(tmp_path / "kv", 60_000)
    for number in range(60):
        store.write(chain([number] * 4, facts(used_s=(number * 7) % 60)))
    hottest = store.hottest(99)
    store.close()
    store = open_store(tmp_path / "kv", 20_000)
    assert 0 < store.capacity_pages < 60
    assert store.hottest(99) == hottest[: store.capacity_pages]
    assert folder_size(tmp_path / "kv") <= 20_000
    assert all(item.is_right for item in store.check())
    store.check_invariants()
    store.close()
    store = open_store(tmp_path / "kv", 60_000)
    assert len(store.hottest(99)) < 60
    assert found_tokens(store, list(ids_of(hottest[0][0].tokens))) == 4
    store.close()


def ids_of(tokens: bytes) -> list[int]:
    return list(memoryview(tokens).cast("i"))


def test_a_bound_that_holds_no_page_is_refused_with_the_least(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs about") as caught:
        open_store(tmp_path / "kv", 100)
    least = int(str(caught.value).split("about ")[1].split(" ")[0].replace(",", ""))
    store = open_store(tmp_path / "kv", least)
    store.write(chain(range(4)))
    assert found_tokens(store, range(4)) == 4
    store.close()
    with pytest.raises(ConfigError, match="payload_bytes must be at least 1"):
        open_store(tmp_path / "kv", payload_bytes=0)


def test_another_fingerprint_is_another_store_and_the_field_is_named(tmp_path: Path) -> None:
    store = open_store(tmp_path / "kv", 60_000)
    assert store.notes == []
    store.write(chain(range(4)))
    store.close()
    other = open_store(tmp_path / "kv", 60_000, fingerprint=replace(FINGERPRINT, dtype="bfloat16"))
    assert other.notes == [f"nothing in {tmp_path / 'kv'} is of use here: dtype is 'float32' there and 'bfloat16' here"]
    assert found_tokens(other, range(4)) == 0
    other.close()
    larger = open_store(tmp_path / "kv", 60_000, payload_bytes=8)
    assert "a payload has 96 bytes there and 8 here" in larger.notes[0]
    larger.close()
    store = open_store(tmp_path / "kv", 60_000)
    assert found_tokens(store, range(4)) == 4
    store.close()


def test_stores_of_other_fingerprints_give_way_whole_when_room_is_needed(tmp_path: Path) -> None:
    for name in ("old", "older"):
        store = open_store(tmp_path / "kv", 60_000, fingerprint=replace(FINGERPRINT, weights=name))
        for number in range(40):
            store.write(chain([number] * 4, facts(used_s=number)))
        store.close()
        age_s = {"old": 100, "older": 200}[name]
        for file in store.path.iterdir():
            os.utime(file, (time.time() - age_s,) * 2)
    store = open_store(tmp_path / "kv", 60_000)
    full = store.capacity_pages
    while store.capacity_pages == full:
        number = store.stats().pages
        store.write(chain([number] * 4, facts(used_s=number)))
        assert folder_size(tmp_path / "kv") <= 60_000
    assert store.stats().pages_evicted == 0
    store.close()
    old = open_store(tmp_path / "kv", 60_000, fingerprint=replace(FINGERPRINT, weights="old"))
    assert old.stats().pages == 40
    old.close()
    older = open_store(tmp_path / "kv", 60_000, fingerprint=replace(FINGERPRINT, weights="older"))
    assert older.stats().pages == 0
    older.close()


def test_a_full_disk_as_a_store_is_opened_leaves_it_without_an_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(TierError, match="cannot be opened: No space left on device"):
            open_store(tmp_path / "kv")
    open_store(tmp_path / "kv").close()


def test_one_owner_at_a_time(tmp_path: Path) -> None:
    store = open_store(tmp_path / "kv")
    store.write(chain(range(8)))
    with pytest.raises(TierError, match=f"in use by process {os.getpid()} on .*give another path"):
        open_store(tmp_path / "kv")
    reader = open_store(tmp_path / "kv", read_only=True)
    assert found_tokens(reader, range(8)) == 8
    for write in (lambda: reader.write(chain([1])), lambda: reader.touch([]), lambda: reader.remove(b"")):
        with pytest.raises(TierError, match="read only"):
            write()
    reader.check_invariants()
    reader.close()
    store.close()
    open_store(tmp_path / "kv").close()


def test_reading_beside_a_writer_gives_right_pages_or_none(tmp_path: Path) -> None:
    store = holding(tmp_path / "kv", 2)
    store.write(chain(range(8), facts(used_s=1)))
    reader = open_store(tmp_path / "kv", read_only=True)
    store.remove(root_key(None, None))
    store.write(chain([9] * 8, facts(used_s=2)))
    assert [item for item in reader.check() if not item.is_right] == []
    found = reader.find(root_key(None, None), ids(*range(8)))
    assert reader.read(found) == [None, None]
    assert reader.stats().misses == {"damaged": 2}
    reader.close()
    store.close()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("file", "a store is a folder"),
        ("folder", "no store of radixkv"),
        ("below a file", "opened: Not a dir"),
    ],
)
def test_a_path_that_is_no_store_is_left_alone(tmp_path: Path, kind: str, message: str) -> None:
    path = tmp_path / "kv"
    if kind == "folder":
        path.mkdir()
        (path / "thesis.tex").write_text("years of work")
    else:
        path.write_text("years of work")
    target = path / "below" if kind == "below a file" else path
    with pytest.raises(TierError, match=message) as caught:
        open_store(target)
    assert "\n" not in str(caught.value)
    assert folder_size(tmp_path) == len("years of work")


def test_an_empty_folder_and_a_new_file_system_can_be_stores(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    store = open_store(tmp_path)
    store.write(chain(range(4)))
    store.close()
    store = open_store(tmp_path)
    assert found_tokens(store, range(4)) == 4
    store.close()


def test_what_is_not_there_cannot_be_read_only(tmp_path: Path) -> None:
    with pytest.raises(TierError, match="there is no store at"):
        open_store(tmp_path / "kv", read_only=True)
    assert not (tmp_path / "kv").exists()
    open_store(tmp_path / "kv").close()
    with pytest.raises(TierError, match="dtype is 'float32' there"):
        open_store(tmp_path / "kv", read_only=True, fingerprint=replace(FINGERPRINT, dtype="float16"))


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = open_store(tmp_path / "kv")
    store.close()
    for use in (
        lambda: store.find(b"", b""),
        lambda: store.read([]),
        lambda: store.write([]),
        lambda: store.touch([]),
        lambda: store.hottest(1),
        lambda: list(store.check()),
    ):
        with pytest.raises(ClosedError, match="is closed"):
            use()


def test_no_file_stays_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        store = open_store(tmp_path / "kv")
        store.write(chain(range(9), facts(namespace=("a", None))))
        store.close()
        (tmp_path / "kv" / "extra").write_text("x")
    with pytest.raises(ConfigError):
        open_store(tmp_path / "kv", 10)
    with pytest.raises(TierError):
        open_store(tmp_path / "kv", read_only=True, payload_bytes=7)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_forked_child_leaves_the_store_to_its_parent(tmp_path: Path) -> None:
    code = """
import ctypes, os, sys
from pathlib import Path
from store_cases import chain, found_tokens, ids, open_store
from radixkv.errors import TierError
path = Path(sys.argv[1])
store = open_store(path)
store.write(chain(range(4)))
child = os.fork()
if child == 0:
    said = []
    for use in (lambda: store.find(bytes(16), ids(1)), lambda: store.read([]), lambda: store.write(chain([1]))):
        try:
            use()
        except TierError as error:
            said.append(str(error))
    store.close()
    try:
        open_store(path)
    except TierError as error:
        said.append(str(error))
    right = [f"belongs to process {os.getppid()}" in line for line in said[:3]] + ["in use by" in said[3]]
    os._exit(0 if all(right) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert found_tokens(store, range(4)) == 4
for fork in (os.fork, ctypes.PyDLL(None).fork):  # the latter has no chance to let go of anything
    if fork() == 0:
        os.read(int(sys.argv[2]), 1)
        os._exit(0)
store.close()
again = open_store(path)  # no sleeping child holds the lock
assert found_tokens(again, range(4)) == 4
again.close()
"""
    read_end, write_end = os.pipe()
    os.set_inheritable(read_end, True)
    try:
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "kv"), str(read_end)],
            check=True,
            timeout=60,
            pass_fds=[read_end],
            env=child_environment(),
        )
    finally:
        os.close(write_end)
        os.close(read_end)


class FailingWrites:
    """Makes `os.pwrite` fail from a given call on, as a medium does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, errno: int) -> None:
        self.calls_left: int | None = None
        self._pwrite, self._errno = os.pwrite, errno
        monkeypatch.setattr(os, "pwrite", self._write)

    def _write(self, file: int, data: bytes, offset: int) -> int:
        if self.calls_left is not None:
            self.calls_left -= 1
            if self.calls_left < 0:
                raise OSError(self._errno, os.strerror(self._errno))
        return self._pwrite(file, data, offset)


@pytest.mark.parametrize("errno", [28, 30, 5])  # disk full, read-only file system, I/O error
def test_a_write_that_fails_leaves_the_store_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, errno: int
) -> None:
    failing = FailingWrites(monkeypatch, errno)
    writes: list[Callable[[DiskStore], None]] = [
        lambda store: store.write(chain(range(100, 110), facts(used_s=50))),
        lambda store: store.write(chain(range(10), facts(used_s=60, namespace=("new", None)))),
        lambda store: store.touch([(page.parent_key, page.tokens, facts(used_s=70)) for page in chain(range(4))]),
    ]
    for number, write in enumerate(writes):
        for calls in range(12):
            store = open_store(tmp_path / f"{number} {calls}")
            store.write(chain(range(9), facts(used_s=1)))
            before = {page.tokens for page, _ in store.hottest(99)}
            failing.calls_left = calls
            with suppress(TierError):
                write(store)
                break  # it took fewer calls
            failing.calls_left = None
            store.check_invariants()
            assert {page.tokens for page, _ in store.hottest(99)} == before
            assert found_tokens(store, range(9)) == 9
            assert (store.stats().errors, store.stats().last_error) == (1, os.strerror(errno))
            write(store)
            store.check_invariants()
            store.close()
            store = open_store(tmp_path / f"{number} {calls}")
            assert found_tokens(store, range(9)) == 9
            store.close()
        else:
            pytest.fail("the write never succeeded")
        failing.calls_left = None
        store.close()


def test_a_failing_write_into_a_full_store_loses_at_most_what_was_giving_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = FailingWrites(monkeypatch, 5)
    for calls in range(6):
        store = holding(tmp_path / str(calls), 4)
        store.write(chain(range(8), facts(used_s=1)))
        store.write(chain(range(50, 58), facts(used_s=2)))
        failing.calls_left = calls
        with pytest.raises(TierError):
            store.write(chain(range(70, 78), facts(used_s=3)))
        failing.calls_left = None
        store.check_invariants()
        assert found_tokens(store, range(70, 78)) == 0
        assert found_tokens(store, range(50, 58)) == 8
        store.write(chain(range(70, 78), facts(used_s=3)))
        assert found_tokens(store, range(70, 78)) == 8
        store.close()


def test_reads_that_fail_are_misses_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path / "kv")
    store.write(chain(range(8)))
    found = store.find(root_key(None, None), ids(*range(8)))

    def failing_read(file: int, num_bytes: int, offset: int) -> bytes:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", failing_read)
        assert store.read(found) == [None, None]
    assert store.stats().misses == {"unreadable": 2}
    assert store.stats().last_error == "Input/output error"
    assert found_tokens(store, range(8)) == 8
    store.remove(root_key(None, None))
    assert store.read(found) == [None, None]
    assert store.stats().misses == {"unreadable": 2, "evicted": 2}
    store.close()


def test_a_file_that_may_not_grow_is_a_tier_error(tmp_path: Path) -> None:
    """A real limit of the system, not an emulated one."""
    code = """
import resource, sys
from pathlib import Path
from store_cases import chain, facts, found_tokens, open_store
from radixkv.errors import TierError
store = open_store(Path(sys.argv[1]), 200_000)
store.write(chain(range(40)))
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
try:
    for number in range(100, 400):
        store.write(chain([number] * 4, facts(used_s=number)))
except TierError as error:
    assert "File too large" in str(error), error
else:
    raise AssertionError("no error")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
store.check_invariants()
assert found_tokens(store, range(40)) == 40
store.write(chain([7] * 9))
store.close()
store = open_store(Path(sys.argv[1]), 200_000)
assert found_tokens(store, range(40)) == 40 and found_tokens(store, [7] * 9) == 9
store.close()
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "kv")], check=True, timeout=60, env=child_environment())


def test_a_folder_without_permission_is_a_tier_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: object, **more: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(TierError, match="cannot be opened: Permission denied"):
        open_store(tmp_path / "kv")


def test_a_name_table_that_is_full_forgets_names_without_pages(tmp_path: Path) -> None:
    store = open_store(tmp_path / "kv", 30_000)
    for number in range(100):
        store.write(chain([1, 2], facts(namespace=(f"{number} " + "x" * 60, None))))
        store.remove(root_key(f"{number} " + "x" * 60, None))
    store.write(chain([1, 2], facts(namespace=("last", None))))
    assert found_tokens(store, [1, 2], ("last", None)) == 2
    store.write(chain([1, 2], facts(namespace=("x" * 9000, None))))  # too long for it: left out
    assert found_tokens(store, [1, 2], ("x" * 9000, None)) == 0
    store.close()
    names = (store.path / "names").read_text()
    assert "last" in names
    assert "xxx" not in names


def test_a_clock_that_was_set_back_keeps_nothing_for_ever(tmp_path: Path) -> None:
    clock = Clock(1_000_000.0)
    store = holding(tmp_path / "kv", 1, clock=clock)
    store.write(chain([1] * 4, facts(used_s=1_000_000)))
    clock.now_s = 1000.0
    store.write(chain([2] * 4, facts(used_s=1000)))
    assert found_tokens(store, [2] * 4) == 4
    capacity = store.capacity_bytes
    store.close()
    clock.now_s = 500.0
    store = open_store(tmp_path / "kv", capacity, clock=clock)
    assert store.hottest(1)[0][1].used_s == 500.0
    store.close()


def test_payloads_of_one_write_and_pages_given_twice(tmp_path: Path) -> None:
    store = open_store(tmp_path / "kv")
    page = chain(range(4))[0]
    store.write([page, page, NewPage(page.parent_key, page.tokens, bytes(PAYLOAD_BYTES), facts(hits=4))])
    assert store.stats().pages == 1
    store.check_invariants()
    store.close()


def test_a_store_that_fails_as_it_is_closed_lets_go_of_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(file: int) -> None:
        raise OSError(5, "Input/output error")

    store = open_store(tmp_path / "kv")
    store.write(chain(range(8)))
    with monkeypatch.context() as patch:
        for name in ("fsync", "fdatasync"):
            patch.setattr(os, name, fails)
        with pytest.raises(TierError, match="failed as it was closed: Input/output error"):
            store.close()
    store = open_store(tmp_path / "kv")
    assert found_tokens(store, range(8)) == 8
    store.close()


def test_a_damaged_page_whose_slot_cannot_be_freed_is_a_miss_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path / "kv")
    store.write(chain(range(8)))
    payloads = next((tmp_path / "kv").rglob("payloads"))
    content = bytearray(payloads.read_bytes())
    content[3] ^= 1
    payloads.write_bytes(content)
    found = store.find(root_key(None, None), ids(*range(8)))
    failing = FailingWrites(monkeypatch, 30)
    failing.calls_left = 0
    assert [payload is None for payload in store.read(found)] == [True, False]
    assert store.stats().misses == {"damaged": 1}
    assert store.stats().last_error == os.strerror(30)
    failing.calls_left = None
    store.check_invariants()
    assert found_tokens(store, range(8)) == 0, "the page after it cannot be reached"
    store.close()
