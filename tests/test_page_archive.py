"""Archives of pages: what is exported is imported elsewhere; what was damaged is named."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from radixkv.cache.page_keys import root_key
from radixkv.errors import MissingPackageError, TierError
from radixkv.tiers.memory_store import HostStore
from radixkv.tiers.page_archive import MAGIC, _write_block, export_pages, import_pages, read_header
from radixkv.tiers.page_record import payload_checksum
from store_cases import FINGERPRINT, PAGE_SIZE, PAYLOAD_BYTES, Clock, chain, facts, found_tokens, ids, open_store

TENANT = ("tenant \ud800", "")


def host() -> HostStore:
    return HostStore(PAGE_SIZE, PAYLOAD_BYTES, 100 * PAYLOAD_BYTES, clock=Clock())


@pytest.fixture
def archive() -> bytes:
    store = host()
    store.write(chain(range(10), facts(3.5, 7, -2, 1234.5, TENANT)))
    store.write(chain(range(6), facts(2.0)))
    file = io.BytesIO()
    steps: list[int] = []
    assert export_pages(store, FINGERPRINT, store.hottest(99), file, progress=steps.append) == 5
    assert sum(steps) == 5
    return file.getvalue()


def test_an_archive_brings_pages_and_facts_to_another_store(archive: bytes, tmp_path: Path) -> None:
    store = open_store(tmp_path / "kv")
    steps: list[int] = []
    assert import_pages(store, FINGERPRINT, io.BytesIO(archive), progress=steps.append) == 5
    assert sum(steps) == 5
    assert (found_tokens(store, range(10), TENANT), found_tokens(store, range(6))) == (10, 6)
    assert {known for _, known in store.hottest(99)} == {facts(3.5, 7, -2, 1234.5, TENANT), facts(2.0)}
    store.close()
    assert read_header(io.BytesIO(archive)) == (FINGERPRINT, PAYLOAD_BYTES)


def test_any_flipped_byte_and_any_cut_is_named(archive: bytes) -> None:
    for offset in range(len(archive)):
        flipped = archive[:offset] + bytes([archive[offset] ^ 1 << offset % 8]) + archive[offset + 1 :]
        check_refused(flipped)
        check_refused(archive[:offset])


def check_refused(content: bytes) -> None:
    store = host()
    with pytest.raises(TierError) as caught:
        import_pages(store, FINGERPRINT, io.BytesIO(content))
    assert "\n" not in str(caught.value)
    for tokens, namespace in ((range(10), TENANT), (range(6), (None, None))):
        found_tokens(store, tokens, namespace)  # what was stored before it is right
    stored = store.stats().pages
    assert f"; {stored} pages before it are stored" in str(caught.value) or stored == 0


def test_what_fits_another_model_is_refused_by_field(archive: bytes) -> None:
    with pytest.raises(TierError, match="no use here: model is 'none' there and 'yarn' here"):
        import_pages(host(), replace(FINGERPRINT, model="yarn"), io.BytesIO(archive))
    other = HostStore(PAGE_SIZE, 8, 800)
    with pytest.raises(TierError, match="a payload has 96 bytes there and 8 here"):
        import_pages(other, FINGERPRINT, io.BytesIO(archive))
    with pytest.raises(TierError, match=r"no archive of pages$"):
        import_pages(host(), FINGERPRINT, io.BytesIO(b"PK\3\4 something else"))
    with pytest.raises(TierError, match="no archive of pages of this version"):
        import_pages(host(), FINGERPRINT, io.BytesIO(b"rkvpage2"))


def test_pages_that_are_gone_by_now_are_left_out() -> None:
    store = host()
    store.write(chain(range(8)))
    pages = store.hottest(99)
    store.remove(pages[1][0].parent_key)
    file = io.BytesIO()
    assert export_pages(store, FINGERPRINT, pages, file) == 1
    file.seek(0)
    assert import_pages(host(), FINGERPRINT, file) == 1


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch, archive: bytes) -> None:
    monkeypatch.setitem(sys.modules, "msgpack", None)
    with pytest.raises(MissingPackageError, match=r"needs msgpack.*pip install 'radixkv\[tiers\]'"):
        import_pages(host(), FINGERPRINT, io.BytesIO(archive))


@pytest.mark.parametrize("batch_bytes", [1, 2 * PAYLOAD_BYTES, 1 << 24])
def test_pages_are_carried_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch, batch_bytes: int) -> None:
    monkeypatch.setattr("radixkv.tiers.page_archive._BATCH_BYTES", batch_bytes)
    store, other = host(), host()
    store.write(chain(range(10)))
    file, exported, imported = io.BytesIO(), list[int](), list[int]()
    export_pages(store, FINGERPRINT, store.hottest(99), file, progress=exported.append)
    file.seek(0)
    assert import_pages(other, FINGERPRINT, file, progress=imported.append) == 3
    assert found_tokens(other, range(10)) == 10
    sizes = {1: [1, 1, 1], 2 * PAYLOAD_BYTES: [2, 1], 1 << 24: [3]}[batch_bytes]
    assert exported == sizes
    assert [size for size in imported if size] == sizes


def written(header: object, *blocks: object, payload: bytes = bytes(PAYLOAD_BYTES)) -> bytes:
    """An archive as another program may write it: its checksums are right, and `blocks` are what they are."""
    file = io.BytesIO()
    file.write(MAGIC)
    for number, block in enumerate((header, *blocks)):
        _write_block(file, number, block)
        if number and isinstance(block, list):
            file.write(payload)
    return file.getvalue()


HEADER = {"fingerprint": FINGERPRINT.as_dict(), "payload_bytes": PAYLOAD_BYTES}
KEY = root_key(None, None)
RIGHT = [KEY, ids(1, 2, 3), 1.0, 0, 0, None, None, None, payload_checksum(bytes(PAYLOAD_BYTES))]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (written({**HEADER, "payload_bytes": 0}), "the header of the archive is damaged"),
        (written({**HEADER, "payload_bytes": "96"}), "the header of the archive is damaged"),
        (written([1]), "the archive holds no page where page 0 should be"),
        (written(HEADER, "page"), "the archive holds no page where page 1 should be"),
        (written(HEADER, RIGHT[:4]), "page 1 of the archive is damaged"),
        (written(HEADER, [*RIGHT[:2], "yesterday", *RIGHT[3:]]), "page 1 of the archive is damaged"),
        (written(HEADER, [KEY[:3], *RIGHT[1:]]), "page 1 of the archive is damaged"),
        (written(HEADER, [KEY, b"", *RIGHT[2:]]), "page 1 of the archive is damaged"),
        (written(HEADER, [KEY, b"abc", *RIGHT[2:]]), "page 1 of the archive is damaged"),
        (written(HEADER, [KEY, ids(*range(5)), *RIGHT[2:]]), "page 1 of the archive is damaged"),
        (written(HEADER, RIGHT, {"pages": 2}), "the archive ends after 1 pages, not after as many as it says; 1 pages"),
    ],
)
def test_what_is_no_page_is_refused_though_its_checksum_is_right(content: bytes, message: str) -> None:
    assert import_pages(host(), FINGERPRINT, io.BytesIO(written(HEADER, RIGHT, {"pages": 1}))) == 1
    with pytest.raises(TierError, match=message):
        import_pages(host(), FINGERPRINT, io.BytesIO(content))
