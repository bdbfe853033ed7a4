"""Damaged disk stores: whatever happens to their files, they give right pages or none, and never crash."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from radixkv.cache.page_keys import root_key
from radixkv.errors import TierError
from radixkv.tiers.disk_store import DiskStore
from radixkv.tiers.page_record import payload_checksum
from radixkv.tiers.slot_files import INDEX, PAYLOADS
from store_cases import (
    FINGERPRINT,
    PAYLOAD_BYTES,
    chain,
    facts,
    found_tokens,
    ids,
    open_store,
    payload_of,
)

TENANT = ("tenant", None)
RECORD_BYTES = 16 + 88 + 16


@pytest.fixture(autouse=True)
def _no_waiting_for_the_medium(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setattr(os, "fdatasync", lambda file: None)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A closed store of four pages, in two namespaces."""
    store = open_store(tmp_path / "kv")
    store.write(chain(range(10), facts(used_s=5, hits=2)))
    store.write(chain(range(3), facts(used_s=6, namespace=TENANT)))
    store.close()
    return tmp_path / "kv"


def files_of(path: Path) -> list[Path]:
    return sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())


def check_right_or_missed(path: Path) -> tuple[int, int]:
    """Open a store that was damaged. Returns the tokens that it has of the two sequences, all of them right."""
    try:
        store = open_store(path, read_only=True)  # what an engine that only reads sees
        found_tokens_or_none(store, range(10))
        store.close()
    except TierError as error:
        assert "\n" not in str(error)  # noqa: PT017
    store = open_store(path)
    kept = found_tokens_or_none(store, range(10)), found_tokens_or_none(store, range(3), TENANT)
    assert all(known.namespace in ((None, None), TENANT) for _, known in store.hottest(99))
    store.check_invariants()
    assert all(item.is_right for item in store.check())  # what was damaged is gone once it was found out
    missed = sum(store.stats().misses.values())
    assert kept == (10, 3) or missed, "a miss has its reason"
    store.write(chain(range(10), facts(used_s=5)))
    store.write(chain(range(3), facts(used_s=6, namespace=TENANT)))
    assert (found_tokens(store, range(10)), found_tokens(store, range(3), TENANT)) == (10, 3)
    assert len(store.hottest(99)) == 4
    store.close()
    store = open_store(path)
    assert (found_tokens(store, range(10)), found_tokens(store, range(3), TENANT)) == (10, 3)
    store.close()
    return kept


def found_tokens_or_none(
    store: DiskStore, tokens: range, namespace: tuple[str | None, str | None] = (None, None)
) -> int:
    """The first tokens whose payloads are there. Asserts that none is wrong."""
    found = store.find(root_key(*namespace), ids(*tokens))
    count = 0
    for page, payload in zip(found, store.read(found), strict=True):
        if payload is None:
            break
        assert payload == payload_of(page.parent_key, page.tokens)
        count += page.num_tokens
    return count


def fresh(small: Path, copy: Path) -> None:
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(small, copy)


def check_as_reader(path: Path) -> int:
    """Open a store that was damaged, without mending anything. Returns the tokens that are missed."""
    try:
        store = open_store(path, read_only=True)
    except TierError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return 13
    kept = found_tokens_or_none(store, range(10)) + found_tokens_or_none(store, range(3), TENANT)
    assert kept == 13 or sum(store.stats().misses.values()), "a miss has its reason"
    store.close()
    return 13 - kept


def test_any_flipped_byte_is_a_miss_at_most(small: Path, tmp_path: Path) -> None:
    missed = {}
    for name in files_of(small):
        file, content = small / name, (small / name).read_bytes()
        for offset in range(len(content)):
            flipped = bytearray(content)
            flipped[offset] ^= (1 << offset % 8) if offset % 3 else 0xFF
            file.write_bytes(flipped)
            missed[file.name, offset] = check_as_reader(small)
            if offset % 13 == 0:
                fresh(small, tmp_path / "copy")
                check_right_or_missed(tmp_path / "copy")
        file.write_bytes(content)
    assert {name for (name, _), tokens in missed.items() if tokens} == {INDEX, PAYLOADS}
    assert sum(tokens > 0 for tokens in missed.values()) == 4 * (PAYLOAD_BYTES + RECORD_BYTES)


def test_any_file_cut_anywhere_is_a_miss_at_most(small: Path, tmp_path: Path) -> None:
    for name in files_of(small):
        file, content = small / name, (small / name).read_bytes()
        for length in sorted({0, len(content) - 1, *range(0, len(content), 3)}):
            file.write_bytes(content[:length])
            check_as_reader(small)
            if length % 13 == 0:
                fresh(small, tmp_path / "copy")
                check_right_or_missed(tmp_path / "copy")
        file.write_bytes(content)


def test_any_file_gone_or_longer_is_a_miss_at_most(small: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for name in files_of(small):
        fresh(small, copy)
        with (copy / name).open("ab") as longer:
            longer.write(b"more than there was" * 20)
        check_right_or_missed(copy)
        if name.name != "radixkv-store":  # without it, the folder is no store
            fresh(small, copy)
            (copy / name).unlink()
            check_right_or_missed(copy)


def test_a_file_cut_under_an_open_store_is_a_miss(small: Path) -> None:
    store = open_store(small)
    found = store.find(root_key(None, None), ids(*range(10)))
    os.truncate(store.path / PAYLOADS, PAYLOAD_BYTES + 5)
    os.truncate(store.path / INDEX, 7)
    payloads = store.read(found)
    assert [payload is None for payload in payloads] == [False, True, True]
    assert store.stats().misses == {"damaged": 2}
    store.write(chain(range(10)))
    assert found_tokens(store, range(10)) == 10
    store.check_invariants()
    store.close()


@pytest.mark.parametrize(("name", "size"), [(INDEX, RECORD_BYTES), (PAYLOADS, PAYLOAD_BYTES)])
def test_two_swapped_slots_are_misses(small: Path, tmp_path: Path, name: str, size: int) -> None:
    for left, right in [(0, 1), (0, 2), (1, 2), (2, 3)]:
        copy = tmp_path / "copy"
        fresh(small, copy)
        file = next(copy.rglob(name))
        content = file.read_bytes()
        assert len(content) == 4 * size
        parts = [content[start : start + size] for start in range(0, len(content), size)]
        parts[left], parts[right] = parts[right], parts[left]
        file.write_bytes(b"".join(parts))
        kept = check_right_or_missed(copy)
        assert kept[0] == 4 * min(left, 2)


def test_a_copied_record_and_payload_in_another_slot_is_a_miss(small: Path) -> None:
    for name, size in ((INDEX, RECORD_BYTES), (PAYLOADS, PAYLOAD_BYTES)):
        file = next(small.rglob(name))
        content = file.read_bytes()
        file.write_bytes(content + content[:size])
    store = open_store(small)
    assert store.stats().misses == {"damaged": 1}
    assert found_tokens(store, range(10)) == 10
    store.close()


def test_old_files_beside_new_ones_give_right_pages(small: Path, tmp_path: Path) -> None:
    fresh(small, tmp_path / "old")
    store = open_store(small)
    store.remove(root_key(None, None))
    store.write(chain(range(70, 82), facts(used_s=9)))
    store.close()
    fresh(small, tmp_path / "new")
    for name in (INDEX, PAYLOADS, "names", "store.json"):
        fresh(tmp_path / "new", tmp_path / "copy")
        shutil.copy(next((tmp_path / "old").rglob(name)), next((tmp_path / "copy").rglob(name)))
        store = open_store(tmp_path / "copy")
        found_tokens_or_none(store, range(70, 82))
        found_tokens_or_none(store, range(10))
        assert found_tokens_or_none(store, range(3), TENANT) == 3
        assert all(item.is_right for item in store.check()) or name in (INDEX, PAYLOADS)
        store.check_invariants()
        store.close()


def test_an_old_store_as_a_whole_is_a_store(small: Path, tmp_path: Path) -> None:
    fresh(small, tmp_path / "old")
    store = open_store(small)
    store.write(chain(range(70, 82)))
    store.close()
    fresh(tmp_path / "old", small)
    assert check_right_or_missed(small) == (10, 3)


def test_files_of_another_store_are_damaged_ones(small: Path, tmp_path: Path) -> None:
    other = open_store(tmp_path / "other", fingerprint=replace(FINGERPRINT, weights="others"))
    for name in (INDEX, PAYLOADS):
        shutil.copy(next(small.rglob(name)), other.path / name)
    other.close()
    other = open_store(tmp_path / "other", fingerprint=replace(FINGERPRINT, weights="others"))
    assert other.stats().pages == 0
    assert other.stats().misses == {"damaged": 4}
    assert "4 damaged records" in other.notes[0]
    other.close()


@pytest.mark.parametrize("size", [1, 8, 100, 4096, 4104, 12_288, 20_000])
def test_a_checksum_sees_changed_and_moved_bytes(size: int) -> None:
    content = bytes((7 * number + number // 251) % 256 for number in range(size))
    right = payload_checksum(content)
    for offset in range(0, size, max(size // 200, 1)):
        changed = bytearray(content)
        changed[offset] ^= 16
        assert payload_checksum(bytes(changed)) != right
    for step in (512, 4096):
        if size >= 2 * step:
            moved = bytearray(content)
            moved[:step], moved[step : 2 * step] = content[step : 2 * step], content[:step]
            assert payload_checksum(bytes(moved)) != right
    assert payload_checksum(content + b"\0") != right
    assert payload_checksum(bytes(size)) != payload_checksum(bytes(size + 1))
