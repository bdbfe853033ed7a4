"""Stores used by several threads at once: what is read is right, and finding never waits for the medium."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest

from radixkv.cache.page_keys import root_key
from radixkv.errors import ClosedError
from radixkv.tiers.disk_store import DiskStore
from radixkv.tiers.memory_store import HostStore
from store_cases import PAGE_SIZE, PAYLOAD_BYTES, Clock, chain, facts, holding, ids, open_store, payload_of

ROOT = root_key(None, None)


def sequence(rng: random.Random) -> list[int]:
    return [rng.randrange(3) for _ in range(rng.randrange(1, 14))]


@pytest.mark.parametrize("kind", ["disk", "host"])
def test_threads_that_write_and_read_see_right_pages(tmp_path: Path, kind: str) -> None:
    store: DiskStore | HostStore
    if kind == "disk":
        store = holding(tmp_path / "kv", 12)
    else:
        store = HostStore(PAGE_SIZE, PAYLOAD_BYTES, 12 * PAYLOAD_BYTES, clock=Clock())
    wrong: list[BaseException] = []
    right = [0]

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for number in range(120):
                pages = chain(sequence(rng), facts(used_s=float(number)))
                if seed % 2:
                    store.write(pages)
                    store.touch([(page.parent_key, page.tokens, facts(used_s=number + 0.5)) for page in pages[:1]])
                    if number % 40 == 39:
                        store.remove(pages[-1].parent_key)
                found = store.find(ROOT, ids(*sequence(rng)))
                for page, payload in zip(found, store.read(found), strict=True):
                    assert payload in (None, payload_of(page.parent_key, page.tokens))
                    right[0] += payload is not None
                store.hottest(5)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert right[0] > 50
    store.check_invariants()
    assert set(store.stats().misses) <= {"evicted"}
    store.close()


@pytest.mark.parametrize("call", ["pwrite", "pread"])
def test_finding_goes_on_while_the_medium_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    store = open_store(tmp_path / "kv")
    store.write(chain(range(8)))
    found = store.find(ROOT, ids(*range(8)))
    real = getattr(os, call)
    hangs, goes_on = threading.Event(), threading.Event()

    def hanging(*arguments: object) -> object:
        hangs.set()
        assert goes_on.wait(timeout=60)
        return real(*arguments)

    monkeypatch.setattr(os, call, hanging)
    use = (lambda: store.write(chain([9] * 8))) if call == "pwrite" else (lambda: store.read(found))
    thread = threading.Thread(target=use)
    thread.start()
    assert hangs.wait(timeout=60)
    assert store.find(ROOT, ids(*range(8))) == found
    assert store.find(ROOT, ids(9)) == []
    assert store.stats().pages == 2
    assert len(store.hottest(5)) == 2
    goes_on.set()
    thread.join()
    monkeypatch.undo()
    assert store.stats().errors == 0
    store.close()


def test_closing_waits_for_a_write_and_ends_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path / "kv")
    real = os.pwrite
    hangs, goes_on = threading.Event(), threading.Event()

    def hanging(file: int, data: bytes, offset: int) -> int:
        hangs.set()
        assert goes_on.wait(timeout=60)
        return real(file, data, offset)

    monkeypatch.setattr(os, "pwrite", hanging)
    writer = threading.Thread(target=lambda: store.write(chain(range(8))))
    writer.start()
    assert hangs.wait(timeout=60)
    closer = threading.Thread(target=store.close)
    closer.start()
    goes_on.set()
    writer.join()
    closer.join()
    with pytest.raises(ClosedError):
        store.write(chain(range(8)))
    store = open_store(tmp_path / "kv")
    assert len(store.find(ROOT, ids(*range(8)))) == 2
    store.close()


def test_closing_waits_for_those_who_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path / "kv")
    store.write(chain(range(8)))
    found = store.find(ROOT, ids(*range(8)))
    real = os.pread
    hangs, goes_on = threading.Event(), threading.Event()

    def hanging(file: int, num_bytes: int, offset: int) -> bytes:
        hangs.set()
        assert goes_on.wait(timeout=60)
        return real(file, num_bytes, offset)

    payloads: list[bytes | None] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", hanging)
        reader = threading.Thread(target=lambda: payloads.extend(store.read(found)))
        reader.start()
        assert hangs.wait(timeout=60)
        closer = threading.Thread(target=store.close)
        closer.start()
        while closer.is_alive():  # until it waits for the reader
            try:
                store.stats()
                store.find(ROOT, ids(1))
            except ClosedError:
                break
        assert closer.is_alive()
        goes_on.set()
        reader.join()
        closer.join()
    assert payloads == [payload_of(page.parent_key, page.tokens) for page in found]
    assert store.stats().misses == {}
