"""Models with recurrent layers over stores below the pool: states go down with their pages, and come back with them."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from oracles import GreedyOracle
from page_stores import MemoryStore, failing
from prompts import random_ids
from radixkv import Engine, EngineConfig, RequestOutput, SamplingParams
from radixkv.cache.insight.explanation import BelowPool
from radixkv.engine.assembly import assemble
from radixkv.engine.tier_stores import make_stores
from radixkv.errors import ConfigError, OutOfPagesError
from radixkv.memory.page_bytes import PageBytes
from radixkv.memory.state_pool import StatePool
from radixkv.tiers.disk_store import DiskStore
from radixkv.tiers.memory_store import HostStore
from radixkv.tiers.page_archive import export_pages, import_pages
from radixkv.tiers.page_store import PageStore, is_state_part
from radixkv.tiers.slot_files import PAYLOADS
from radixkv.tiers.store_folder import StoreFolder, folder_bytes, read_description
from radixkv_bench.common.redis_server import NO_SERVER, SERVER, running_redis
from recurrent_models import RECURRENT_FAMILIES
from runners import checked
from store_cases import ids
from tiny_models import make_model

MakeEngine = Callable[..., Engine]
PARAMS = SamplingParams(max_tokens=4, ignore_eos=True)
HEAD = random_ids(1, 30)
COMPUTED = len(HEAD) + PARAMS.max_tokens - 1  # the last token of an output is not computed


@cache
def served(family: str) -> tuple[PreTrainedModel, GreedyOracle]:
    """A model, and what its unmodified twin answers."""
    model = make_model(RECURRENT_FAMILIES[family]())
    return model, GreedyOracle(model)


@pytest.fixture
def make() -> Iterator[MakeEngine]:
    """Makes engines whose invariants are proved after each step; in the end nothing may be leaked."""
    engines: list[Engine] = []

    def make(family: str = "lfm2", *, stores: Sequence[PageStore] = (), **settings: Any) -> Engine:
        defaults: dict[str, Any] = {"page_size": 4, "kv_cache_tokens": 256, "state_interval_tokens": 8}
        parts = assemble(served(family)[0], None, EngineConfig(**{**defaults, **settings}))
        engines.append(checked(Engine.from_parts(replace(parts, stores=tuple(stores) or parts.stores))))
        return engines[-1]

    yield make
    for engine in engines:
        engine.check_invariants()
        engine.close()
        stats = engine.stats()
        assert stats.free_pages == stats.cache.num_pages
        assert stats.cache.free_states == stats.cache.states


def generate(engine: Engine, *prompts: list[int], family: str = "lfm2") -> list[RequestOutput]:
    """The outputs, which are the unmodified model's; all that went down is written."""
    outputs = engine.generate(list(prompts), PARAMS)
    for output in outputs:
        assert output.error is None
        assert output.token_ids == served(family)[1].continuation(output.prompt_token_ids, PARAMS.max_tokens)
    assert engine.flush_tiers(30)
    return outputs


def disk_settings(path: Path, capacity_gb: float = 0.01) -> dict[str, Any]:
    return {"disk_cache": str(path / "kv"), "disk_cache_gb": capacity_gb}


def longer(output: RequestOutput, seed: int = 2) -> list[int]:
    """The next turn of a conversation."""
    return [*output.prompt_token_ids, *output.token_ids, *random_ids(seed, 5)]


@pytest.mark.parametrize("family", RECURRENT_FAMILIES)
def test_after_a_restart_a_conversation_goes_on_from_the_state_at_its_end(
    make: MakeEngine, tmp_path: Path, family: str
) -> None:
    engine = make(family, **disk_settings(tmp_path))
    (first,) = generate(engine, HEAD, family=family)
    engine.close()
    engine = make(family, **disk_settings(tmp_path))
    (second,) = generate(engine, longer(first), family=family)
    assert second.cached_by == {"pool": 0, "disk": COMPUTED}
    (tier,) = engine.stats().tiers
    assert (tier.loads, tier.loaded_states, tier.loaded_tokens, tier.missed) == (1, 1, COMPUTED, 0)
    assert engine.stats().computed_tokens == len(longer(first)) - COMPUTED + PARAMS.max_tokens - 1
    (third,) = generate(engine, longer(second, 3), family=family)
    assert third.cached_by == {"pool": len(longer(first)) + PARAMS.max_tokens - 1}


@pytest.mark.parametrize("page_size", [1, 16])
def test_a_hit_ends_at_the_deepest_state_that_stands_after_tokens_of_the_prompt(
    make: MakeEngine, tmp_path: Path, page_size: int
) -> None:
    make_paged = {"page_size": page_size, **disk_settings(tmp_path)}
    engine = make(**make_paged)
    generate(engine, HEAD)
    engine.close()
    for shared, expected in ((5, 0), (9, 8), (23, 16), (30, 30)):
        engine = make(tier_writes="selective", **make_paged)
        prompt = [*HEAD[:shared], *random_ids(7, 9)]
        reached = BelowPool("disk", expected, "loaded")
        assert engine.explain(prompt).below == ((reached,) if expected else ())
        (output,) = generate(engine, prompt)
        assert output.cached_tokens == expected
        engine.close()


def test_a_page_without_a_state_is_not_loaded(make: MakeEngine) -> None:
    engine = make()
    store = memory_store(engine)
    engine = make(stores=[store])
    generate(engine, HEAD)
    for place in [place for place in store.pages if is_state_part(place[1])]:
        del store.pages[place]
    engine = make(stores=[store])
    (output,) = generate(engine, HEAD)
    assert output.cached_tokens == 0
    assert engine.stats().tiers[0].loads == store.num_reads == 0


def memory_store(engine: Engine, name: str = "disk") -> MemoryStore:
    return MemoryStore(engine.config.page_size, PageBytes(engine.pool).payload_bytes, name)  # type: ignore[arg-type]


def parts_after(path: Path, tokens: list[int], page_size: int = 4) -> tuple[Path, list[bytes]]:
    """The file of the payloads of a closed store, and the payload of the first part of the state after `tokens`."""
    (folder,) = StoreFolder(path / "kv", read_only=True).stores()
    _, fingerprint, payload_bytes, capacity_bytes = read_description(folder)
    store = DiskStore(path / "kv", fingerprint, payload_bytes, capacity_bytes, read_only=True)
    rest = tokens[len(tokens) // page_size * page_size :]
    wanted = ids(-1, *rest).ljust(4 * page_size, b"\xff")
    payloads = store.read([page for page, _ in store.pages() if page.tokens == wanted])
    store.close()
    return folder / PAYLOADS, [payload for payload in payloads if payload is not None]


def damage(path: Path, tokens: list[int]) -> None:
    """Flip a bit of the state after `tokens`, which is not at the end of a page."""
    file, (payload,) = parts_after(path, tokens)
    content = bytearray(file.read_bytes())
    content[content.index(payload)] ^= 1
    file.write_bytes(content)


def test_a_damaged_state_costs_the_tokens_since_the_one_before_it(make: MakeEngine, tmp_path: Path) -> None:
    engine = make(**disk_settings(tmp_path))
    (first,) = generate(engine, HEAD)
    engine.close()
    damage(tmp_path, [*HEAD, *first.token_ids][:COMPUTED])
    engine = make(**disk_settings(tmp_path))
    (second,) = generate(engine, longer(first))
    assert second.cached_by == {"pool": 0, "disk": 30}, "the state after the prompt"
    (tier,) = engine.stats().tiers
    assert (tier.missed, tier.loaded_states, tier.loaded_tokens) == (1, 1, 30)
    assert tier.store.misses["damaged"] == 1
    engine.close()
    engine = make(**disk_settings(tmp_path))
    (third,) = generate(engine, longer(second, 3))
    assert third.cached_by["disk"] == len(longer(first)) + PARAMS.max_tokens - 1, "what was computed went down again"


@pytest.mark.parametrize("first_lost", [1, 8, 9, 10, 11])
def test_whatever_part_of_a_load_is_lost_the_tokens_are_right(make: MakeEngine, first_lost: int) -> None:
    store = memory_store(make())
    (first,) = generate(make(stores=[store]), HEAD)
    store.change_payloads = lambda payloads: [
        payload if number < first_lost else None for number, payload in enumerate(payloads)
    ]
    engine = make(stores=[store])
    (second,) = generate(engine, longer(first))
    stats = engine.stats()
    assert second.cached_tokens == (COMPUTED if first_lost == 11 else 0), "9 pages and 2 parts of the state"
    assert stats.tiers[0].missed == (0 if first_lost == 11 else 1), "a store that says the same again is left alone"


def test_a_store_that_fails_costs_no_request(make: MakeEngine) -> None:
    store = memory_store(make())
    (first,) = generate(make(stores=[store]), HEAD)
    store.before_read = failing
    engine = make(stores=[store])
    (second,) = generate(engine, longer(first))
    assert second.cached_tokens == 0
    assert engine.stats().tiers[0].read_errors == 1


def test_requests_that_share_a_prefix_load_it_once_and_go_on_apart(make: MakeEngine, tmp_path: Path) -> None:
    engine = make(**disk_settings(tmp_path))
    (first,) = generate(engine, HEAD)
    engine.close()
    engine = make(**disk_settings(tmp_path))
    outputs = generate(engine, *(longer(first, seed) for seed in range(2, 6)))
    assert [output.cached_tokens for output in outputs] == [COMPUTED] * 4
    assert engine.stats().tiers[0].loads == 1


def test_where_no_slot_is_left_for_a_state_nothing_is_loaded(make: MakeEngine, tmp_path: Path) -> None:
    engine = make(**disk_settings(tmp_path))
    (first,) = generate(engine, HEAD)
    engine.close()
    engine = make(state_slots=3, **disk_settings(tmp_path))
    others = [engine.cache.acquire(random_ids(seed, 4)) for seed in (7, 8, 9)]
    for lease in others:
        lease.cover(0, 4)  # takes a slot
    (output,) = engine.generate([longer(first)], PARAMS)
    assert isinstance(output.error, OutOfPagesError)
    assert engine.stats().tiers[0].loads == 0
    for lease in others:
        lease.release()
    (output,) = generate(engine, longer(first))
    assert output.cached_by == {"pool": 0, "disk": COMPUTED}


def test_what_is_used_a_second_time_goes_down_with_its_state(make: MakeEngine, tmp_path: Path) -> None:
    settings = {"tier_writes": "selective", **disk_settings(tmp_path)}
    engine = make(**settings)
    (first,) = generate(engine, HEAD)
    assert engine.stats().tiers[0].written_pages == 0
    generate(engine, longer(first))
    assert engine.stats().tiers[0].written_pages == 9 + 2, "as far as it was found, and one state"
    engine.close()
    (again,) = generate(make(**settings), longer(first))
    assert again.cached_by == {"pool": 0, "disk": COMPUTED}


def test_a_state_that_is_found_in_the_pool_counts_as_used_below(make: MakeEngine) -> None:
    store = memory_store(make())
    engine = make(stores=[store])
    (first,) = generate(engine, HEAD)
    tokens = [*HEAD, *first.token_ids][:COMPUTED]
    wanted = ids(-1, *tokens[COMPUTED // 4 * 4 :]).ljust(16, b"\xff")
    (place,) = [place for place in store.pages if place[1] == wanted]
    used_s = store.pages[place][1].used_s
    (second,) = generate(engine, longer(first))
    assert second.cached_by == {"pool": COMPUTED}
    assert store.pages[place][1].used_s > used_s
    assert len([place for place in store.pages if place[1] == wanted]) == 1


def test_a_prefix_is_handed_down_with_its_states_when_asked_for(make: MakeEngine, tmp_path: Path) -> None:
    settings = {"tier_writes": "selective", **disk_settings(tmp_path)}
    engine = make(**settings)
    (first,) = generate(engine, HEAD)
    assert engine.hand_down(longer(first))
    engine.close()
    (again,) = generate(make(**settings), longer(first))
    assert again.cached_by == {"pool": 0, "disk": COMPUTED}


def test_states_and_pages_keep_within_the_bound_together(make: MakeEngine, tmp_path: Path) -> None:
    capacity = 60_000
    engine = make(kv_cache_tokens=128, **disk_settings(tmp_path, capacity / 1e9))
    heads = [random_ids(seed, 20) for seed in range(12)]
    for number in range(18):
        generate(engine, [*heads[number * 5 % 12], *random_ids(100 + number, 5)])
        assert sum(map(folder_bytes, [tmp_path / "kv", *StoreFolder(tmp_path / "kv", read_only=True).stores()])) <= (
            capacity
        )
    store = engine.stats().tiers[0].store
    assert store.pages_evicted > 0, "the bound was reached"
    engine.close()
    engine = make(**disk_settings(tmp_path, capacity / 1e9))
    (output,) = generate(engine, [*heads[17 * 5 % 12], *random_ids(100 + 17, 5), 7])
    assert output.cached_tokens == 25, "what was used last is there"


def test_states_of_other_shapes_are_another_store(make: MakeEngine, tmp_path: Path) -> None:
    parts = assemble(served("lfm2")[0], None, EngineConfig(page_size=4, kv_cache_tokens=64))
    assert parts.states is not None
    config = EngineConfig(page_size=4, kv_cache_tokens=64, **disk_settings(tmp_path))
    shapes = parts.states.shapes
    others = [
        [shapes[0]._replace(dtype=torch.float64), *shapes[1:]],
        [shapes[0]._replace(shape=(16, 6)), *shapes[1:]],
        [shapes[0]._replace(kind="recurrent"), *shapes[1:]],
        shapes[::-1],
    ]
    pools = [StatePool(shapes, 3, "cpu"), *(StatePool(other, 3, "cpu") for other in others), None]
    digests = set()
    for pool in pools:
        (store,) = make_stores(config, parts.model, parts.pool, "weights", pool)
        assert isinstance(store, DiskStore)
        digests.add(store.fingerprint.digest())
        store.close()
    assert len(digests) == len(pools)


def test_an_archive_carries_states_with_their_pages(make: MakeEngine, tmp_path: Path) -> None:
    engine = make(**disk_settings(tmp_path))
    (first,) = generate(engine, HEAD)
    engine.close()
    (folder,) = StoreFolder(tmp_path / "kv", read_only=True).stores()
    _, fingerprint, payload_bytes, capacity_bytes = read_description(folder)
    file = io.BytesIO()
    with closing(DiskStore(tmp_path / "kv", fingerprint, payload_bytes, capacity_bytes, read_only=True)) as store:
        num_pages = store.stats().pages
        assert export_pages(store, fingerprint, store.hottest(999), file) == num_pages
    file.seek(0)
    with closing(DiskStore(tmp_path / "there" / "kv", fingerprint, payload_bytes, capacity_bytes)) as store:
        assert import_pages(store, fingerprint, file) == num_pages
    (second,) = generate(make(**disk_settings(tmp_path / "there")), longer(first))
    assert second.cached_by == {"pool": 0, "disk": COMPUTED}


def test_host_memory_keeps_states_too(make: MakeEngine) -> None:
    engine = make()
    host = HostStore(4, PageBytes(engine.pool).payload_bytes, 1 << 20)  # type: ignore[arg-type]
    engine = make(stores=[host])
    (first,) = generate(engine, HEAD)
    engine.reset_cache()
    (second,) = generate(engine, longer(first))
    assert second.cached_by == {"pool": 0, "host": COMPUTED}
    host.check_invariants()


def test_another_machine_is_asked_for_states(make: MakeEngine) -> None:
    shared = memory_store(make(), "shared")
    shared.finds_at_once = False
    (first,) = generate(make(stores=[shared]), HEAD)
    engine = make(stores=[shared])
    (second,) = generate(engine, longer(first))
    assert second.cached_by == {"pool": 0, "shared": COMPUTED}
    num_writes = shared.num_writes
    engine.reset_cache()
    (again,) = generate(engine, longer(first))
    assert again.cached_by == {"pool": 0, "shared": COMPUTED}
    assert shared.num_writes == num_writes, "it has all that"


@pytest.mark.skipif(SERVER is None, reason=NO_SERVER)
def test_replicas_share_states_on_a_server(make: MakeEngine, tmp_path: Path) -> None:
    with running_redis(tmp_path) as server:
        (first,) = generate(make(shared_cache=server.url), HEAD)
        engine = make(shared_cache=server.url)
        (second,) = generate(engine, longer(first))
        assert second.cached_by == {"pool": 0, "shared": COMPUTED}


def test_writing_back_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='"through" or "selective" for models with recurrent layers, not "back"'):
        assemble(served("lfm2")[0], None, EngineConfig(tier_writes="back", **disk_settings(tmp_path)))


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.stress) for seed in range(1, 8))])
def test_at_random(make: MakeEngine, tmp_path: Path, seed: int) -> None:
    """Conversations over a pool, slots and a disk that are all too small, and a disk that is damaged now and then."""
    rng = random.Random(seed)
    turns = [random_ids(1000 * seed + number, 12) for number in range(6)]
    loaded_tokens = 0
    for _ in range(2):
        settings = disk_settings(tmp_path, rng.choice([80_000, 160_000, 320_000]) / 1e9)
        engine = make(kv_cache_tokens=160, state_slots=8, max_running_requests=3, max_batch_tokens=24, **settings)
        for _ in range(4):
            chosen = rng.sample(range(6), 3)
            outputs = generate(engine, *(turns[number] for number in chosen))
            for number, output in zip(chosen, outputs, strict=True):
                turns[number] = longer(output, rng.randrange(999)) if len(turns[number]) < 60 else turns[number][:12]
            loaded_tokens += sum(output.cached_by.get("disk", 0) for output in outputs)
            for file in (tmp_path / "kv").glob(f"*/{PAYLOADS}"):
                with file.open("r+b") as payloads:
                    payloads.seek(rng.randrange(file.stat().st_size))
                    payloads.write(b"?")
        engine.close()
    assert loaded_tokens > 0
