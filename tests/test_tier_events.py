"""What the tiers below a pool hold, as events tell it: stores in a folder and in memory, without sockets."""

from __future__ import annotations

import os
import random
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgpack
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from radixkv import PrefixCache
from radixkv.cache.page_keys import page_key, prompt_keys, root_key, tail_key
from radixkv.errors import ConfigError, TierError
from radixkv.publish import mirror
from radixkv.publish.following import Following
from radixkv.publish.tier_feed import TierFeed
from radixkv.publish.wire import name_of
from radixkv.tiers.disk_store import DiskStore
from radixkv.tiers.memory_store import HostStore
from radixkv.tiers.page_index import StoredPage
from radixkv.tiers.page_store import NewPage
from radixkv.tiers.slot_files import PAYLOADS
from store_cases import FINGERPRINT, PAGE_SIZE, PAYLOAD_BYTES, Clock, Namespace, chain, facts, holding, ids, open_store

EPOCH = 7
Held = dict[str, dict[int, tuple[Any, ...]]]
"""By medium and name: the name of the page before, and the tokens."""


class Consumer:
    """Knows what is held by events alone, as a reader of the wire would."""

    def __init__(self) -> None:
        self.held: Held = {}
        self.events: list[dict[str, Any]] = []

    def apply(self, events: Sequence[dict[str, Any]], *, parents_first: bool = False) -> None:
        for event in msgpack.unpackb(msgpack.packb(list(events))):
            self.events.append(event)
            assert event["epoch"] == EPOCH
            if event["type"] == "AllBlocksCleared":
                self.held.clear()
                continue
            held = self.held.setdefault(event["medium"], {})
            tails = [event["tail_hash"]] if "tail_hash" in event else []
            if event["type"] == "BlockRemoved":
                for name in [*event["block_hashes"], *tails]:
                    held.pop(name, None)
                continue
            parent, tokens = event["parent_block_hash"], event["token_ids"]
            assert ("namespace" in event) == (parent is None), "a sequence starts in a namespace"
            assert len(tokens) == len(event["block_hashes"]) * PAGE_SIZE
            for number, name in enumerate(event["block_hashes"]):
                assert not parents_first or not any(page[0] == name for page in held.values()), "a child came first"
                held[name] = (parent, tokens[number * PAGE_SIZE : (number + 1) * PAGE_SIZE])
                parent = name
            for name in tails:
                held[name] = (event["parent_block_hash"], event["tail_token_ids"])

    @property
    def names(self) -> dict[str, set[int]]:
        return {medium: set(held) for medium, held in self.held.items() if held}


def contents(store: DiskStore | HostStore) -> dict[int, tuple[Any, ...]]:
    """What a store holds."""
    held: dict[int, tuple[Any, ...]] = {}
    for page in store.watch.pages(lambda: None, 60) or ():
        is_whole = len(page.tokens) == PAGE_SIZE * 4
        key = (page_key if is_whole else tail_key)(page.parent_key, page.tokens)
        is_first = page.parent_key == root_key(*page.facts.namespace)
        tokens = memoryview(page.tokens).cast("i").tolist()
        held[name_of(key)] = (None if is_first else name_of(page.parent_key), tokens)
    return held


def cached(cache: PrefixCache) -> dict[int, tuple[Any, ...]]:
    """What a cache holds."""
    held: dict[int, tuple[Any, ...]] = {}
    for _, run in cache.cached_runs():
        parent = name_of(run.parent_key) if run.start else None
        for number, key in enumerate(run.page_keys):
            held[name_of(key)] = (parent, run.tokens[number * PAGE_SIZE : (number + 1) * PAGE_SIZE].tolist())
            parent = name_of(key)
    return held


def small_cache(num_pages: int = 6) -> PrefixCache:
    copy_page = lambda source, target, num_tokens: None  # noqa: E731
    return PrefixCache(num_pages, PAGE_SIZE, copy_page=copy_page, diagnostics=False)


class Followed:
    """A cache over a disk and a host store, and a consumer of their events."""

    def __init__(self, cache: PrefixCache, *, max_queued: int = 99, **tiers: DiskStore | HostStore) -> None:
        self.cache, self.tiers, self.wakes = cache, tiers, 0
        watches = {medium: store.watch for medium, store in tiers.items()}
        self.following = Following(cache, watches, epoch=EPOCH, max_queued=max_queued, wake=self._wake)
        self.consumer = Consumer()

    def _wake(self) -> None:
        self.wakes += 1

    def follow(self) -> list[dict[str, Any]]:
        """Do what the publisher's thread does. Returns: the events of it."""
        first = len(self.consumer.events)
        for events in self.following.take():
            self.consumer.apply(events)
        for events in self.following.list_stale():
            self.consumer.apply(events)
        return self.consumer.events[first:]

    @property
    def expected(self) -> Held:
        held = {"GPU": cached(self.cache)} | {medium: contents(store) for medium, store in self.tiers.items()}
        return {medium: pages for medium, pages in held.items() if pages}

    def check(self) -> None:
        assert {medium: pages for medium, pages in self.consumer.held.items() if pages} == self.expected
        newcomer = Consumer()
        newcomer.apply(list(self.following.mirror.snapshot()), parents_first=True)
        assert newcomer.held == self.expected
        assert all(event["type"] == "BlockStored" for event in newcomer.events)


def commit(cache: PrefixCache, tokens: list[int], namespace: Namespace = (None, None)) -> None:
    with cache.acquire(tokens, extra_key=namespace[0], cache_salt=namespace[1]) as lease:
        lease.commit(tokens)


def names(tokens: Sequence[int]) -> list[int]:
    return [name_of(key) for key in prompt_keys(list(tokens), PAGE_SIZE)]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[DiskStore]:
    with patch.object(os, "fdatasync", lambda file: None), patch.object(os, "fsync", lambda file: None):
        store = holding(tmp_path / "kv", 6)
        yield store
        store.close()


def test_a_page_that_leaves_the_pool_is_still_told_of_on_disk(disk: DiskStore) -> None:
    followed = Followed(small_cache(3), STORAGE=disk)
    commit(followed.cache, [1] * 12)
    disk.write(chain([1] * 12))
    followed.follow()
    whole = set(names([1] * 12))
    assert followed.consumer.names == {"GPU": whole, "STORAGE": whole}
    commit(followed.cache, [2] * 12)
    followed.follow()
    assert followed.consumer.names == {"GPU": set(names([2] * 12)), "STORAGE": whole}
    followed.check()


def test_pages_that_were_there_at_opening_are_told_of(tmp_path: Path) -> None:
    store = open_store(tmp_path / "kv")
    store.write(chain(range(14), facts(namespace=("tenant", "salt"))))
    store.close()
    store = open_store(tmp_path / "kv")
    followed = Followed(small_cache(), STORAGE=store)
    start, stored, tail = followed.follow()
    assert start == {"type": "AllBlocksCleared", "epoch": EPOCH}
    assert (stored["medium"], stored["token_ids"]) == ("STORAGE", list(range(12))), "one event of pages in a row"
    assert stored["namespace"] == root_key("tenant", "salt")
    assert tail["tail_token_ids"] == [12, 13]
    assert not any(b"salt" in value or b"tenant" in value for value in map(msgpack.packb, (stored["namespace"], tail)))
    followed.check()
    store.close()
    assert followed.follow() == [], "what is on disk stays there"


def test_a_damaged_page_is_removed_and_those_after_it_stay(disk: DiskStore) -> None:
    followed = Followed(small_cache(), STORAGE=disk)
    disk.write(chain(range(12)))
    followed.follow()
    damage(disk, 1)
    assert disk.read(disk.find(root_key(None, None), ids(*range(12))))[1] is None
    (removed,) = followed.follow()
    first, second, third = names(range(12))
    assert removed == {"type": "BlockRemoved", "block_hashes": [second], "medium": "STORAGE", "epoch": EPOCH}
    assert followed.consumer.names == {"STORAGE": {first, third}}
    followed.check()
    disk.write(chain(range(12))[1:2])
    followed.follow()
    followed.check()


def test_pages_may_come_before_their_parents(disk: DiskStore) -> None:
    followed = Followed(small_cache(), STORAGE=disk)
    followed.follow()
    for page in reversed(chain(range(12))):
        disk.write([page])
    events = followed.follow()
    assert [event["block_hashes"][0] for event in events] == list(reversed(names(range(12))))
    assert [event["parent_block_hash"] for event in events] == [*reversed(names(range(12))[:2]), None]
    followed.check()


def test_a_pool_that_is_cleared_leaves_what_tiers_hold(disk: DiskStore) -> None:
    followed = Followed(small_cache(), STORAGE=disk)
    commit(followed.cache, [1] * 10)
    disk.write(chain([1] * 8))
    followed.follow()
    followed.cache.reset()
    events = followed.follow()
    assert [event["type"] for event in events] == ["BlockRemoved", "BlockRemoved"], "of a tail, and of whole pages"
    assert followed.consumer.names == {"STORAGE": set(names([1] * 8))}
    disk.remove(root_key(None, None))
    commit(followed.cache, [1] * 8)
    followed.follow()
    followed.cache.reset()
    assert followed.follow() == [{"type": "AllBlocksCleared", "epoch": EPOCH}]


def test_what_the_pool_lost_is_said_and_tiers_stay(disk: DiskStore) -> None:
    followed = Followed(small_cache(), max_queued=1, STORAGE=disk)
    disk.write(chain([1] * 8))
    followed.follow()
    for number in range(3):
        commit(followed.cache, [number] * 4)
    events = followed.follow()
    assert [event.get("dropped") for event in events if event["type"] == "BlockRemoved"] == [2]
    assert followed.following.is_lost
    assert followed.consumer.names == {"STORAGE": set(names([1] * 8))}
    commit(followed.cache, [9] * 4)
    followed.follow()
    assert not followed.following.is_lost
    followed.check()


def test_a_tier_that_changes_too_fast_is_listed(disk: DiskStore) -> None:
    followed = Followed(small_cache(), max_queued=2, STORAGE=disk)
    disk.write(chain([1] * 8))
    followed.follow()
    for number in range(2, 6):
        disk.write(chain([number] * 8))
    assert followed.following.is_stale
    events = followed.follow()
    assert not followed.following.is_stale
    assert not any(event["type"] == "AllBlocksCleared" or "dropped" in event for event in events)
    followed.check()


def test_a_busy_store_is_listed_later(disk: DiskStore) -> None:
    followed = Followed(small_cache(), STORAGE=disk)
    disk.write(chain([1] * 8))
    disk.watch.pages(followed.follow, 60)  # it follows while the store lists its pages
    assert followed.following.is_stale
    followed.follow()
    followed.check()


def test_a_store_in_memory_ends_with_nothing() -> None:
    host = HostStore(PAGE_SIZE, PAYLOAD_BYTES, 9 * PAYLOAD_BYTES, clock=Clock())
    followed = Followed(small_cache(), CPU=host)
    commit(followed.cache, [1] * 8)
    host.write(chain([1] * 8))
    followed.follow()
    assert followed.consumer.names == {"GPU": set(names([1] * 8)), "CPU": set(names([1] * 8))}
    host.close()
    followed.follow()
    assert followed.consumer.names == {"GPU": set(names([1] * 8))}


def test_an_observer_that_fails_harms_no_store(disk: DiskStore, caplog: pytest.LogCaptureFixture) -> None:
    class Failing:
        def stored(self, page: StoredPage) -> None:
            raise RuntimeError("no")

        removed, cleared = stored, lambda self: None

    disk.watch.start(Failing())
    disk.write(chain([1] * 8))
    disk.check_invariants()
    assert disk.stats().pages == 2
    assert "told nothing more" in caplog.text


def test_nobody_listens_after_the_end(disk: DiskStore) -> None:
    followed = Followed(small_cache(), STORAGE=disk)
    followed.follow()
    disk.write(chain([1] * 4))
    followed.following.stop()
    followed.following.stop()
    disk.write(chain([2] * 4))
    commit(followed.cache, [2] * 4)
    followed.follow()
    assert followed.consumer.names == {"STORAGE": set(names([1] * 4))}
    followed.following.fall_asleep()
    disk.write(chain([3] * 4))
    assert followed.wakes == 0
    Followed(small_cache(), STORAGE=disk)  # another may listen now


def test_a_store_with_a_publisher_refuses_another(disk: DiskStore) -> None:
    host = HostStore(PAGE_SIZE, PAYLOAD_BYTES, 9 * PAYLOAD_BYTES, clock=Clock())
    Followed(small_cache(), STORAGE=disk)
    with pytest.raises(ConfigError, match="one publisher at a time"):
        Followed(small_cache(), CPU=host, STORAGE=disk)
    Followed(small_cache(), CPU=host)  # which is followed by nobody yet


def test_many_pages_are_removed_from_the_end(monkeypatch: pytest.MonkeyPatch, disk: DiskStore) -> None:
    monkeypatch.setattr(mirror, "NAMES_AN_EVENT", 2)
    followed = Followed(small_cache(), STORAGE=disk)
    disk.write(chain([1] * 4))
    commit(followed.cache, [1] * 20)
    followed.follow()
    followed.cache.reset()
    last, middle, first = [event["block_hashes"] for event in followed.follow()]
    assert [*first, *middle, *last] == names([1] * 20)
    assert len(last) == 1


def test_threads_of_stores_wake_the_reader_once(disk: DiskStore) -> None:
    followed = Followed(small_cache(), STORAGE=disk)
    followed.follow()
    followed.following.fall_asleep()
    disk.write(chain([1] * 16))
    assert followed.wakes == 1


def test_threads_that_write_while_another_follows() -> None:
    host = HostStore(PAGE_SIZE, PAYLOAD_BYTES, 12 * PAYLOAD_BYTES, clock=Clock())
    followed = Followed(small_cache(), max_queued=5, CPU=host)

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for number in range(100):
            host.write(chain([rng.randrange(2) for _ in range(rng.randrange(1, 14))], facts(used_s=float(number))))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        followed.follow()
    for thread in threads:
        thread.join()
    followed.follow()
    followed.check()


def damage(disk: DiskStore, slot: int) -> None:
    """Change a byte of a payload."""
    with (disk.path / PAYLOADS).open("r+b") as file:
        file.seek(slot * PAYLOAD_BYTES)
        (byte,) = file.read(1)
        file.seek(slot * PAYLOAD_BYTES)
        file.write(bytes([byte ^ 1]))


namespaces = st.sampled_from([(None, None), ("tenant", "salt")])
sequences = st.lists(st.integers(0, 1), min_size=1, max_size=13)


class EventsBesideStores(RuleBasedStateMachine):
    """Any sequence of calls: a consumer of the events, and one of a snapshot, know what there is."""

    @initialize(num_pages=st.integers(1, 9), max_queued=st.sampled_from([1, 4, 99]))
    def begin(self, num_pages: int, max_queued: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.patches = [patch.object(os, name, lambda file: None) for name in ("fsync", "fdatasync")]
        for each in self.patches:
            each.start()
        self.max_queued = max_queued
        self.disk = holding(Path(self.folder.name) / "kv", num_pages)
        self.start()

    def start(self) -> None:
        host = HostStore(PAGE_SIZE, PAYLOAD_BYTES, 3 * PAYLOAD_BYTES, clock=Clock())
        self.followed = Followed(small_cache(), max_queued=self.max_queued, CPU=host, STORAGE=self.disk)
        self.host = host

    @rule(tokens=sequences, namespace=namespaces, used_s=st.integers(0, 9), first=st.integers(0, 2))
    def write(self, tokens: list[int], namespace: Namespace, used_s: int, first: int) -> None:
        pages = chain(tokens, facts(used_s=float(used_s), namespace=namespace))[first:]
        self.disk.write(pages)
        self.host.write(pages)

    @rule(tokens=sequences, namespace=namespaces, written=st.integers(0, 6))
    def write_that_fails(self, tokens: list[int], namespace: Namespace, written: int) -> None:
        real, calls = os.pwrite, [0]

        def failing(file: int, data: bytes, offset: int) -> int:
            calls[0] += 1
            if calls[0] > written:
                raise OSError(28, "no space")
            return real(file, data, offset)

        with patch.object(os, "pwrite", failing), suppress(TierError):
            self.disk.write(chain(tokens, facts(namespace=namespace)))

    @rule(tokens=sequences, namespace=namespaces)
    def commit(self, tokens: list[int], namespace: Namespace) -> None:
        commit(self.followed.cache, tokens, namespace)

    @rule()
    def reset(self) -> None:
        self.followed.cache.reset()

    @rule(tokens=sequences, namespace=namespaces, number=st.integers(0, 3))
    def remove(self, tokens: list[int], namespace: Namespace, number: int) -> None:
        pages: list[NewPage] = chain(tokens, facts(namespace=namespace))
        self.disk.remove(pages[min(number, len(pages) - 1)].parent_key)

    @rule(tokens=sequences, namespace=namespaces, slot=st.integers(0, 3))
    def damage(self, tokens: list[int], namespace: Namespace, slot: int) -> None:
        if slot < self.disk.stats().pages:
            damage(self.disk, slot)
        self.disk.read(self.disk.find(root_key(*namespace), ids(*tokens)))

    @rule()
    def restart(self) -> None:
        path, capacity = self.disk.path.parent, self.disk.capacity_bytes
        self.followed.following.stop()
        self.disk.close()
        self.disk = DiskStore(path, FINGERPRINT, PAYLOAD_BYTES, capacity, clock=Clock())
        self.start()

    @rule()
    def follow(self) -> None:
        self.followed.follow()
        if not self.followed.following.is_lost:
            self.followed.check()
            return
        expected = self.followed.expected
        for medium in ("CPU", "STORAGE"):
            assert self.followed.consumer.held.get(medium, {}) == expected.get(medium, {})

    @invariant()
    def stores_keep_their_invariants(self) -> None:
        if hasattr(self, "disk"):
            self.disk.check_invariants()
            self.host.check_invariants()

    def teardown(self) -> None:
        if hasattr(self, "disk"):
            self.followed.follow()
            self.followed.cache.reset()
            self.followed.follow()
            self.followed.check()
            self.disk.close()
            self.folder.cleanup()
            for each in self.patches:
                each.stop()


EventsBesideStores.TestCase.settings = settings(max_examples=20, stateful_step_count=25, deadline=None)
TestEventsBesideStores = EventsBesideStores.TestCase


def test_a_feed_begins_with_a_list_and_drops_none_after_it(disk: DiskStore) -> None:
    wakes: list[None] = []
    feed = TierFeed(disk.watch, 1, lambda: wakes.append(None))
    disk.write(chain([1] * 4))
    assert (len(feed), feed.is_stale, feed.take(9)) == (0, True, [])
    assert [page.tokens for page in feed.list_anew() or ()] == [ids(*[1] * 4)]
    disk.write(chain([2] * 4))
    assert (len(feed), feed.is_stale) == (1, False)
    disk.write(chain([3] * 4))
    assert (len(feed), feed.is_stale) == (1, True)
    assert len(feed.list_anew() or ()) == 3
    assert (len(feed), feed.is_stale) == (0, False), "what was listed is not told again"
