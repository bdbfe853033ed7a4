"""Random traffic over a store that misbehaves at random: the model's own tokens, and invariants after every step."""

# ruff: noqa: F811 — fixtures are imported from tier_cores, and named again as parameters

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from oracles import GreedyOracle
from page_stores import MemoryStore, failing
from prompts import random_ids
from radixkv import SamplingParams
from tier_cores import Clock, Core, clock, make_core, store  # noqa: F401


@pytest.mark.parametrize(
    ("writes", "finds_at_once"),
    [
        pytest.param("through", True, marks=pytest.mark.stress),
        ("selective", True),
        pytest.param("back", True, marks=pytest.mark.stress),
        ("back", False),
        pytest.param("through", False, marks=pytest.mark.stress),
    ],
)
def test_whatever_a_store_does_the_tokens_are_those_of_the_model(
    make_core: Callable[..., Core],
    store: MemoryStore,
    clock: Clock,
    oracle: GreedyOracle,
    writes: str,
    finds_at_once: bool,
) -> None:
    rng = random.Random(f"{writes} {finds_at_once}")
    store.finds_at_once = finds_at_once

    def change(payloads: list[bytes | None]) -> list[bytes | None]:
        clock.now_s += rng.choice([0, 0, 0.1])
        at = rng.randrange(len(payloads) + 1)
        kinds: list[Callable[[], list[bytes | None]]] = [
            lambda: [*payloads[:at], *[None] * (len(payloads) - at)],
            lambda: [*payloads[:at], *[b"short"] * (len(payloads) - at)],
            lambda: payloads[:at],
        ]
        return payloads if rng.random() < 0.6 else rng.choice(kinds)()

    def break_sometimes() -> None:
        if rng.random() < 0.07:
            failing()

    store.change_payloads = change
    store.before_read = store.before_write = store.before_find = break_sometimes
    core = make_core(store, kv_cache_tokens=80, max_batch_tokens=16, max_running_requests=4, tier_writes=writes)
    heads = [random_ids(100 + number, 20) for number in range(3)]
    added: dict[int, tuple[list[int], int]] = {}
    aborted: set[int] = set()
    for number in range(30):
        prompt = [*rng.choice(heads)[: rng.randint(4, 20)], *random_ids(number % 7, rng.randint(1, 12))]
        num_tokens = rng.randint(1, 8)
        added[core.add(prompt, SamplingParams(max_tokens=num_tokens, ignore_eos=True))] = prompt, num_tokens
        for _ in range(rng.randint(0, 6)):
            if core.core.has_work:
                core.step()
        clock.now_s += rng.choice([0, 0.1, 1.0, 5.0])
        if rng.random() < 0.1:
            victim = rng.choice(list(added))
            if core.core.abort(victim):
                aborted.add(victim)
                core.core.check_invariants()
        if rng.random() < 0.1:
            core.core.reset_cache()
    core.run()
    for request_id, (prompt, num_tokens) in added.items():
        if request_id not in aborted:
            assert core.outputs[request_id].error is None
            assert core.outputs[request_id].token_ids == oracle.continuation(prompt, num_tokens)
