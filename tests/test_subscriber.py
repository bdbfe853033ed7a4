"""A subscriber over real ZeroMQ sockets: its index equals the caches, whatever is lost or restarted."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from radixkv import PrefixCache
from radixkv.cache.page_keys import prompt_keys, root_key
from radixkv.cluster.index.lower_index import LowerIndex
from radixkv.cluster.index.replica_index import ReplicaIndex
from radixkv.cluster.subscriber.index_sink import IndexSink
from radixkv.cluster.subscriber.subscriber import KVEventSubscriber
from radixkv.errors import ConfigError
from radixkv.publish.publisher import EventPublisher
from radixkv.publish.wire import name_of
from store_cases import chain, open_store
from strategies import PAGE, ids, share

LOCAL = "tcp://127.0.0.1:0"
TIMEOUT_S = 30.0


class Lossy:
    """A PUB socket that loses messages."""

    def __init__(self, pub: Any, share_lost: float, rng: random.Random) -> None:
        self.pub, self._share_lost, self._rng = pub, share_lost, rng
        self.num_lost = 0

    def send_multipart(self, frames: list[bytes]) -> None:
        if self._rng.random() < self._share_lost:
            self.num_lost += 1
        else:
            self.pub.send_multipart(frames)


class Replica:
    """A cache, and a publisher of its events that can begin anew at the same addresses."""

    def __init__(self, name: str, *, num_pages: int = 24) -> None:
        self.name, self.num_pages = name, num_pages
        self.endpoint = self.replay_endpoint = LOCAL
        self.start()

    def start(self, **settings: Any) -> None:
        copy_page = lambda source, target, num_tokens: None  # noqa: E731
        self.cache = PrefixCache(self.num_pages, PAGE, copy_page=copy_page, diagnostics=False)
        self.publisher = EventPublisher(self.cache, self.endpoint, replay_endpoint=self.replay_endpoint, **settings)
        self.endpoint = self.publisher.sources.endpoint
        self.replay_endpoint = self.publisher.sources.replay_endpoint

    def restart(self, **settings: Any) -> None:
        self.publisher.close()
        self.start(**settings)

    def commit(self, tokens: list[int], **namespace: str) -> None:
        with self.cache.acquire(tokens, **namespace) as lease:
            lease.commit(tokens)

    def listen(self, subscriber: KVEventSubscriber) -> None:
        subscriber.add_replica(self.name, self.endpoint, self.replay_endpoint)

    @property
    def names(self) -> set[int]:
        return {name_of(key) for _, run in self.cache.cached_runs() for key in run.page_keys}

    def close(self) -> None:
        self.publisher.close()


@pytest.fixture
def replicas() -> Iterator[list[Replica]]:
    with ExitStack() as stack:
        yield [stack.enter_context(closing(Replica(name))) for name in ("a", "b")]


@pytest.fixture
def subscriber() -> Iterator[KVEventSubscriber]:
    with KVEventSubscriber(ReplicaIndex(PAGE), probe_s=0.05, answer_s=0.2) as subscriber:
        yield subscriber


def follows(subscriber: KVEventSubscriber, *replicas: Replica) -> bool:
    """Wait until the index equals the caches."""

    def equal(_: object) -> bool:
        with subscriber.lock:
            return all(subscriber.index.pages_of(replica.name) == replica.names for replica in replicas)

    return subscriber.wait_for(equal, TIMEOUT_S)


def test_it_follows_several_replicas(replicas: list[Replica], subscriber: KVEventSubscriber) -> None:
    first, second = replicas
    share(first.cache, "ab")  # before it listens
    for replica in replicas:
        replica.listen(subscriber)
    assert follows(subscriber, *replicas)
    share(first.cache, "abc")
    second.commit([*ids("ab"), 1, 2], extra_key="t", cache_salt="s")
    assert follows(subscriber, *replicas)
    with subscriber.lock:
        assert subscriber.index.lookup([*ids("abc"), 9], root_key(None, None)) == {"a": 3 * PAGE}
        assert subscriber.index.lookup([*ids("ab"), 1, 9], root_key("t", "s")) == {"b": 2 * PAGE + 1}
    first.cache.reset()
    assert follows(subscriber, *replicas)
    subscriber.remove_replica("b")
    assert subscriber.wait_for(lambda stats: set(stats) == {"a"}, TIMEOUT_S)
    assert subscriber.index.replicas == ["a"]


def test_what_lies_below_is_known_after_a_restart_and_is_no_part_of_the_pool(tmp_path: Path) -> None:
    store, lower = open_store(tmp_path / "kv"), LowerIndex(PAGE)
    with (
        closing(store),
        closing(Replica("a")) as replica,
        KVEventSubscriber(ReplicaIndex(PAGE), lower=lower, probe_s=0.05, answer_s=0.2) as subscriber,
    ):
        replica.restart(tiers={"STORAGE": store.watch})
        replica.listen(subscriber)
        share(replica.cache, "ab")
        store.write(chain([*ids("abc"), 1]))
        whole = {name_of(key) for key in prompt_keys(ids("abc"), PAGE)}

        def reads(medium: str, expected: set[int]) -> bool:
            def equal(_: object) -> bool:
                with subscriber.lock:
                    return lower.pages_of("a", medium) == expected

            return subscriber.wait_for(equal, TIMEOUT_S) and follows(subscriber, replica)

        assert reads("STORAGE", whole)
        replica.cache.reset()
        assert reads("STORAGE", whole)
        replica.restart(tiers={"STORAGE": store.watch})
        assert subscriber.wait_for(lambda stats: stats["a"].num_restarts == 1, TIMEOUT_S)
        assert reads("STORAGE", whole)
        with subscriber.lock:
            held = subscriber.index.lookup(ids("abcd"), root_key(None, None))
            assert held == {}
            assert lower.lookup(ids("abcd"), root_key(None, None), held) == {"a": 3 * PAGE}
        store.remove(root_key(None, None))
        assert reads("STORAGE", set())
        store.write(chain(ids("x")))
        assert reads("STORAGE", {name_of(key) for key in prompt_keys(ids("x"), PAGE)})
        subscriber.remove_replica("a")
        assert subscriber.wait_for(lambda stats: not stats, TIMEOUT_S)
        assert lower.pages_of("a", "STORAGE") == set()


def test_all_blocks_cleared_is_of_all_media() -> None:
    index, lower = ReplicaIndex(PAGE), LowerIndex(PAGE)
    sink = IndexSink(index, threading.Lock(), "a", lower)
    stored = {"type": "BlockStored", "parent_block_hash": None, "token_ids": ids("a"), "block_hashes": [1]}
    orphan = {**stored, "parent_block_hash": 99, "medium": "STORAGE"}
    assert sink.apply([{**stored, "medium": "GPU"}, orphan])
    assert (index.pages_of("a"), lower.pages_of("a", "STORAGE")) == ({1}, {1})
    assert sink.apply([{"type": "AllBlocksCleared"}])
    assert (index.pages_of("a"), lower.pages_of("a", "STORAGE")) == (set(), set())
    assert not sink.apply([{**orphan, "medium": "GPU"}]), "the pool has no page without the one before"


def test_lost_messages_are_fetched(replicas: list[Replica], subscriber: KVEventSubscriber) -> None:
    replica, _ = replicas
    lossy: Any = Lossy(replica.publisher.live, 0.5, random.Random(0))
    replica.publisher.live = lossy
    replica.listen(subscriber)
    for number in range(50):
        share(replica.cache, "".join(random.Random(number).choices("abc", k=4)))
        if number % 10 == 0:
            assert follows(subscriber, replica)
    assert follows(subscriber, replica)
    assert lossy.num_lost > 0


def test_a_restarted_replica_is_another_epoch(replicas: list[Replica], subscriber: KVEventSubscriber) -> None:
    replica, _ = replicas
    replica.listen(subscriber)
    share(replica.cache, "abc")
    assert follows(subscriber, replica)
    epoch = replica.publisher.sources.epoch
    replica.restart()
    share(replica.cache, "xy")
    assert follows(subscriber, replica)
    assert replica.publisher.sources.epoch != epoch
    expected = (replica.publisher.sources.epoch, 1)
    assert subscriber.wait_for(lambda stats: (stats["a"].epoch, stats["a"].num_restarts) == expected, TIMEOUT_S)


def test_what_is_not_kept_any_more_takes_a_snapshot(replicas: list[Replica], subscriber: KVEventSubscriber) -> None:
    replica, _ = replicas
    replica.restart(buffer_steps=1)
    replica.listen(subscriber)
    share(replica.cache, "a")
    assert follows(subscriber, replica)
    pub = replica.publisher.live
    lossy: Any = Lossy(pub, 1.0, random.Random(0))
    replica.publisher.live = lossy
    while subscriber.stats()["a"].num_snapshots < 2:  # until more is lost between two questions than one message
        replica.cache.reset()
        share(replica.cache, "abcx")
    assert follows(subscriber, replica)


def test_events_that_were_dropped_are_healed(replicas: list[Replica], subscriber: KVEventSubscriber) -> None:
    replica, _ = replicas
    replica.restart(max_queued=1)
    replica.listen(subscriber)
    for number in range(300):
        share(replica.cache, "".join(random.Random(number).choices("abc", k=4)))
    while replica.publisher.queue.num_dropped:
        replica.cache.reset()
        share(replica.cache, "abc")
    assert follows(subscriber, replica)


def test_a_replica_that_is_not_there_yet_is_found_later(subscriber: KVEventSubscriber) -> None:
    with closing(Replica("a")) as replica:
        replica.close()
        replica.listen(subscriber)
        replica.start()
        share(replica.cache, "ab")
        assert follows(subscriber, replica)


def test_wrong_addresses_are_refused(subscriber: KVEventSubscriber) -> None:
    with pytest.raises(ConfigError, match="replay_endpoint must be an address"):
        subscriber.add_replica("a", "tcp://127.0.0.1:5557", "5558")


def test_messages_that_cannot_be_read_are_fetched_again(
    replicas: list[Replica], subscriber: KVEventSubscriber, caplog: pytest.LogCaptureFixture
) -> None:
    replica, _ = replicas

    class Garbled(Lossy):
        def send_multipart(self, frames: list[bytes]) -> None:
            self.pub.send_multipart([*frames[:2], b"\xc1" if self.num_lost % 2 else b"\x93\x01\x02\x03"])
            self.num_lost += 1

    replica.listen(subscriber)
    assert follows(subscriber, replica)
    garbled: Any = Garbled(replica.publisher.live, 0, random.Random(0))
    replica.publisher.live = garbled
    while garbled.num_lost < 4:
        replica.cache.reset()
        share(replica.cache, "ab")
    assert follows(subscriber, replica)
    assert "cannot be read" in caplog.text
