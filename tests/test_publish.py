"""KV events over real ZeroMQ sockets: the format, read by msgpack alone; replay, snapshot, drops."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import msgpack
import pytest
import zmq

from radixkv import PrefixCache, RadixTree
from radixkv.cache.events import Cleared, Stored
from radixkv.cache.page_keys import prompt_keys, root_key
from radixkv.config.endpoints import check_endpoint
from radixkv.errors import ConfigError, MissingPackageError
from radixkv.publish.event_queue import EventQueue, Everything
from radixkv.publish.mirror import HeldMirror
from radixkv.publish.publisher import EventPublisher
from radixkv.tiers.memory_store import HostStore
from store_cases import PAGE_SIZE, PAYLOAD_BYTES, Clock, chain, facts
from strategies import PAGE, ids, share, spell

LOCAL = "tcp://127.0.0.1:0"
STORED = {
    "type",
    "block_hashes",
    "parent_block_hash",
    "token_ids",
    "block_size",
    "lora_id",
    "medium",
    "lora_name",
}  # those that vLLM's readers require
OPTIONAL = {"extra_keys", "epoch", "namespace", "tail_hash", "tail_token_ids"}
SALT = "a secret that must not be sent"


def exact_cache(num_pages: int = 16) -> PrefixCache:
    return PrefixCache(num_pages, PAGE, copy_page=lambda source, target, num_tokens: None, diagnostics=False)


class Listener:
    """Sockets of a consumer that knows ZeroMQ and msgpack alone."""

    def __init__(self, publisher: EventPublisher) -> None:
        self._context = zmq.Context()
        self.live = self._context.socket(zmq.SUB)
        self.live.setsockopt(zmq.SUBSCRIBE, publisher.sources.topic.encode())
        self.live.setsockopt(zmq.RCVTIMEO, 10_000)
        self.live.connect(publisher.sources.endpoint)
        self.asking = self._context.socket(zmq.DEALER)
        self.asking.setsockopt(zmq.RCVTIMEO, 10_000)
        self.asking.connect(publisher.sources.replay_endpoint)

    def ask(self, body: bytes) -> tuple[list[list[bytes]], dict[str, Any]]:
        """The messages of an answer as (topic, seq, payload), and what its end says."""
        self.asking.send_multipart([b"", body])
        messages = []
        while True:
            empty, topic, seq, payload = self.asking.recv_multipart()
            assert empty == b""
            if seq == b"\xff" * 8:
                assert topic == b""
                return messages, msgpack.unpackb(payload)
            messages.append([topic, seq, payload])

    def replay(self, start: int) -> tuple[list[list[bytes]], dict[str, Any]]:
        return self.ask(start.to_bytes(8, "big"))

    def close(self) -> None:
        self._context.destroy(linger=0)


@contextmanager
def published(cache: PrefixCache, **settings: Any) -> Iterator[tuple[EventPublisher, Listener]]:
    with closing(EventPublisher(cache, LOCAL, **settings)) as publisher, closing(Listener(publisher)) as listener:
        yield publisher, listener


def events_of(messages: list[list[bytes]]) -> list[dict[str, Any]]:
    events = []
    for _, _, payload in messages:
        timestamp, batch, rank = msgpack.unpackb(payload)
        assert isinstance(timestamp, float)
        assert rank == 0
        events += batch
    return events


def until(listener: Listener, num_events: int) -> list[list[bytes]]:
    """All messages, once they have so many events; asks until then."""
    while True:
        messages, _ = listener.replay(0)
        if len(events_of(messages)) >= num_events:
            return messages


def held_after(messages: list[list[bytes]]) -> dict[str, set[int]]:
    """The names of the pages that each medium holds after these messages; of media that hold something."""
    held: dict[str, set[int]] = {}
    for event in events_of(messages):
        if event["type"] == "AllBlocksCleared":
            held.clear()
        elif event["type"] == "BlockStored":
            held.setdefault(event["medium"], set()).update(event["block_hashes"])
        else:
            held.get(event["medium"], set()).difference_update(event["block_hashes"])
    return {medium: pages for medium, pages in held.items() if pages}


def until_held(listener: Listener, expected: dict[str, list[int]]) -> bool:
    """Asks until these pages are held, by medium."""
    while held_after(listener.replay(0)[0]) != {medium: set(pages) for medium, pages in expected.items()}:
        pass
    return True


def names(tokens: list[int], **namespace: str) -> list[int]:
    return [int.from_bytes(key[:8], "big", signed=True) for key in prompt_keys(tokens, PAGE, **namespace)]


def test_events_have_the_fields_that_readers_of_vllm_require() -> None:
    cache = exact_cache()
    with published(cache, topic="kv@here") as (_, listener):
        until(listener, 1)
        share(cache, "ab")
        until(listener, 2)
        with cache.acquire([*ids("ab"), 1, 2]) as lease:
            lease.commit([*ids("ab"), 1, 2])
        until(listener, 3)
        for leaf in [node for _, node in cache.nodes() if not node.children]:
            cache.remove(leaf)
        until(listener, 4)
        cache.reset()
        messages = until(listener, 5)
        seqs = [int.from_bytes(seq, "big") for _, seq, _ in messages]
        assert seqs == list(range(len(messages)))
        assert {topic for topic, _, _ in messages} == {b"kv@here"}
        start, stored, tail, removed, cleared = events_of(messages)
        epoch = start["epoch"]
        assert start == {"type": "AllBlocksCleared", "epoch": epoch}
        assert STORED <= set(stored) <= STORED | OPTIONAL
        assert stored == {
            "type": "BlockStored",
            "block_hashes": names(ids("ab")),
            "parent_block_hash": None,
            "token_ids": ids("ab"),
            "block_size": PAGE,
            "lora_id": None,
            "medium": "GPU",
            "lora_name": None,
            "epoch": epoch,
            "namespace": root_key(None, None),
        }
        assert all(-(2**63) <= name < 2**63 for name in stored["block_hashes"])
        assert set(tail) >= STORED
        assert (tail["block_hashes"], tail["token_ids"]) == ([], []), "a reader of blocks learns nothing from a tail"
        assert tail["parent_block_hash"] == names(ids("ab"))[1]
        assert (tail["tail_hash"], tail["tail_token_ids"]) == (names([*ids("ab"), 1, 2])[2], [1, 2])
        tail_name = tail["tail_hash"]
        removed_fields = {"type": "BlockRemoved", "block_hashes": [], "medium": "GPU", "epoch": epoch}
        assert removed == {**removed_fields, "tail_hash": tail_name}
        assert cleared == start
        cache.check_invariants()


def test_whole_pages_that_are_evicted_are_removed_by_name() -> None:
    cache = exact_cache(num_pages=3)
    with published(cache) as (_, listener):
        share(cache, "abc")
        share(cache, "x")
        events = events_of(until(listener, 4))
        removed = [event for event in events if event["type"] == "BlockRemoved"]
        assert [(event["block_hashes"], event["medium"]) for event in removed] == [(names(ids("abc"))[2:], "GPU")]


def test_the_live_stream_is_what_a_replay_says() -> None:
    cache = exact_cache()
    with published(cache) as (_, listener):
        while not listener.live.poll(10):  # the first ones may come before the subscription does
            cache.reset()
            share(cache, "a")
        live = [listener.live.recv_multipart()]
        for word in "def":
            until(listener, len(events_of(listener.replay(0)[0])))
            share(cache, word)
        while b"BlockStored" not in live[-1][2] or names(ids("f"))[0] not in events_of(live[-1:])[-1]["block_hashes"]:
            live.append(listener.live.recv_multipart())
        first = int.from_bytes(live[0][1], "big")
        assert {len(frames) for frames in live} == {3}
        assert live == listener.replay(first)[0]


@pytest.mark.parametrize("kind", [zmq.REQ, zmq.DEALER])
def test_replay_answers_as_vllm_does(kind: int) -> None:
    """A REQ socket sends and strips the empty frame; of its answer it takes one message alone."""
    cache = exact_cache()
    with published(cache) as (publisher, listener):
        until(listener, 1)
        for number, word in enumerate("abc"):
            share(cache, word)
            messages = until(listener, number + 2)
        assert listener.replay(1)[0] == messages[1:]
        context = zmq.Context()
        try:
            asking = context.socket(kind)
            asking.setsockopt(zmq.RCVTIMEO, 10_000)
            asking.connect(publisher.sources.replay_endpoint)
            start = (1).to_bytes(8, "big")
            asking.send_multipart([start] if kind == zmq.REQ else [b"", start])
            frames = asking.recv_multipart()
            assert frames == ([] if kind == zmq.REQ else [b""]) + messages[1]
        finally:
            context.destroy(linger=0)


def test_replays_say_whether_all_is_kept() -> None:
    cache = exact_cache()
    with published(cache, buffer_steps=2) as (_, listener):
        until(listener, 1)
        share(cache, "a")
        until(listener, 2)
        assert listener.replay(0)[1]["is_complete"]
        share(cache, "b")
        while listener.replay(0)[1]["next_seq"] < 3:
            pass
        messages, end = listener.replay(0)
        assert (len(messages), end["is_complete"], end["next_seq"]) == (2, False, 3)
        assert listener.replay(1)[1]["is_complete"]


def test_a_snapshot_is_all_that_is_cached_parents_first() -> None:
    cache = exact_cache(64)
    for word in ("abc", "abd", "xy"):
        share(cache, word)
    with cache.acquire([*ids("ab"), 7], extra_key="t", cache_salt=SALT) as lease:
        lease.commit([*ids("ab"), 7])
    with published(cache) as (_, listener):
        share(cache, "abdef")
        until(listener, 8)
        messages, end = listener.ask(b"radixkv snapshot 1")
        assert (end["num_parts"], end["is_complete"]) == (len(messages), True)
        assert {int.from_bytes(seq, "big") for _, seq, _ in messages} == {end["next_seq"]}
        known: set[int] = set()
        for event in events_of(messages):
            assert event["type"] == "BlockStored"
            assert event["parent_block_hash"] is None or event["parent_block_hash"] in known
            known.update([*event["block_hashes"], *([event["tail_hash"]] if "tail_hash" in event else [])])
        whole = [names(ids(word)) for word in ("abc", "abdef", "xy")]
        salted = names([*ids("ab"), 7], extra_key="t", cache_salt=SALT)
        assert known == {name for sequence in [*whole, salted] for name in sequence}


def test_no_salt_is_sent_but_namespaces_are_told_apart() -> None:
    cache = exact_cache()
    with published(cache) as (_, listener):
        with cache.acquire(ids("ab"), extra_key="tenant", cache_salt=SALT) as lease:
            lease.commit(ids("ab"))
        messages = until(listener, 2)
        messages += listener.ask(b"radixkv snapshot 1")[0]
        assert not any(SALT.encode() in payload or b"tenant" in payload for _, _, payload in messages)
        stored = events_of(messages)[1]
        key = root_key("tenant", SALT)
        assert stored["namespace"] == key
        assert stored["extra_keys"] == [["cache_salt", key.hex()], None]


def test_tiers_are_told_of_by_medium() -> None:
    cache, host = exact_cache(3), HostStore(PAGE_SIZE, PAYLOAD_BYTES, 9 * PAYLOAD_BYTES, clock=Clock())
    assert PAGE_SIZE == PAGE
    known = facts(namespace=("tenant", SALT))
    host.write(chain(ids("ab"), known))
    with published(cache, tiers={"CPU": host.watch}) as (_, listener):
        start, there = events_of(until(listener, 2))
        assert start["type"] == "AllBlocksCleared"
        epoch, salted = start["epoch"], names(ids("ab"), extra_key="tenant", cache_salt=SALT)
        assert there == {
            "type": "BlockStored",
            "block_hashes": salted,
            "parent_block_hash": None,
            "token_ids": ids("ab"),
            "block_size": PAGE,
            "lora_id": None,
            "medium": "CPU",
            "lora_name": None,
            "epoch": epoch,
            "namespace": root_key("tenant", SALT),
            "extra_keys": [["cache_salt", root_key("tenant", SALT).hex()], None],
        }
        share(cache, "xyz")
        host.write(chain(ids("xyz")))
        assert until_held(listener, {"GPU": names(ids("xyz")), "CPU": [*salted, *names(ids("xyz"))]})
        share(cache, "d")  # which takes a page of the pool
        held = {"GPU": [*names(ids("xyz"))[:2], *names(ids("d"))], "CPU": [*salted, *names(ids("xyz"))]}
        assert until_held(listener, held)
        messages, end = listener.ask(b"radixkv snapshot 1")
        assert end["is_complete"]
        assert held_after(messages) == {medium: set(pages) for medium, pages in held.items()}
        host.remove(root_key("tenant", SALT))
        cache.reset()
        assert until_held(listener, {"CPU": names(ids("xyz"))})
        messages += listener.replay(0)[0]
        assert sum(event["type"] == "AllBlocksCleared" for event in events_of(messages)) == 1
        assert not any(SALT.encode() in payload or b"tenant" in payload for _, _, payload in messages)


def test_a_request_that_cannot_be_read_harms_nobody() -> None:
    with published(exact_cache()) as (_, listener):
        for frames in ([b""], [b"", b"short"], [b"x", b"12345678"], [b"", b"12345678", b"more"]):
            listener.asking.send_multipart(frames)
        assert listener.replay(0)[1]["next_seq"] >= 0


class Recorded(EventQueue):
    """A queue that nobody reads, over a tree."""

    def __init__(self, tree: RadixTree, max_events: int) -> None:
        self.wakes = 0
        super().__init__(tree.cached_runs, max_events, self._count)
        tree.add_observer(self)

    def _count(self) -> None:
        self.wakes += 1


def test_a_full_queue_drops_and_brings_everything_when_it_was_emptied() -> None:
    tree = RadixTree(PAGE)
    queue = Recorded(tree, max_events=2)
    for number, word in enumerate("abcde"):
        tree.insert(spell(word, PAGE), [number])
    assert (len(queue), queue.num_dropped) == (2, 3)
    assert [type(item) for item in queue.take(9)] == [Stored, Stored]
    tree.evict(PAGE)
    (everything,) = queue.take(9)
    assert isinstance(everything, Everything)
    assert everything.dropped == 4
    assert sorted(run.pages.tolist()[0] for run in everything.runs) == [1, 2, 3, 4]
    tree.insert(spell("z", PAGE), [9])
    assert [type(item) for item in queue.take(9)] == [Stored]
    assert queue.num_dropped == 0


def test_a_full_queue_costs_one_count_and_a_closed_one_nothing() -> None:
    tree = RadixTree(PAGE)
    queue = Recorded(tree, max_events=1)
    tree.insert(spell("a", PAGE), [1])
    for number in range(2, 500):
        tree.insert([number] * PAGE, [number])
    assert (len(queue), queue.num_dropped, queue.wakes) == (1, 498, 0)
    queue.is_closed = True
    tree.insert(spell("b", PAGE), [999])
    assert queue.num_dropped == 498


def test_the_reader_is_woken_once() -> None:
    tree = RadixTree(PAGE)
    queue = Recorded(tree, max_events=9)
    queue.is_sleeping = True
    for number, word in enumerate("abc"):
        tree.insert(spell(word, PAGE), [number])
    assert (queue.wakes, len(queue)) == (1, 3)


def test_the_stream_says_when_it_dropped_something() -> None:
    """The cache changes faster than the thread follows; what was lost is said, and what is cached follows."""
    cache = exact_cache()
    with published(cache, max_queued=1) as (publisher, listener):
        until(listener, 1)
        for number in range(200):
            share(cache, "abcdefghij"[number % 10])
            cache.reset()
        while publisher.queue.num_dropped or len(publisher.queue):
            cache.reset()
            share(cache, "xyz")
        messages = listener.replay(0)[0]
        while names(ids("xyz"))[2] not in events_of(messages)[-1].get("block_hashes", ()):
            messages = listener.replay(0)[0]
        assert any(event.get("dropped") for event in events_of(messages))
        state: set[int] = set()
        for event in events_of(messages):
            if event["type"] == "AllBlocksCleared":
                state.clear()
            elif event["type"] == "BlockStored":
                state.update(event["block_hashes"])
            else:
                state.difference_update(event["block_hashes"])
        assert state == set(names(ids("xyz")))


def test_what_was_lost_is_a_number_in_the_event_that_clears_everything() -> None:
    mirror = HeldMirror(PAGE, epoch=5)
    assert mirror.lose(3) == [{"type": "AllBlocksCleared", "epoch": 5, "dropped": 3}]
    (cleared,) = mirror.apply(Everything([], 4))
    assert cleared == {"type": "AllBlocksCleared", "epoch": 5, "dropped": 4}
    assert mirror.apply(Cleared("pool")) == [{"type": "AllBlocksCleared", "epoch": 5}]


@pytest.mark.parametrize(
    "endpoint", ["", "5557", "tcp://", "tcp://127.0.0.1", "tcp://127.0.0.1:70000", "inproc://x", "udp://a:1", "ipc://"]
)
def test_wrong_addresses_are_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="endpoint must be an address as tcp://"):
        EventPublisher(exact_cache(), endpoint)


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:5557", "tcp://*:0", "ipc:///run/events"])
def test_addresses_of_this_machine_and_of_files_are_taken(endpoint: str) -> None:
    check_endpoint("kv_events", endpoint)


def test_a_taken_address_is_refused() -> None:
    cache = exact_cache()
    with published(cache) as (publisher, _), pytest.raises(ConfigError, match="an address that is free"):
        EventPublisher(cache, publisher.sources.endpoint)


def test_closing_sends_what_waits_and_listens_no_more() -> None:
    cache = exact_cache()
    publisher = EventPublisher(cache, LOCAL)
    publisher.close()
    publisher.close()
    share(cache, "a")
    assert len(publisher.queue) == 0
    assert not publisher.is_running


@pytest.mark.parametrize("module", ["zmq", "msgpack"])
def test_without_a_package_the_error_says_what_to_install(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackageError, match=r"pip install 'radixkv\[events\]'"):
        EventPublisher(exact_cache(), LOCAL)
