"""A shared store on a real server: what replicas find, and what a server that fails costs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from radixkv.cache.page_keys import root_key
from radixkv.errors import ClosedError, ConfigError, MissingPackageError, TierError
from radixkv.tiers.circuit_breaker import CircuitBreaker
from radixkv.tiers.memory_store import HostStore
from radixkv.tiers.page_store import NewPage
from radixkv.tiers.shared_store import SharedStore
from radixkv_bench.common.redis_server import NO_SERVER, SERVER, RunningRedis, running_redis
from store_cases import FINGERPRINT, PAGE_SIZE, PAYLOAD_BYTES, Clock, chain, facts, found_tokens, ids, payload_of

ROOT = root_key(None, None)
needs_server = pytest.mark.skipif(SERVER is None, reason=NO_SERVER)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRedis]:
    if SERVER is None:
        pytest.skip(NO_SERVER)
    with running_redis(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
def store(server: RunningRedis) -> Iterator[SharedStore]:
    server.client().flushall()
    opened = replica(server.url)
    yield opened
    opened.close()


def replica(url: str, **options: object) -> SharedStore:
    options.setdefault("timeout_s", 5.0)
    options.setdefault("breaker", CircuitBreaker(clock=Clock()))
    return SharedStore(url, FINGERPRINT, PAYLOAD_BYTES, **options)


def test_a_replica_finds_what_another_one_wrote(store: SharedStore, server: RunningRedis) -> None:
    store.write(chain(range(10)))
    store.write(chain([*range(4), 9], facts(namespace=("tenant", "salt"))))
    other = replica(server.url)
    assert found_tokens(other, range(10)) == 10
    assert found_tokens(other, [*range(9), 77]) == 9
    assert found_tokens(other, [*range(6), 77]) == 6
    assert found_tokens(other, [0, 1, 77]) == 2
    assert found_tokens(other, [77]) == 0
    assert found_tokens(other, range(5), ("tenant", "salt")) == 4
    assert found_tokens(other, range(5), ("tenant", None)) == 0
    assert other.find(ROOT, b"") == []
    stats = other.stats()
    assert (stats.pages_read, stats.misses, stats.errors) == (3 + 3 + 2 + 1 + 1, {}, 0)
    another = SharedStore(server.url, replace(FINGERPRINT, weights="other"), PAYLOAD_BYTES)
    assert found_tokens(another, range(10)) == 0
    another.close()
    other.close()


@given(data=st.data())
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_it_finds_what_a_store_in_memory_finds(store: SharedStore, server: RunningRedis, data: st.DataObject) -> None:
    server.client().flushall()
    host = HostStore(PAGE_SIZE, PAYLOAD_BYTES, 200 * PAYLOAD_BYTES)
    sequences = st.lists(st.integers(0, 2), min_size=1, max_size=14)
    for tokens in data.draw(st.lists(sequences, max_size=8)):
        store.write(chain(tokens))
        host.write(chain(tokens))
    asked = data.draw(sequences)
    assert found_tokens(store, asked) == found_tokens(host, asked)


def test_more_pages_than_one_request_asks_for(store: SharedStore) -> None:
    tokens = [number % 7 for number in range(4 * 1030)]
    store.write(chain(tokens))
    assert found_tokens(store, tokens) == len(tokens)
    assert found_tokens(store, tokens[: 4 * 512]) == 4 * 512
    assert found_tokens(store, [*tokens[: 4 * 512 + 1], 99]) == 4 * 512 + 1
    assert store.remove(ROOT) == 1030
    assert found_tokens(store, tokens) == 0


def test_pages_expire_after_their_last_use(store: SharedStore, server: RunningRedis) -> None:
    client = server.client()
    store.write(chain(range(8)))
    for key in client.keys(b"*"):
        assert 24 * 3600 - 60 <= client.ttl(key) <= 24 * 3600
        client.expire(key, 100)
    store.touch((page.parent_key, page.tokens, page.facts) for page in chain(range(4)))
    assert sorted(client.ttl(key) > 100 for key in client.keys(b"*")) == [False, False, True, True]
    store.write(chain(range(8)))
    assert store.stats().pages_written == 2  # nothing is sent twice
    assert min(client.ttl(key) for key in client.keys(b"*:p:*")) > 100
    client.close()


def test_what_the_server_lost_or_damaged_is_a_miss_and_comes_back(store: SharedStore, server: RunningRedis) -> None:
    client = server.client()
    store.write(chain(range(12)))
    found = store.find(ROOT, ids(*range(12)))
    names = {client.strlen(key): key for key in client.keys(b"*:p:*")}
    assert len(names) == 1
    keys = sorted(client.keys(b"*:p:*"))
    content = client.get(keys[0])
    for offset in range(len(content)):
        client.setrange(keys[0], offset, bytes([content[offset] ^ 1]))
        payloads = store.read(found)
        assert sorted(payload is None for payload in payloads) == [False, False, True]
        store.write(chain(range(12)))
    client.set(keys[0], content[:-1])
    assert store.read(found).count(None) == 1
    client.set(keys[0], client.get(keys[1]) or b"")
    assert store.read(found).count(None) == 1
    client.delete(keys[1])
    assert store.read(found).count(None) == 2
    assert store.stats().misses == {"damaged": len(content) + 2, "gone": 2}
    store.write(chain(range(12)))
    assert found_tokens(store, range(12)) == 12
    client.close()


def test_a_page_that_is_gone_is_not_found_in_part_for_ever(store: SharedStore, server: RunningRedis) -> None:
    client = server.client()
    store.write(chain([1, 2, 3]))
    client.delete(*client.keys(b"*:p:*"))
    found = store.find(ROOT, ids(1, 2))
    assert [page.num_tokens for page in found] == [2]
    assert store.read(found) == [None]
    assert store.find(ROOT, ids(1, 2)) == []
    client.close()


@needs_server
def test_a_server_that_hangs_or_is_gone_costs_hits_and_is_left_alone(tmp_path: Path) -> None:
    clock = Clock()
    with running_redis(tmp_path) as server:
        store = replica(server.url, timeout_s=0.5, breaker=CircuitBreaker(max_failures=2, min_pause_s=10, clock=clock))
        store.write(chain(range(8)))
        found = store.find(ROOT, ids(*range(8)))
        server.hang()
        assert store.read(found) == [None, None]
        with pytest.raises(TierError, match=r"cannot be written: .*[Tt]imeout"):
            store.write(chain([5]))
        assert store.find(ROOT, ids(*range(8))) == []  # the server is not asked any more
        assert store.read(found) == [None, None]
        with pytest.raises(TierError, match=r"left alone for 10\.0 s after failures"):
            store.touch([(ROOT, ids(1), facts())])
        assert store.stats().misses == {"unreachable": 2, "paused": 3}
        assert store.stats().errors == 2
        server.go_on()
        clock.now_s += 10
        assert found_tokens(store, range(8)) == 8
        server.stop()
        assert store.find(ROOT, ids(*range(8))) == []
        assert store.read(found) == [None, None]
        assert store.read(found) == [None, None]
        assert store.stats().misses == {"unreachable": 5, "paused": 5}
        server.start()
        clock.now_s += 10
        assert found_tokens(store, range(8)) == 0
        store.write(chain(range(8)))
        assert found_tokens(store, range(8)) == 8
        store.close()


@needs_server
def test_a_server_that_is_full_refuses_pages_and_still_gives_them(tmp_path: Path) -> None:
    with running_redis(tmp_path, "--maxmemory-policy", "noeviction") as server:
        store = replica(server.url)
        store.write(chain(range(8)))
        server.client().config_set("maxmemory", "1")
        for _ in range(5):
            with pytest.raises(TierError, match=r"cannot be written: .*maxmemory"):
                store.write(chain([7] * 8))
        assert found_tokens(store, range(8)) == 8
        assert found_tokens(store, [7] * 8) == 0
        server.client().config_set("maxmemory", "0")
        store.write(chain([7] * 8))
        assert found_tokens(store, [7] * 8) == 8
        store.close()


def test_reading_ends_in_time(server: RunningRedis) -> None:
    clock = Clock()

    class Slow(Clock):
        def __call__(self) -> float:
            clock.now_s += 6
            return clock.now_s

    large = SharedStore(server.url, FINGERPRINT, 1 << 20, timeout_s=5.0, max_read_s=10.0, clock=Slow())
    pages = chain(range(20), payload_bytes=1 << 20)
    large.write(pages)
    payloads = large.read(large.find(ROOT, ids(*range(20))))
    assert [payload is None for payload in payloads] == [False, True, True, True, True]
    assert payloads[0] == payload_of(pages[0].parent_key, pages[0].tokens, 1 << 20)
    assert large.stats().misses == {"slow": 4}
    large.close()


def test_a_shared_store_without_a_server_opens_and_misses() -> None:
    store = replica("redis://:secret@127.0.0.1:1/0")
    assert store.find(ROOT, ids(1)) == []
    with pytest.raises(TierError, match=r"the shared store 127\.0\.0\.1/0 cannot be written") as caught:
        store.write(chain([1]))
    assert "secret" not in str(caught.value)
    assert store.hottest(5) == []
    store.close()
    store.close()
    for use in (lambda: store.find(ROOT, ids(1)), lambda: store.read([]), lambda: store.write(chain([1]))):
        with pytest.raises(ClosedError):
            use()


@pytest.mark.parametrize(
    ("url", "message"),
    [("http://host", "not 'http'"), ("redis.example", "not ''"), ("redis://host:port/0", "is wrong"), ("", "not ''")],
)
def test_a_wrong_url_is_a_config_error(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replica(url)


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(MissingPackageError, match=r"needs redis.*pip install 'radixkv\[tiers\]'"):
        replica("valkey://127.0.0.1")


def test_pages_of_another_shape_are_refused(store: SharedStore) -> None:
    with pytest.raises(ValueError, match="96 bytes, not 1"):
        store.write([NewPage(ROOT, ids(1), b"x", facts())])


def test_a_circuit_breaker_tries_again_after_longer_and_longer_pauses() -> None:
    clock = Clock(0.0)
    breaker = CircuitBreaker(max_failures=2, min_pause_s=1, max_pause_s=3, clock=clock)
    breaker.failed()
    assert breaker.allows()
    breaker.succeeded()
    breaker.failed()
    assert (breaker.allows(), breaker.pause_left_s) == (True, 0.0)
    for pause_s in (1.0, 2.0, 3.0, 3.0):
        breaker.failed()
        assert (breaker.allows(), breaker.pause_left_s) == (False, pause_s)
        clock.now_s += pause_s
        assert breaker.allows()  # one may try
        assert not breaker.allows()
    breaker.succeeded()
    assert breaker.allows()
    assert breaker.allows()
