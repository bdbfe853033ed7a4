"""Shares of namespaces in stores: whoever holds more than its own gives way first. A list of pages predicts it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prompts import random_ids
from radixkv import CacheQuota, Engine, EngineConfig, SamplingParams
from radixkv.engine.assembly import assemble
from radixkv.errors import ConfigError
from radixkv.memory.page_bytes import PageBytes
from radixkv.serving.tier_metrics import tier_metrics
from radixkv.tiers.memory_store import HostStore
from radixkv.tiers.page_store import PageFacts
from store_cases import PAGE_SIZE, PAYLOAD_BYTES, Clock, Namespace, chain, facts, found_tokens, holding, open_store
from tiny_models import served_model

ANNA: Namespace = ("anna", None)
BERTA: Namespace = ("berta", None)
FLOOD: Namespace = ("flood", None)
NOW_S = 1000.0


class Stored(NamedTuple):
    number: int
    facts: PageFacts

    def order(self) -> tuple[bool, float, int, float]:
        """Of those that may give way, the smallest goes first."""
        kept_until_s = self.facts.kept_until_s or 0.0
        is_kept = kept_until_s > NOW_S
        return is_kept, kept_until_s if is_kept else 0.0, self.facts.priority, self.facts.used_s


class Oracle:
    """What a store of pages that follow nothing must hold."""

    def __init__(self, num_pages: int, guaranteed: Mapping[Namespace, int]) -> None:
        self.num_pages, self.guaranteed = num_pages, guaranteed
        self.pages: list[Stored] = []

    def line(self, known: PageFacts) -> Namespace | None:
        own, of_key = known.namespace, (known.namespace[0], None)
        return own if own in self.guaranteed else of_key if of_key in self.guaranteed else None

    def held(self, line: Namespace | None) -> int:
        return sum(self.line(page.facts) == line for page in self.pages)

    def share(self, line: Namespace | None) -> int:
        return 0 if line is None else self.guaranteed[line]

    def write(self, new: Stored) -> None:
        if len(self.pages) < self.num_pages:
            self.pages.append(new)
            return
        own = self.line(new.facts)
        lines = {self.line(page.facts) for page in self.pages}
        beyond = {line for line in lines if self.held(line) + (line == own) > self.share(line)}
        candidates = [page for page in self.pages if self.line(page.facts) in (beyond or {own})]
        if not candidates:
            return
        first = min(candidates, key=Stored.order)
        claims = self.line(first.facts) != own and self.held(own) + 1 <= self.share(own)
        if claims or (new.order()[0], new.facts.priority) >= (first.order()[0], first.facts.priority):
            self.pages.remove(first)
            self.pages.append(new)


guarantees = st.sampled_from([{ANNA: 3}, {ANNA: 2, BERTA: 2}, {ANNA: 6}, {ANNA: 0, ("anna", "own"): 2}, {BERTA: 1}])
names = st.sampled_from([ANNA, BERTA, FLOOD, ("anna", "salt"), ("anna", "own")])
kept = st.sampled_from([None, None, None, 900.0, 1500.0, 1600.0])


@given(guarantees, st.lists(st.tuples(names, st.integers(0, 1), kept), max_size=40))
@settings(max_examples=150, deadline=None)
def test_pages_beyond_a_share_give_way_first(
    guaranteed: dict[Namespace, int], writes: list[tuple[Namespace, int, float | None]]
) -> None:
    store = HostStore(PAGE_SIZE, PAYLOAD_BYTES, 6 * PAYLOAD_BYTES, clock=Clock(NOW_S))
    store.set_shares({names: pages * PAYLOAD_BYTES for names, pages in guaranteed.items()})
    oracle = Oracle(6, guaranteed)
    for number, (namespace, priority, kept_until_s) in enumerate(writes):
        known = facts(float(number), 0, priority, kept_until_s, namespace)
        before = {line: oracle.held(line) for line in guaranteed}
        oracle.write(Stored(number, known))
        store.write(chain([number] * PAGE_SIZE, known))
        store.check_invariants()
        found = [n for n, w in enumerate(writes[: number + 1]) if found_tokens(store, [n] * PAGE_SIZE, w[0])]
        assert found == sorted(page.number for page in oracle.pages)
        for line, num_pages in before.items():
            assert oracle.held(line) >= min(num_pages, guaranteed[line])


def test_a_tenants_chain_survives_a_flood_also_after_a_restart(tmp_path: Path) -> None:
    store = holding(tmp_path / "kv", 8)
    capacity, slot_bytes = store.capacity_bytes, 120 + PAYLOAD_BYTES
    store.set_shares({ANNA: 3 * slot_bytes})
    store.write(chain(range(12), facts(used_s=1, namespace=ANNA)))
    for number in range(20, 30):
        store.write(chain([number] * 10, facts(used_s=float(number), priority=5, namespace=FLOOD)))
        store.check_invariants()
    assert found_tokens(store, range(12), ANNA) == 12
    assert [use.used_bytes for use in store.stats().namespaces] == [3 * slot_bytes, 5 * slot_bytes]
    store.close()
    again = open_store(tmp_path / "kv", capacity)
    again.set_shares({ANNA: 3 * slot_bytes})
    again.check_invariants()
    again.write(chain([40] * 30, facts(used_s=40.0, namespace=FLOOD)))
    assert found_tokens(again, range(12), ANNA) == 12
    again.set_shares({})
    again.write(chain([50] * 32, facts(used_s=50.0, namespace=FLOOD)))
    assert found_tokens(again, range(12), ANNA) < 12
    again.check_invariants()
    again.close()


def test_a_write_of_many_pages_counts_those_that_it_brings() -> None:
    store = HostStore(PAGE_SIZE, PAYLOAD_BYTES, 8 * PAYLOAD_BYTES, clock=Clock())
    store.set_shares({ANNA: 4 * PAYLOAD_BYTES, BERTA: 4 * PAYLOAD_BYTES})
    store.write(chain(range(32), facts(used_s=9, priority=5, namespace=ANNA)))
    store.write(chain(range(32), facts(used_s=1, namespace=BERTA)))
    assert [found_tokens(store, range(32), name) for name in (ANNA, BERTA)] == [16, 16]
    store.check_invariants()
    store.set_shares({BERTA: 5 * PAYLOAD_BYTES})
    store.write(chain(range(40, 72), facts(used_s=2, namespace=BERTA)))
    assert found_tokens(store, range(32), ANNA) == 12, "one page was due; for more than that its priority counts"


def test_a_page_whose_facts_change_is_counted_where_it_is() -> None:
    store = HostStore(PAGE_SIZE, PAYLOAD_BYTES, 8 * PAYLOAD_BYTES, clock=Clock())
    store.set_shares({ANNA: 4 * PAYLOAD_BYTES})
    pages = chain(range(12), facts(namespace=ANNA))
    store.write(pages)
    store.touch([(page.parent_key, page.tokens, facts(kept_until_s=2000.0, namespace=BERTA)) for page in pages])
    store.check_invariants()
    store.remove(pages[1].parent_key)
    store.check_invariants()
    assert [use.used_bytes for use in store.stats().namespaces] == [0, PAYLOAD_BYTES]


def test_shares_of_more_than_a_store_holds_are_refused(tmp_path: Path) -> None:
    store = open_store(tmp_path / "kv")
    with pytest.raises(ConfigError, match="more than the store's 40000 bytes; 2 of them guarantee 40001"):
        store.set_shares({ANNA: 40_000, BERTA: 1})
    assert store.stats().namespaces == ()
    store.close()


def test_an_engine_guarantees_shares_of_its_disk(tmp_path: Path) -> None:
    config = EngineConfig(page_size=4, kv_cache_tokens=64, disk_cache=str(tmp_path / "kv"), disk_cache_gb=0.0002)
    with Engine(served_model("llama"), None, config) as engine:
        engine.set_quotas({"anna": CacheQuota(disk_bytes=60_000)})
        engine.generate(random_ids(1, 40), SamplingParams(max_tokens=1), extra_key="anna")
        engine.flush_tiers()
        (anna, _) = engine.stats().tiers[0].store.namespaces
        assert 0 < anna.used_bytes < anna.guaranteed_bytes
        for number in range(2, 30):
            engine.generate(random_ids(number, 40), SamplingParams(max_tokens=1), extra_key="flood")
        engine.flush_tiers()
        (tier,) = engine.stats().tiers
        assert tier.store.pages_evicted > 0
        assert tier.store.namespaces[0] == anna, "nothing of it gave way"
        with pytest.raises(ConfigError, match="more than the store's 200000 bytes"):
            engine.set_quotas({"anna": CacheQuota(pool_tokens=4, disk_bytes=200_001)})
        assert engine.stats().cache.namespaces[0].guaranteed_tokens == 0, "nothing has changed"


def test_an_engine_guarantees_shares_of_host_memory() -> None:
    parts = assemble(served_model("llama"), None, EngineConfig(page_size=4, kv_cache_tokens=64))
    host = HostStore(4, PageBytes(parts.pool).payload_bytes, 20 * 1024)  # type: ignore[arg-type]
    with Engine.from_parts(replace(parts, stores=(host,))) as engine:
        engine.set_quotas({"anna": CacheQuota(host_bytes=10 * 1024)})
        engine.generate(random_ids(1, 40), SamplingParams(max_tokens=1), extra_key="anna")
        engine.flush_tiers()
        for number in range(2, 9):
            engine.generate(random_ids(number, 40), SamplingParams(max_tokens=1), extra_key="flood")
        engine.flush_tiers()
        host.check_invariants()
        (tier,) = engine.stats().tiers
        assert tier.store.pages_evicted > 0
        assert [use.used_bytes for use in tier.store.namespaces] == [10 * 1024, 10 * 1024]
        samples = [sample for metric in tier_metrics([tier]) for sample in metric.samples]
        used = {s.name: s.value for s in samples if s.labels.get("namespace") == "anna" and s.labels["state"] == "used"}
        assert used == {"radixkv_namespace_host_bytes": 10 * 1024}
        (again,) = engine.generate(random_ids(1, 40), SamplingParams(max_tokens=1), extra_key="anna")
        assert again.cached_by == {"pool": 0, "host": 39}
        with pytest.raises(ConfigError, match="more than the store's 20480 bytes"):
            engine.set_quotas({"anna": CacheQuota(host_bytes=20 * 1024 + 1)})
        engine.set_quotas({})
        assert engine.stats().tiers[0].store.namespaces == ()


def test_shares_of_a_disk_that_is_not_there_are_refused() -> None:
    with Engine(served_model("llama"), None, EngineConfig(page_size=4, kv_cache_tokens=64)) as engine:
        with pytest.raises(ConfigError, match="guarantee disk_bytes, and there is no disk_cache"):
            engine.set_quotas({"anna": CacheQuota(disk_bytes=1)})
        with pytest.raises(ConfigError, match="guarantee host_bytes, and there is no host_cache_gb"):
            engine.set_quotas({"anna": CacheQuota(host_bytes=1)})
        engine.set_quotas({"anna": CacheQuota(pool_tokens=8)})
