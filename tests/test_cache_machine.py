"""Hypothesis and seeded walks drive the tree and the cache at random; plain lists predict every answer exactly."""

from __future__ import annotations

import pytest

from cache_machines import CacheMachine, TreeMachine, run, walk
from radixkv.cache.tree import radix_tree as radix_tree
from strategies import RANKS


@pytest.fixture(autouse=True)
def _small_trees_are_deep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let forks along a path be merged in trees as small as these."""
    monkeypatch.setattr(radix_tree, "SHORTEN_PATHS_LONGER_THAN", 1)
    monkeypatch.setattr(radix_tree, "SHORTEN_EVERY_TICKS", 1)


page_sizes = pytest.mark.parametrize("page_size", [1, 2, 4])
# policies do not see pages: each at one size, and the default one at all of them; every pair is walked for long below
pairs = pytest.mark.parametrize(("policy", "page_size"), [*((policy, 2) for policy in RANKS), ("lru", 1), ("lru", 4)])


@pairs
def test_tree(policy: str, page_size: int) -> None:
    walk(TreeMachine, 100, page_size=page_size, policy=policy)


@pairs
def test_cache(policy: str, page_size: int) -> None:
    walk(CacheMachine, 100, page_size=page_size, policy=policy, copies=True)


@pytest.mark.parametrize("page_size", [1, 4])
def test_found_by_hypothesis(page_size: int) -> None:
    run(TreeMachine, 5, page_size=page_size, policy="lru")
    run(CacheMachine, 5, page_size=page_size, policy="lru", copies=True)
    run(CacheMachine, 3, page_size=page_size, policy="lru", copies=False)


@pytest.mark.stress
@pytest.mark.parametrize("policy", RANKS)
@page_sizes
def test_for_long(policy: str, page_size: int) -> None:
    walk(TreeMachine, 10_000, page_size=page_size, policy=policy)
    walk(CacheMachine, 10_000, page_size=page_size, policy=policy, copies=True)
    run(TreeMachine, 200, page_size=page_size, policy=policy)
    run(CacheMachine, 200, page_size=page_size, policy=policy, copies=True)
    run(CacheMachine, 100, page_size=page_size, policy=policy, copies=False)
