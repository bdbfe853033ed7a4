"""A million operations on a prefix cache at each page size, with simulated KV. Run by `scripts/test -m stress -s`."""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from itertools import cycle, islice
from typing import ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from radixkv import Lease, PrefixCache
from radixkv.cache.eviction.policies import POLICIES
from radixkv.cache.eviction.policy import EvictionPolicy
from radixkv.cache.insight.prefix_hash import namespace_seed, prefix_hashes
from radixkv.cache.tree.node import Namespace, TreeNode
from radixkv.errors import OutOfPagesError
from strategies import NAMESPACES

pytestmark = pytest.mark.stress

NUM_OPERATIONS = 1_000_000
POOL_TOKENS = 4096
MAX_TOKENS = 200
MOST_OPEN = 6
CHECK_EVERY = 25_000


class Traffic:
    """Requests that share prefixes of all lengths, in few tokens, so that they part and meet all the time."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._past: list[list[int]] = [[0]]

    def prompt(self) -> NDArray[np.int32]:
        rng = self._rng
        before = rng.choice(self._past)
        kept = before[: rng.randint(0, len(before))] if rng.random() < 0.7 else before
        tokens = (kept + rng.choices(range(8), k=rng.randint(1, 40)))[:MAX_TOKENS]
        if len(self._past) < 400:
            self._past.append(tokens)
        else:
            self._past[rng.randrange(400)] = tokens
        return np.array(tokens, np.int32)


class Serving:
    """A cache, the KV that its pages hold, and the requests that run on it.

    The KV of a token is a hash of its namespace and of all tokens up to it.
    """

    def __init__(self, page_size: int, policy: str, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now_s = 0.0
        self.counts = Counter[str]()
        self.page_size = page_size
        self.kv = np.zeros((POOL_TOKENS // page_size, page_size), np.uint64)
        self.cache = PrefixCache(
            len(self.kv),
            page_size,
            self.counted(policy),
            copy_page=self.copy_page,
            clock=lambda: self.now_s,
            diagnostics=False,
        )
        self.traffic = Traffic(self.rng)
        self.open: list[tuple[Lease, NDArray[np.int32], Namespace]] = []

    def counted(self, policy: str) -> EvictionPolicy:
        """Return a policy of that name that counts the cuts and merges it is told of."""
        counts, base = self.counts, POLICIES[policy]

        class Counted(base):  # type: ignore[misc, valid-type]
            def split(self, upper: TreeNode, lower: TreeNode) -> None:
                counts["cuts"] += 1
                super().split(upper, lower)

            def merged(self, upper: TreeNode, lower: TreeNode) -> None:
                counts["merges"] += 1
                super().merged(upper, lower)

        return Counted()

    def copy_page(self, source: int, target: int, num_tokens: int) -> None:
        self.kv[target, :num_tokens] = self.kv[source, :num_tokens]

    def slots(self, lease: Lease, first: int, last: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        positions = np.arange(first, last)
        return lease.pages[positions // self.page_size], positions % self.page_size

    def compute(self, lease: Lease, tokens: NDArray[np.int32], namespace: Namespace, first: int) -> None:
        """Write the KV of `tokens[first:]`, and find that of the tokens before where it should be."""
        values = prefix_hashes(tokens, 1, namespace_seed(*namespace))
        assert np.array_equal(self.kv[self.slots(lease, 0, first)], values[:first]), "a cached token has another's KV"
        self.kv[self.slots(lease, first, len(tokens))] = values[first:]

    # -- operations --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        tokens, namespace = self.traffic.prompt(), self.rng.choice(NAMESPACES)
        extra_key, cache_salt = namespace
        lease = self.cache.acquire(
            tokens,
            extra_key=extra_key,
            cache_salt=cache_salt,
            max_cached_tokens=len(tokens) - 1,
            priority=self.rng.randint(0, 2),
            keep_for_s=self.rng.choice([None, None, 5.0]),
        )
        self.open.append((lease, tokens, namespace))
        self.compute(lease, tokens, namespace, lease.cached_tokens)

    def serve(self) -> None:
        """A request from its start to its end."""
        self.start()
        lease, tokens, _ = self.open.pop()
        with lease:
            assert lease.commit(tokens) == len(tokens)

    def extend(self) -> None:
        """A request that runs generates some tokens."""
        if self.open:
            lease, tokens, namespace = self.open.pop(self.rng.randrange(len(self.open)))
            new = np.array(self.rng.choices(range(8), k=self.rng.randint(1, 24)), np.int32)
            longer = np.concatenate([tokens, new])
            self.open.append((lease, tokens, namespace))
            lease.grow(len(longer))
            self.compute(lease, longer, namespace, len(tokens))
            lease.commit(longer)
            self.open[-1] = (lease, longer, namespace)

    def finish(self) -> None:
        if self.open:
            lease, tokens, _ = self.open.pop(self.rng.randrange(len(self.open)))
            lease.commit(tokens)
            lease.release()

    def fail(self) -> None:
        """A request ends without having committed what it computed last."""
        if self.open:
            self.open.pop(self.rng.randrange(len(self.open)))[0].release()

    def ask(self) -> None:
        tokens = self.traffic.prompt()
        before = self.cache.stats()
        assert 0 <= self.cache.peek(tokens) <= len(tokens)
        assert self.cache.stats() == before

    def wait(self) -> None:
        self.now_s += self.rng.random()

    def reset(self) -> None:
        self.cache.reset()

    # -- runs --------------------------------------------------------------------------------------------------------

    WEIGHTS: ClassVar = {serve: 50, start: 10, extend: 14, finish: 8, fail: 2, ask: 10, wait: 5.99, reset: 0.01}

    def run(self, num_operations: int) -> None:
        verbs = list(self.WEIGHTS)
        for number, verb in enumerate(self.rng.choices(verbs, list(self.WEIGHTS.values()), k=num_operations)):
            try:
                verb(self)
            except OutOfPagesError:
                self.counts["out of pages"] += 1
                self.fail()
            while len(self.open) > MOST_OPEN:
                self.finish()
            if number % CHECK_EVERY == 0:
                self.check()
        self.check()

    def check(self) -> None:
        """Prove the bookkeeping, and that every cached token has its KV."""
        self.cache.check_invariants()
        deepest = 0
        for depth, node in self.cache.tree.nodes():
            if node.children or node.is_root:
                continue
            namespace = node.root.namespace
            assert namespace is not None
            tokens = np.concatenate([above.token_ids for above in node.path()])
            positions = np.arange(len(tokens))
            held = self.kv[self.cache.tree.path_pages(node)[positions // self.page_size], positions % self.page_size]
            assert np.array_equal(held, prefix_hashes(tokens, 1, namespace_seed(*namespace)))
            deepest = max(deepest, depth)
        self.counts["deepest path"] = max(self.counts["deepest path"], deepest)

    def end(self) -> Counter[str]:
        """Give everything back; what was done."""
        stats = self.cache.stats()
        while self.open:
            self.fail()
        self.cache.reset()
        self.cache.check_invariants()
        assert self.cache.stats().free_pages == len(self.kv)
        self.counts += Counter(
            {
                "tokens asked for": stats.query_tokens,
                "tokens found": stats.hit_tokens,
                "tokens copied": stats.copied_tokens,
                "tokens evicted": stats.evicted_tokens,
            }
        )
        return self.counts


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_a_million_operations(page_size: int) -> None:
    recursion_limit = sys.getrecursionlimit()
    total = Counter[str]()
    rounds = len(POLICIES) * 2
    started_s = time.process_time()
    for seed, policy in enumerate(islice(cycle(POLICIES), rounds)):
        serving = Serving(page_size, policy, seed)
        serving.run(NUM_OPERATIONS // rounds)
        counts = serving.end()
        deepest = max(total.pop("deepest path", 0), counts.pop("deepest path"))
        total += counts
        total["deepest path"] = deepest
    assert sys.getrecursionlimit() == recursion_limit
    assert total["tokens evicted"] > 10 * POOL_TOKENS * rounds
    assert 0.1 < total["tokens found"] / total["tokens asked for"] < 0.95
    assert (total["tokens copied"] > 0) == (page_size > 1)
    figures = ", ".join(f"{name} {number:,}" for name, number in sorted(total.items()))
    rate = f"{NUM_OPERATIONS / (time.process_time() - started_s):,.0f} a second with all proofs"
    print(f"\npages of {page_size}, {NUM_OPERATIONS:,} operations, {rate}: {figures}")  # noqa: T201
