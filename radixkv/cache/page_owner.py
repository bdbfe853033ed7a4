"""Who owns which page of the pool: the tree, a lease, or nobody."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.allocator import TokenToKVPoolAllocator
from radixkv.cache.checks import check_cache
from radixkv.cache.events import Observer
from radixkv.cache.eviction.policies import resolve_policy
from radixkv.cache.eviction.policy import EvictionPolicy
from radixkv.cache.namespace import SHARED, Namespace
from radixkv.cache.quotas.accounts import QuotaKey, checked_quotas
from radixkv.cache.quotas.shares import Shares
from radixkv.cache.residency.residency import Claim, Everywhere, Residency
from radixkv.cache.tree.node import TreeNode
from radixkv.cache.tree.radix_tree import RadixTree
from radixkv.config import CacheConfig, CacheQuota
from radixkv.errors import OutOfPagesError, PolicyError

if TYPE_CHECKING:
    from radixkv.cache.lease import Lease

CopyPage: TypeAlias = Callable[[int, int, int], object]
"""copy_page(source, target, num_tokens): copy the KV of the first `num_tokens` slots of page `source` to `target`."""


class PageOwner:
    """A radix tree over a pool of pages, which moves the references on them: the tree's, and those of leases.

    It takes pages from the pool, evicts what is unused where too few are free, and gives back what tree and leases let
    go of. Which prefix a request finds, and what is told of all that, is left to `PrefixCache`, whose docstring states
    the invariants.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        policy: str | EvictionPolicy,
        *,
        copy_page: CopyPage | None,
        residency: Residency | None,
        clock: Callable[[], float],
        quotas: Mapping[QuotaKey, CacheQuota] | None,
    ) -> None:
        """An empty tree over a free pool. Raises: ConfigError."""
        resolved = resolve_policy(policy)
        self.config = CacheConfig(num_pages=num_pages, page_size=page_size, policy=resolved.name)
        num_pages, page_size = self.config.num_pages, self.config.page_size
        self.tree = RadixTree(page_size, resolved, clock=clock)
        self.allocator = TokenToKVPoolAllocator(num_pages)
        self._copy_page = copy_page
        self.residency: Residency = Everywhere() if residency is None else residency
        self.residency.attach(num_pages, page_size, self.allocator.ref_counts)
        self._leases: weakref.WeakSet[Lease] = weakref.WeakSet()
        self._dropped: deque[tuple[TreeNode, Claim, NDArray[np.int32]]] = deque()  # of leases without release()
        self._evicted_tokens = 0
        self.shares: Shares | None = None
        """Who is guaranteed how much and holds how much; None without quotas."""
        if quotas:
            self.set_quotas(quotas)

    def set_quotas(self, quotas: Mapping[QuotaKey, CacheQuota]) -> None:
        """Guarantee shares of the pool to namespaces, in place of what was guaranteed before; none if it is empty.

        A namespace is named by its `extra_key`, by `(extra_key, cache_salt)`, or by None if requests name none. The
        quota of an `extra_key` is for all its salts together that have none of their own. Namespaces without a quota
        are guaranteed nothing. See docs/cache.md. O(num_pages + leaves log leaves).

        Raises: ConfigError if quotas are wrong, or guarantee more than the pool has: those before hold then.
            PolicyError if the policy cannot rank a leaf; the new ones hold then.

        >>> from radixkv import CacheQuota, PrefixCache
        >>> cache = PrefixCache(num_pages=4, page_size=2, quotas={"a": CacheQuota(pool_tokens=4)})
        >>> for tenant, ids in ("a", [1, 2, 3, 4]), ("b", [1, 2, 3, 4]), ("b", [5, 6, 7, 8]):
        ...     with cache.acquire(ids, extra_key=tenant) as lease:
        ...         _ = lease.commit(ids)
        >>> cache.peek([1, 2, 3, 4], extra_key="a"), cache.peek([1, 2, 3, 4], extra_key="b")
        (4, 0)
        """
        checked = checked_quotas(quotas)
        self._reap()
        if not checked:
            self.shares = None
            self.tree.use_accounts(None)
            return
        self.shares = Shares(checked, self.tree, self.allocator, self.open_leases())
        self.shares.count_evictable()

    @property
    def page_size(self) -> int:
        """Tokens a page."""
        return self.config.page_size

    @property
    def num_pages(self) -> int:
        """Pages in the pool."""
        return self.config.num_pages

    @property
    def available_pages(self) -> int:
        """Pages that are free or can be evicted. O(1)."""
        return self.allocator.num_free + self.tree.num_evictable_pages

    @property
    def used_pages(self) -> int:
        """Pages in the tree or held by leases. O(1)."""
        return self.allocator.num_used

    @property
    def shares_partial_pages(self) -> bool:
        """Whether reuse is exact to the token, thanks to `copy_page`."""
        return self._copy_page is not None

    @property
    def can_go_back(self) -> bool:
        """Whether a request may drop the last tokens that it computed, and compute others in their place."""
        return self.residency.can_go_back

    @property
    def residency_changes(self) -> int:
        """A number that grows when pages may lose or gain what the residency gives them. Watches are not told. O(1)."""
        return self.residency.num_changes

    def pages_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens fill, the last one perhaps in part."""
        return -(-num_tokens // self.page_size)

    def most_tokens(self, namespace: Namespace) -> int:
        """The most tokens that one request can have pages for, while others hold what they are guaranteed.

        O(1). Safe to call from any thread.
        """
        shares = self.shares
        return self.num_pages * self.page_size if shares is None else shares.most_tokens(namespace)

    def available_to(self, namespace: Namespace) -> int:
        """Pages that are free, or that can be evicted for a request of `namespace`. O(1)."""
        return self.available_pages if self.shares is None else self.shares.available_pages(namespace)

    def has_room(
        self,
        num_tokens: int,
        *,
        cached_tokens: int,
        next_tokens: int,
        spare_pages: int,
        namespace: Namespace = SHARED,
    ) -> bool:
        """Whether a request could start, and leave `spare_pages` for others. O(1).

        Args:
            num_tokens: that it needs pages for.
            cached_tokens: how many of them `peek` found.
            next_tokens: how many it would compute in its first step.
        """
        needed = self.pages_for(num_tokens) - cached_tokens // self.page_size
        if needed + spare_pages > self.available_to(namespace):
            return False
        return self.residency.has_room(cached_tokens, next_tokens, spare_pages)

    def open_leases(self) -> list[Lease]:
        """The leases that were not released yet, in no order. O(leases)."""
        return list(self._leases)

    def check_invariants(self) -> None:
        """Prove every invariant of the class docstring. O(num_pages + tokens). Raises: InvariantError."""
        self._reap()
        check_cache(self.tree, self.allocator, self.residency, self.open_leases(), self.shares)

    def reset(self) -> None:
        """Forget every prefix that no lease pins. O(nodes)."""
        self._reap()
        self._give_back_freed(self.tree.clear)

    def add_observer(self, observer: Observer) -> None:
        """Call `observer` with an event for all that is stored, removed or cleared from now on; window pages, too."""
        self.residency.report_to(self.tree.events, self.tree.cached_runs)
        self.tree.add_observer(observer)

    def add_pool_observer(self, observer: Observer) -> None:
        """As `add_observer`, without window pages: events of the medium "pool" alone are promised."""
        self.tree.add_observer(observer)

    def remove_observer(self, observer: Observer) -> None:
        """Call `observer` no more."""
        self.tree.remove_observer(observer)

    def give_back(self, pages: NDArray[np.int32]) -> None:
        """Take a reference from each of `pages`; those without any are free, in all layers. Leases call it."""
        freed = self.allocator.release(pages)
        self.residency.drop(freed)
        if self.shares is not None:
            self.shares.freed(freed)

    def remove(self, leaf: TreeNode) -> None:
        """Forget an unpinned leaf of the tree. Leases call it. Raises: PolicyError; it is gone then, too."""
        self._give_back_freed(self.tree.remove, leaf)

    def _give_back_freed(self, free: Callable[..., NDArray[np.int32]], *arguments: Any) -> None:
        """Give back the pages that a verb of the tree frees, those too that it freed before it failed."""
        try:
            freed = free(*arguments)
        except PolicyError as error:
            self.give_back(np.asarray(error.freed, np.int32))
            raise
        self.give_back(freed)

    def _reap(self) -> None:
        """Release what dropped leases held. Not in their `__del__`: that may run in the middle of any operation."""
        while self._dropped:
            node, claim, pages = self._dropped.popleft()
            claim.release(pages)
            try:
                self.tree.dec_lock_ref(node)
            finally:
                self.give_back(pages)

    def _take(self, num_pages: int, namespace: Namespace) -> NDArray[np.int32]:
        self._reap()
        missing = num_pages - self.allocator.num_free
        if missing > 0:
            before = self.allocator.num_free
            evictable = self.available_to(namespace) - before
            if missing > evictable:
                raise OutOfPagesError(needed=num_pages, free=before, evictable=evictable, total=self.num_pages)
            try:
                if self.shares is None:
                    self._give_back_freed(self.tree.evict, missing * self.page_size)
                else:
                    self._evict_for(self.shares, namespace, num_pages)
            finally:
                self._evicted_tokens += (self.allocator.num_free - before) * self.page_size
        pages = self.allocator.alloc(num_pages)
        if self.shares is not None:
            self.shares.taken(pages, namespace)
        return pages

    def _evict_for(self, shares: Shares, namespace: Namespace, num_pages: int) -> None:
        """Evict leaves until `num_pages` are free, those of namespaces that hold more than their quota first."""
        while (missing := num_pages - self.allocator.num_free) > 0:
            self._give_back_freed(shares.evict, namespace, num_pages, missing)
