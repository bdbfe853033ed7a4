"""Models some of whose layers see a window over stores below the pool: window pages go down with their pages."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from oracles import oracle_of
from page_stores import MemoryStore, failing
from prompts import random_ids
from radixkv import Engine, EngineConfig, RequestOutput, SamplingParams
from radixkv.cache.insight.explanation import BelowPool
from radixkv.engine.assembly import assemble
from radixkv.engine.beside_pages import pool_bytes
from radixkv.memory.split_pool import SplitKVPool
from radixkv.tiers import state_copies
from radixkv.tiers.memory_store import HostStore
from radixkv.tiers.page_store import PageStore, is_state_part
from radixkv.tiers.slot_files import PAYLOADS
from radixkv_bench.common.redis_server import NO_SERVER, SERVER, running_redis
from runners import checked
from tier_cores import Core
from tiny_models import served_model

MakeEngine = Callable[..., Engine]
PARAMS = SamplingParams(max_tokens=4, ignore_eos=True)
HEAD = random_ids(1, 50)
COMPUTED = len(HEAD) + PARAMS.max_tokens - 1  # the last token of an output is not computed
WINDOW = 9  # tokens, of the tiny models


@pytest.fixture
def make() -> Iterator[MakeEngine]:
    """Makes engines whose invariants are proved after each step; in the end nothing may be leaked."""
    engines: list[Engine] = []

    def make(family: str = "gemma3", *, stores: Sequence[PageStore] = (), **settings: Any) -> Engine:
        defaults: dict[str, Any] = {"page_size": 4, "kv_cache_tokens": 256, "window_cache_tokens": 64}
        parts = assemble(served_model(family), None, EngineConfig(**{**defaults, **settings}))
        assert isinstance(parts.pool, SplitKVPool)
        engines.append(checked(Engine.from_parts(replace(parts, stores=tuple(stores) or parts.stores))))
        return engines[-1]

    yield make
    for engine in engines:
        engine.check_invariants()
        engine.close()
        stats = engine.stats()
        assert stats.free_pages == stats.cache.num_pages
        assert stats.cache.num_leases == 0


def generate(engine: Engine, *prompts: list[int], family: str = "gemma3", tokens: int = 4) -> list[RequestOutput]:
    """The outputs, which are the unmodified model's; all that went down is written."""
    outputs = engine.generate(list(prompts), SamplingParams(max_tokens=tokens, ignore_eos=True))
    for output in outputs:
        assert output.error is None
        assert output.token_ids == oracle_of(family).continuation(output.prompt_token_ids, tokens)
    assert engine.flush_tiers(30)
    return outputs


def disk_settings(path: Path, capacity_gb: float = 0.01) -> dict[str, Any]:
    return {"disk_cache": str(path / "kv"), "disk_cache_gb": capacity_gb}


def longer(output: RequestOutput, seed: int = 2) -> list[int]:
    """The next turn of a conversation."""
    return [*output.prompt_token_ids, *output.token_ids, *random_ids(seed, 5)]


def memory_store(engine: Engine, name: str = "disk") -> MemoryStore:
    return MemoryStore(engine.config.page_size, pool_bytes(engine.pool).payload_bytes, name)


@pytest.mark.parametrize("max_batch_tokens", [8, 512])
@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gpt_oss", "llama4", "mistral"])
def test_after_a_restart_a_conversation_goes_on_from_its_end(
    make: MakeEngine, tmp_path: Path, family: str, page_size: int, max_batch_tokens: int
) -> None:
    settings = {"page_size": page_size, "max_batch_tokens": max_batch_tokens, **disk_settings(tmp_path)}
    engine = make(family, **settings)
    (first,) = generate(engine, HEAD, family=family)
    engine.close()
    engine = make(family, **settings)
    (second,) = generate(engine, longer(first), family=family)
    assert second.cached_by == {"pool": 0, "disk": COMPUTED}
    (tier,) = engine.stats().tiers
    assert (tier.loads, tier.loaded_tokens, tier.missed) == (1, COMPUTED, 0)
    (third,) = generate(engine, longer(second, 3), family=family)
    assert third.cached_by == {"pool": len(longer(first)) + PARAMS.max_tokens - 1}


@pytest.mark.parametrize("batch_bytes", [1, 3000])
def test_window_pages_are_copied_in_batches_of_any_size(
    make: MakeEngine, monkeypatch: pytest.MonkeyPatch, batch_bytes: int
) -> None:
    expected = memory_store(make())
    (first,) = generate(make(stores=[expected]), HEAD)
    monkeypatch.setattr(state_copies, "BATCH_BYTES", batch_bytes)
    store = memory_store(make())
    generate(make(stores=[store]), HEAD)
    assert {place: page[0] for place, page in store.pages.items()} == {
        place: page[0] for place, page in expected.pages.items()
    }
    (second,) = generate(make(stores=[store]), longer(first))
    assert second.cached_tokens == COMPUTED


def test_a_hit_may_end_anywhere_in_a_prompt(make: MakeEngine, tmp_path: Path) -> None:
    engine = make(**disk_settings(tmp_path))
    generate(engine, HEAD)
    engine.close()
    for shared in (3, 8, 17, 30, 47):
        engine = make(tier_writes="selective", **disk_settings(tmp_path))
        prompt = [*HEAD[:shared], *random_ids(7, 9)]
        assert engine.explain(prompt).below == (BelowPool("disk", shared, "loaded"),)
        (output,) = generate(engine, prompt)
        assert output.cached_by == {"pool": 0, "disk": shared}
        engine.close()


def test_of_a_long_prefix_the_last_windows_parts_alone_are_loaded(make: MakeEngine) -> None:
    store = memory_store(make())
    (first,) = generate(make(stores=[store]), HEAD)
    engine = make(stores=[store])
    generate(engine, longer(first))
    parts_per_page = len([place for place in store.pages if is_state_part(place[1])]) // 14
    (tier,) = engine.stats().tiers
    assert tier.loaded_pages == 14 + 3 * parts_per_page, "53 tokens; the next one sees 45 to 53"


def test_what_was_written_in_a_long_output_is_hit_at_its_end(make: MakeEngine, tmp_path: Path) -> None:
    engine = make(**disk_settings(tmp_path))
    (first,) = generate(engine, HEAD, tokens=60)
    engine.close()
    engine = make(**disk_settings(tmp_path))
    (second,) = generate(engine, longer(first))
    assert second.cached_by == {"pool": 0, "disk": len(HEAD) + 59}


def places_of_parts(store: MemoryStore) -> list[tuple[bytes, bytes]]:
    return [place for place in store.pages if is_state_part(place[1])]


def test_without_window_pages_nothing_is_loaded(make: MakeEngine) -> None:
    store = memory_store(make())
    generate(make(stores=[store]), HEAD)
    for place in places_of_parts(store):
        del store.pages[place]
    engine = make(stores=[store])
    (output,) = generate(engine, HEAD)
    assert output.cached_tokens == 0
    assert engine.stats().tiers[0].loads == store.num_reads == 0


@pytest.mark.parametrize("lost", range(14))
def test_a_hit_ends_before_a_window_page_that_is_lost(make: MakeEngine, lost: int) -> None:
    """`lost` counts pages from the first; hits need those of the last window alone."""
    store = memory_store(make())
    (first,) = generate(make(stores=[store], max_batch_tokens=512), HEAD)
    parts = places_of_parts(store)
    per_page = len(parts) // 14
    del store.pages[parts[lost * per_page + per_page - 1]]
    engine = make(stores=[store])
    (second,) = generate(engine, longer(first))
    assert second.cached_tokens == (COMPUTED if lost < 11 else lost * 4)


@pytest.mark.parametrize("first_lost", [1, 5, 13, 14, 15, 16, 17])
def test_whatever_part_of_a_load_is_lost_the_tokens_are_right(make: MakeEngine, first_lost: int) -> None:
    store = memory_store(make())
    (first,) = generate(make(stores=[store]), HEAD)
    store.change_payloads = lambda payloads: [
        payload if number < first_lost else None for number, payload in enumerate(payloads)
    ]
    engine = make(stores=[store])
    generate(engine, HEAD[:20])  # a window in the pool, which a failed load must not cost
    (second,) = generate(engine, longer(first))
    assert second.cached_tokens in (20, COMPUTED)
    generate(engine, longer(second, 3))


def test_damage_is_a_miss(make: MakeEngine, tmp_path: Path) -> None:
    """Flip a bit of every payload in turn: the tokens are right, and what comes before the damage is loaded."""
    engine = make(**disk_settings(tmp_path))
    (first,) = generate(engine, HEAD)
    payload_bytes = memory_store(engine).payload_bytes
    engine.close()
    (file,) = (tmp_path / "kv").glob(f"*/{PAYLOADS}")
    for slot in range(0, file.stat().st_size // payload_bytes, 3):
        content = bytearray(file.read_bytes())
        content[slot * payload_bytes + 7] ^= 1
        file.write_bytes(content)
        engine = make(**disk_settings(tmp_path))
        (output,) = generate(engine, longer(first))
        assert output.cached_tokens < len(longer(first))
        engine.close()


def test_a_store_that_fails_costs_no_request(make: MakeEngine) -> None:
    store = memory_store(make())
    (first,) = generate(make(stores=[store]), HEAD)
    store.before_read = failing
    engine = make(stores=[store])
    (second,) = generate(engine, longer(first))
    assert second.cached_tokens == 0
    assert engine.stats().tiers[0].read_errors == 1


def test_what_the_pool_holds_in_part_is_gone_on_with_from_below(make: MakeEngine) -> None:
    store = memory_store(make())
    (first,) = generate(make(stores=[store]), HEAD)
    engine = make(stores=[store])
    generate(engine, HEAD[:22])
    (second,) = generate(engine, longer(first))
    assert second.cached_by == {"pool": 22, "disk": COMPUTED - 22}


def test_requests_that_share_a_prefix_load_it_once_and_go_on_apart(make: MakeEngine, tmp_path: Path) -> None:
    engine = make(**disk_settings(tmp_path))
    (first,) = generate(engine, HEAD)
    engine.close()
    engine = make(**disk_settings(tmp_path))
    outputs = generate(engine, *(longer(first, seed) for seed in range(2, 6)))
    assert [output.cached_tokens for output in outputs] == [COMPUTED] * 4
    assert engine.stats().tiers[0].loads == 1


def test_where_no_window_pages_are_left_the_rest_is_computed(make: MakeEngine) -> None:
    store = memory_store(make())
    (first,) = generate(make(stores=[store]), HEAD)
    engine = make(stores=[store], window_cache_tokens=24)
    other = engine.cache.acquire(random_ids(7, 16))
    other.cover(0, 16)
    (output,) = engine.generate([longer(first)], PARAMS)
    assert output.cached_tokens == 0
    other.release()
    (output,) = generate(engine, longer(first))
    assert output.error is None


def test_what_is_used_a_second_time_goes_down(make: MakeEngine, tmp_path: Path) -> None:
    settings = {"tier_writes": "selective", **disk_settings(tmp_path)}
    engine = make(**settings)
    (first,) = generate(engine, HEAD)
    assert engine.stats().tiers[0].written_pages == 0
    generate(engine, longer(first))
    engine.close()
    (again,) = generate(make(**settings), longer(first))
    assert again.cached_by == {"pool": 0, "disk": COMPUTED}


def test_a_prefix_is_handed_down_when_asked_for(make: MakeEngine, tmp_path: Path) -> None:
    settings = {"tier_writes": "selective", **disk_settings(tmp_path)}
    engine = make(**settings)
    (first,) = generate(engine, HEAD)
    assert engine.hand_down(longer(first))
    engine.close()
    (again,) = generate(make(**settings), longer(first))
    assert again.cached_by == {"pool": 0, "disk": COMPUTED}


def test_window_pages_that_the_pool_holds_count_as_used_below(make: MakeEngine) -> None:
    store = memory_store(make())
    engine = make(stores=[store])
    (first,) = generate(engine, HEAD)
    before = {place: store.pages[place][1].used_s for place in places_of_parts(store)}
    generate(engine, longer(first))
    used = [place for place, used_s in before.items() if store.pages[place][1].used_s > used_s]
    assert len(used) == 2 * len(before) // 14, "of the window before the hit's end; the last page has more tokens now"


def test_host_memory_keeps_windows_too(make: MakeEngine) -> None:
    host = HostStore(4, memory_store(make()).payload_bytes, 1 << 20)
    engine = make(stores=[host])
    (first,) = generate(engine, HEAD)
    engine.reset_cache()
    (second,) = generate(engine, longer(first))
    assert second.cached_by == {"pool": 0, "host": COMPUTED}
    host.check_invariants()


def test_another_machine_is_asked_for_windows(make: MakeEngine) -> None:
    shared = memory_store(make(), "shared")
    shared.finds_at_once = False
    (first,) = generate(make(stores=[shared]), HEAD)
    engine = make(stores=[shared])
    (second,) = generate(engine, longer(first))
    assert second.cached_by == {"pool": 0, "shared": COMPUTED}
    num_writes = shared.num_writes
    engine.reset_cache()
    (again,) = generate(engine, longer(first))
    assert again.cached_by == {"pool": 0, "shared": len(longer(first)) - 1}
    assert shared.num_writes == num_writes, "it has all that"


@pytest.mark.skipif(SERVER is None, reason=NO_SERVER)
def test_replicas_share_windows_on_a_server(make: MakeEngine, tmp_path: Path) -> None:
    with running_redis(tmp_path) as server:
        (first,) = generate(make(shared_cache=server.url), HEAD)
        (second,) = generate(make(shared_cache=server.url), longer(first))
        assert second.cached_by == {"pool": 0, "shared": COMPUTED}


def test_a_pool_of_another_split_finds_the_same_store(make: MakeEngine, tmp_path: Path) -> None:
    engine = make(**disk_settings(tmp_path))
    (first,) = generate(engine, HEAD)
    engine.close()
    (second,) = generate(make(window_cache_tokens=32, kv_cache_tokens=128, **disk_settings(tmp_path)), longer(first))
    assert second.cached_by == {"pool": 0, "disk": COMPUTED}


def test_where_no_layer_sees_everything_pages_hold_nothing_and_windows_come_back(make: MakeEngine) -> None:
    engine = make("mistral")
    store = memory_store(engine)
    (first,) = generate(make("mistral", stores=[store]), HEAD, family="mistral")
    assert len(places_of_parts(store)) == 8 * 14, "a window page is in eight parts"
    for place in store.pages.keys() - set(places_of_parts(store)):
        assert not any(store.pages[place][0])
    engine = make("mistral", stores=[store])
    (second,) = generate(engine, [*HEAD[:30], *random_ids(7, 9)], family="mistral")
    assert second.cached_by == {"pool": 0, "disk": 30}
    (third,) = generate(engine, longer(first), family="mistral")
    assert third.cached_by == {"pool": 30, "disk": COMPUTED - 30}


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8_e4m3"])
def test_quantized_windows_come_back(make: MakeEngine, tmp_path: Path, kv_cache_dtype: str) -> None:
    settings = {"kv_cache_dtype": kv_cache_dtype, "attention_backend": "torch", **disk_settings(tmp_path)}
    engine = make(**settings)
    (first,) = engine.generate([HEAD], PARAMS)
    (warm,) = engine.generate([longer(first)], PARAMS)
    engine.flush_tiers()
    engine.close()
    (again,) = make(**settings).generate([longer(first)], PARAMS)
    assert again.cached_by["disk"] >= COMPUTED
    assert again.token_ids == warm.token_ids


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.stress) for seed in range(2, 12))])
def test_at_random(make: MakeEngine, tmp_path: Path, seed: int) -> None:
    """Conversations over pools and a disk that are all too small, and a disk that is damaged now and then."""
    rng = random.Random(seed)
    family = rng.choice(["gemma3", "gpt_oss", "mistral"])
    turns = [random_ids(1000 * seed + number, 12) for number in range(6)]
    loaded_tokens = 0
    for _ in range(2):
        settings = disk_settings(tmp_path, rng.choice([40_000, 80_000, 160_000]) / 1e9)
        small = rng.choice([28, 40, 64])
        engine = make(
            family,
            kv_cache_tokens=160,
            window_cache_tokens=small,
            max_running_requests=3,
            max_batch_tokens=rng.choice([8, 24]),
            tier_writes=rng.choice(["through", "through", "selective"]),
            **settings,
        )
        for _ in range(6):
            chosen = rng.sample(range(6), 3)
            outputs = generate(engine, *(turns[number] for number in chosen), family=family)
            for number, output in zip(chosen, outputs, strict=True):
                turns[number] = longer(output, rng.randrange(999)) if len(turns[number]) < 60 else turns[number][:12]
            loaded_tokens += sum(output.cached_by.get("disk", 0) for output in outputs)
            for file in (tmp_path / "kv").glob(f"*/{PAYLOADS}"):
                if size := file.stat().st_size:
                    with file.open("r+b") as payloads:
                        payloads.seek(rng.randrange(size))
                        payloads.write(b"?")
        engine.close()
    assert loaded_tokens > 0


def test_a_load_gives_its_window_pages_to_a_request_that_runs(make: MakeEngine) -> None:
    store = memory_store(make())
    (first,) = generate(make(stores=[store]), HEAD)
    is_let_go = threading.Event()
    store.before_read = lambda: is_let_go.wait(30)
    config = EngineConfig(page_size=4, kv_cache_tokens=256, window_cache_tokens=20, max_batch_tokens=8)
    core = Core(replace(assemble(served_model("gemma3"), None, config), stores=(store,)))
    prompt = random_ids(9, 6)
    runs = core.add(prompt, SamplingParams(max_tokens=30, ignore_eos=True))
    core.step()  # it has two of five window pages, and will need three
    waits = core.add(longer(first), PARAMS)
    core.step()
    assert [request.load is not None for request in core.core.requests] == [False, True]
    while runs not in core.outputs:
        core.step()
    assert core.outputs[runs].error is None
    assert core.outputs[runs].token_ids == oracle_of("gemma3").continuation(prompt, 30)
    assert core.core.stats().retractions == 1
    is_let_go.set()
    core.run()
    assert core.outputs[waits].error is None
    assert core.outputs[waits].token_ids == oracle_of("gemma3").continuation(longer(first), PARAMS.max_tokens)
    core.core.close()
