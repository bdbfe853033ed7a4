"""What the disk lacks is asked of a server: what goes wrong between the two costs hits, never tokens or pages."""

# ruff: noqa: F811 — fixtures are imported from tier_cores, and named again as parameters

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from oracles import GreedyOracle
from page_stores import Hanging, MemoryStore, failing
from prompts import random_ids
from tier_cores import PROMPT, Clock, Core, clock, make_core, store  # noqa: F401

MakeCore = Callable[..., Core]
LONG = [*PROMPT, *random_ids(5, 20)]
Stores = tuple[MemoryStore, MemoryStore]


@pytest.fixture
def stores(make_core: MakeCore, store: MemoryStore) -> Stores:
    """A disk that holds PROMPT, and a server that holds all of LONG."""
    shared = store
    shared.name, shared.finds_at_once = "shared", False
    disk = MemoryStore(shared.page_size, shared.payload_bytes, "disk")
    for holder, prompt in ((disk, PROMPT), (shared, LONG)):
        core = make_core(holder)
        core.generate(prompt)
        assert core.core.flush_tiers(30)
    return disk, shared


def asking(core: Core, hanging: Hanging, prompt: list[int] = LONG) -> int:
    """A request that has loaded from disk, and waits for the server's answer."""
    request_id = core.add(prompt)
    while not hanging.entered.is_set():
        seen = core.core.arrivals.count
        if core.core.has_work:
            core.step()
        else:
            core.core.arrivals.wait(seen, 0.01)
    core.step_until_it_waits()
    return request_id


def test_a_request_aborted_between_the_two_gives_everything_back(
    make_core: MakeCore, stores: Stores, oracle: GreedyOracle
) -> None:
    stores[1].before_find = hanging = Hanging()
    core = make_core(*stores)
    request_id = asking(core, hanging)
    core.core.abort(request_id)
    core.core.check_invariants()
    assert core.core.stats().cache.leased_pages == 0
    stores[1].before_find = lambda: None
    hanging.go_on.set()
    core.run()
    assert core.generate(LONG).token_ids == oracle.continuation(LONG, 4)


def test_a_server_that_stops_answering_between_the_two_leaves_what_the_disk_gave(
    make_core: MakeCore, stores: Stores, clock: Clock, oracle: GreedyOracle
) -> None:
    stores[1].before_find = hanging = Hanging()
    core = make_core(*stores)
    request_id = asking(core, hanging)
    clock.now_s += 0.6
    core.run()
    output = core.outputs[request_id]
    assert output.token_ids == oracle.continuation(LONG, 4)
    assert output.cached_by == {"pool": 0, "disk": 30}
    hanging.go_on.set()


@pytest.mark.parametrize("point", ["before_find", "before_read"])
def test_a_server_that_dies_between_the_two_leaves_what_the_disk_gave(
    make_core: MakeCore, stores: Stores, oracle: GreedyOracle, point: str
) -> None:
    setattr(stores[1], point, failing)
    core = make_core(*stores)
    output = core.generate(LONG)
    assert output.token_ids == oracle.continuation(LONG, 4)
    assert output.cached_by == {"pool": 0, "disk": 30}


def test_requests_for_the_same_prefix_get_the_same_tokens_whichever_of_them_asks(
    make_core: MakeCore, stores: Stores, oracle: GreedyOracle
) -> None:
    stores[1].before_find = hanging = Hanging()
    core = make_core(*stores)
    prompts = [LONG, LONG, LONG[:40], [*LONG, 7, 8], [*PROMPT[:20], 9, 9]]
    ids = [asking(core, hanging), *map(core.add, prompts[1:])]
    core.step_until_it_waits()
    core.core.abort(ids[0])
    stores[1].before_find = lambda: None
    hanging.go_on.set()
    core.run()
    for request_id, prompt in zip(ids[1:], prompts[1:], strict=True):
        assert core.outputs[request_id].token_ids == oracle.continuation(prompt, 4)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.stress) for seed in range(1, 12))])
def test_whatever_happens_in_between_tokens_are_right_and_no_page_is_lost(
    make_core: MakeCore, stores: Stores, clock: Clock, oracle: GreedyOracle, seed: int
) -> None:
    rng = random.Random(seed)

    def trouble() -> None:
        if rng.random() < 0.15:
            failing()

    for each in stores:
        each.before_find = each.before_read = each.before_write = trouble
    core = make_core(*stores, kv_cache_tokens=128)  # so that requests are retracted
    asked: dict[int, list[int]] = {}
    for _ in range(40):
        prompt = LONG[: rng.randrange(1, len(LONG))] + random_ids(rng.randrange(4), rng.randrange(1, 20))
        asked[core.add(prompt)] = prompt
        for _ in range(rng.randrange(4)):
            if core.core.has_work:
                core.step()
        clock.now_s += rng.choice((0.0, 0.0, 0.01, 0.7))
        if rng.random() < 0.2:
            core.core.abort(rng.choice(list(asked)))
            core.core.check_invariants()
    core.run()
    for request_id, output in core.outputs.items():
        if output.finish_reason != "abort":
            assert output.token_ids == oracle.continuation(asked[request_id], 4)
