"""The random walks of `cache_machines` through a cache with quotas; sets of pages predict who gives way to whom."""

from __future__ import annotations

from typing import ClassVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule

from cache_machines import CacheMachine, run, walk
from radixkv import CacheQuota
from radixkv.cache.tree.node import Namespace
from strategies import NAMESPACES, RANKS, Edge

NOBODY, ANNA, SALTED = NAMESPACES
GUARANTEES: list[dict[Namespace, int]] = [
    {NOBODY: 4, ANNA: 4},
    {ANNA: 3},
    {NOBODY: 2, ANNA: 5},
    {NOBODY: 8},
    {NOBODY: 2, ANNA: 2, SALTED: 2},
    {},
]
"""Pages, of 8."""


class QuotaMachine(CacheMachine):
    """A `PrefixCache` with quotas that change now and then."""

    first_guarantee: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.guaranteed: dict[Namespace, int] = {}
        self.set_quotas(self.first_guarantee)

    @rule(guarantee=st.sampled_from([0, 0, 0, 1, 2, 3, 4, 5]))
    def set_quotas(self, guarantee: int) -> None:
        self.guaranteed = GUARANTEES[guarantee]
        self.cache.set_quotas(
            {name: CacheQuota(pool_tokens=pages * self.page_size) for name, pages in self.guaranteed.items()}
        )

    # -- what the oracle knows -------------------------------------------------------------------------------------

    def guarantee(self, namespace: Namespace) -> int:
        account = self.account(namespace)
        return 0 if account is None else self.guaranteed[account]

    def account(self, namespace: Namespace) -> Namespace | None:
        """A salt counts to its key, and namespaces without a quota count as one."""
        return next((name for name in (namespace, (namespace[0], None)) if name in self.guaranteed), None)

    def used_by(self, account: Namespace | None) -> int:
        """Pages of the namespaces of an account: in the tree, or of a lease."""
        in_tree = {page for edge in self.oracle.edges if self.account(edge.namespace) == account for page in edge.pages}
        claims = [claim.pages for claim in self.claims if self.account(claim.namespace) == account]
        return len(in_tree.union(*claims))

    def evictable_of(self, account: Namespace | None) -> int:
        edges = [edge for edge in self.oracle.edges if self.account(edge.namespace) == account]
        return sum(len(edge.pages) for edge in edges if not self.oracle.lock_ref(edge))

    def spare_of(self, account: Namespace | None) -> int:
        """How many pages an account holds beyond its guarantee."""
        return self.used_by(account) - (0 if account is None else self.guaranteed[account])

    def accounts(self) -> list[Namespace | None]:
        return [*self.guaranteed, None]

    def num_evictable_pages(self) -> int:
        asker = self.account(self.asker)
        others = [account for account in self.accounts() if account != asker]
        lent = sum(max(0, min(self.evictable_of(other), self.spare_of(other))) for other in others)
        return self.evictable_of(asker) + lent

    def shortage(self, needed: int) -> tuple[int, int, int, int] | None:
        found = super().shortage(needed)
        asker = self.account(self.asker)
        fits = needed <= self.guarantee(self.asker) - self.used_by(asker) + self.evictable_of(asker)
        others = [account for account in self.accounts() if account != asker]
        if fits and all(self.spare_of(other) <= self.evictable_of(other) for other in others):
            assert found is None, "a namespace did not get what it is guaranteed"
        return found

    def evicted(self, num_tokens: int) -> None:
        self.evicted_tokens += len(self.gone) * self.page_size
        missing = max(0, num_tokens // self.page_size)
        needed = missing + self.num_pages - len(self.used_pages())
        asker, before = self.account(self.asker), {account: self.used_by(account) for account in self.accounts()}
        while missing > 0:
            will_be_beyond = self.used_by(asker) + needed > self.guarantee(self.asker)
            leaves = self.oracle.unpinned_leaves()
            beyond = [leaf for leaf in leaves if self.gives_way(leaf, asker, will_be_beyond)]
            own = [leaf for leaf in leaves if self.account(leaf.namespace) == asker]
            missing -= self.oracle.evict_first(
                beyond or own,
                missing,
                self.gone,
                lambda leaf: len(leaf.pages) if leaf in own else self.spare_of(self.account(leaf.namespace)),  # noqa: B023
            )
        assert self.gone == [], "more went than was asked for"
        for account in self.accounts():
            kept = min(before[account], 0 if account is None else self.guaranteed[account])
            assert account == asker or self.used_by(account) >= kept, f"{account} lost what it is guaranteed"

    def gives_way(self, leaf: Edge, asker: Namespace | None, will_be_beyond: bool) -> bool:
        account = self.account(leaf.namespace)
        return self.spare_of(account) > 0 or (account == asker and will_be_beyond)

    @invariant()
    def agrees_with_oracle(self) -> None:
        super().agrees_with_oracle()
        uses = self.cache.stats().namespaces
        if not self.guaranteed:
            assert uses == ()
            return
        assert [use.namespace for use in uses] == self.accounts()
        for use in uses:
            assert use.used_tokens == self.used_by(use.namespace) * self.page_size
            assert use.evictable_tokens == self.evictable_of(use.namespace) * self.page_size


pairs = pytest.mark.parametrize(("policy", "page_size"), [*((policy, 2) for policy in RANKS), ("lru", 1), ("lru", 4)])
quotas = pytest.mark.parametrize("first_guarantee", range(len(GUARANTEES)))


@pairs
def test_who_is_beyond_its_share_gives_way_and_nobody_loses_what_it_is_guaranteed(policy: str, page_size: int) -> None:
    walk(QuotaMachine, 150, {"set_quotas": 0.5}, page_size=page_size, policy=policy, copies=True)


@quotas
def test_the_same_while_quotas_stay(first_guarantee: int) -> None:
    walk(QuotaMachine, 100, page_size=2, policy="lru", copies=True, first_guarantee=first_guarantee)


@pytest.mark.parametrize("copies", [True, False])
def test_found_by_hypothesis(copies: bool) -> None:
    run(QuotaMachine, 5, page_size=2, policy="lru", copies=copies)


@pytest.mark.stress
@pytest.mark.parametrize("policy", RANKS)
@quotas
def test_for_long(policy: str, first_guarantee: int) -> None:
    walk(
        QuotaMachine,
        2_000,
        {"set_quotas": 0.05},
        page_size=2,
        policy=policy,
        copies=True,
        first_guarantee=first_guarantee,
    )
    run(QuotaMachine, 50, page_size=2, policy=policy, copies=True, first_guarantee=first_guarantee)
