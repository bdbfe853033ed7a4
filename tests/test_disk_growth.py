"""A day of conversations through a small store: its files never pass its bound, and hold what was used last."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from store_cases import Clock, chain, facts, found_tokens, open_store


def folder_size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def replay(path: Path, capacity_bytes: int, payload_bytes: int, num_turns: int) -> None:
    clock, rng = Clock(0.0), random.Random(3)
    store = open_store(path, capacity_bytes, payload_bytes=payload_bytes, clock=clock)
    conversations: list[tuple[str, list[int]]] = []
    for turn in range(num_turns):
        clock.now_s += 86_400 / num_turns
        if not conversations or rng.random() < 0.2:
            tenant = f"tenant {rng.randrange(200)} {'x' * rng.randrange(60)}"
            conversations.append((tenant, [rng.randrange(5), *range(12)]))
        tenant, tokens = conversations[-1 - min(int(rng.expovariate(0.1)), len(conversations) - 1)]
        tokens += [rng.randrange(1000) for _ in range(rng.randrange(1, 30))]
        kept_until_s = clock.now_s + 600 if rng.random() < 0.05 else None
        store.write(
            chain(tokens, facts(clock.now_s, kept_until_s=kept_until_s, namespace=(tenant, None)), payload_bytes)
        )
        if turn % 50 == 0:
            assert folder_size(path) <= capacity_bytes
            assert found_tokens(store, tokens, (tenant, None)) > 0
        if turn % (num_turns // 4) == 1:
            store.check_invariants()
            store.close()
            assert folder_size(path) <= capacity_bytes
            store = open_store(path, capacity_bytes, payload_bytes=payload_bytes, clock=clock)
            assert store.notes == []
    assert store.stats().pages == store.capacity_pages
    store.check_invariants()
    store.close()


def test_a_day_of_conversations_keeps_within_the_bound(tmp_path: Path) -> None:
    replay(tmp_path / "kv", 200_000, 512, num_turns=800)


@pytest.mark.stress
def test_a_busy_day_keeps_within_a_bound_of_a_gigabyte(tmp_path: Path) -> None:
    replay(tmp_path / "kv", 10**9, 96 * 1024, num_turns=6000)
