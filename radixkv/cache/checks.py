"""Proofs of the cache's bookkeeping, for tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from radixkv.errors import InvariantError

if TYPE_CHECKING:
    from radixkv.cache.allocator import TokenToKVPoolAllocator
    from radixkv.cache.lease import Lease
    from radixkv.cache.quotas.shares import Shares
    from radixkv.cache.residency.residency import Residency
    from radixkv.cache.tree.radix_tree import RadixTree


def check_cache(
    tree: RadixTree,
    allocator: TokenToKVPoolAllocator,
    residency: Residency,
    leases: Sequence[Lease],
    shares: Shares | None,
) -> None:
    """Prove the invariants of `PrefixCache` from what its open `leases` hold. O(num_pages + tokens).

    Raises: InvariantError with what contradicts what.
    """
    tree.check_invariants()
    allocator.check_invariants()
    in_tree = np.zeros(allocator.num_pages, bool)
    for _, node in tree.nodes():
        in_tree[node.page_ids] = True
    expected, pins = in_tree.astype(np.int64), np.zeros(allocator.num_pages, np.int64)
    locks = Counter[int]()
    for lease in leases:
        expected[lease.pages] += 1
        pins[lease.seen_pages] += 1
        locks.update(map(id, lease.node.path()))
    counts = allocator.ref_counts(np.arange(allocator.num_pages, dtype=np.int32))
    if not np.array_equal(counts, expected):
        wrong = np.flatnonzero(counts != expected)
        raise InvariantError(f"pages {wrong.tolist()} count {counts[wrong]} references, not {expected[wrong]}")
    for _, node in tree.nodes():
        if not node.is_root and node.lock_ref != locks[id(node)]:
            raise InvariantError(f"{node} is pinned by {locks[id(node)]} leases")
        if node.lock_ref == 0 and (expected[node.page_ids] > 1).any():
            raise InvariantError(f"{node} is unpinned, and a lease holds one of its pages")
    residency.check_invariants(pins, in_tree, [lease.claim for lease in leases])
    if shares is not None:
        shares.check_invariants(leases)
