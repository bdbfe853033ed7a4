"""What a cache with quotas knows besides, and what an engine asks it when pages are short."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.namespace import Namespace
from radixkv.cache.quotas.accounts import Account, Accounts, NamespaceUse, Pages
from radixkv.config import CacheQuota
from radixkv.errors import InvariantError

if TYPE_CHECKING:
    from radixkv.cache.allocator import TokenToKVPoolAllocator
    from radixkv.cache.lease import Lease
    from radixkv.cache.tree.radix_tree import RadixTree


class Shares:
    """The guaranteed shares of one cache, and who holds how much.

    Whoever takes pages gets, besides free ones, those of accounts that hold more than they are guaranteed, in the
    order of the policy; its own are among them if it will hold more than that itself, or when nothing else is left.
    """

    def __init__(
        self,
        quotas: Mapping[Namespace, CacheQuota],
        tree: RadixTree,
        allocator: TokenToKVPoolAllocator,
        leases: Iterable[Lease],
    ) -> None:
        """Count what is there; `count_evictable` must follow. Raises: ConfigError if more is guaranteed than there is.

        O(num_pages).
        """
        self.quotas = dict(quotas)
        self._tree, self._allocator = tree, allocator
        self._accounts = Accounts(quotas, allocator.num_pages, tree.page_size)
        for account, pages in _pages_by_account(self._accounts, tree, leases).items():
            self._accounts.taken(pages, account)

    def count_evictable(self) -> None:
        """Let the tree count from now on. O(leaves log leaves). Raises: PolicyError; it counts then, too."""
        self._tree.use_accounts(self._accounts)

    # -- questions ---------------------------------------------------------------------------------------------------

    def uses(self) -> tuple[NamespaceUse, ...]:
        """What each namespace with a quota holds, and all others together. O(quotas)."""
        return self._accounts.uses()

    def most_tokens(self, namespace: Namespace) -> int:
        """The most tokens that one request can have pages for, while others hold what they are guaranteed.

        O(1). Safe to call from any thread.
        """
        return self._accounts.most_pages(namespace) * self._tree.page_size

    def available_pages(self, namespace: Namespace) -> int:
        """Pages that are free, or that a request of `namespace` can have evicted. O(1)."""
        return self._accounts.available_pages(self._accounts.of(namespace), self._allocator.num_free)

    def are_one(self, namespace: Namespace, other: Namespace) -> bool:
        """Whether two namespaces count as one. O(1)."""
        return self._accounts.of(namespace) is self._accounts.of(other)

    def would_pin_too_much(self, namespace: Namespace, more_pages: int = 0) -> bool:
        """Whether running requests of `namespace`, with so many pages more, hold more than it is guaranteed. O(1)."""
        account = self._accounts.of(namespace)
        return account.pinned_pages + more_pages > account.guaranteed_pages

    def can_claim(self, namespace: Namespace, ids: NDArray[np.int32], cached_tokens: int, num_pages: int) -> bool:
        """Whether a request that will need `num_pages` in all runs within what `namespace` is guaranteed.

        O(1) unless that depends on how much of its prefix running requests pin already, and O(tokens + depth) then.

        Args:
            ids: of which the first `cached_tokens` are cached.
        """
        account = self._accounts.of(namespace)
        left = account.guaranteed_pages - account.pinned_pages
        cached_pages = cached_tokens // self._tree.page_size
        if num_pages <= left or num_pages - cached_pages > left:
            return num_pages <= left
        _, path = self._tree.peek_tokens(ids, namespace)
        pinned = sum(len(node.page_ids) for node in path if node.lock_ref)
        return num_pages - min(pinned, cached_pages) <= left

    # -- what the cache tells ----------------------------------------------------------------------------------------

    def taken(self, pages: Pages, namespace: Namespace) -> None:
        """A lease took free pages."""
        self._accounts.taken(pages, self._accounts.of(namespace))

    def freed(self, pages: Pages) -> None:
        """These pages are free now."""
        self._accounts.freed(pages)

    def evict(self, namespace: Namespace, num_pages: int, missing_pages: int) -> Pages:
        """Take pages of one leaf from the tree, for a lease that takes `num_pages`, of which so many are missing.

        Returns: at least one page. Raises: PolicyError, as `RadixTree.evict`.
        """
        return self._tree.evict_for(self._accounts.of(namespace), num_pages, missing_pages)

    def check_invariants(self, leases: Iterable[Lease]) -> None:
        """Prove the invariants of `Accounts`. O(num_pages + tokens). Raises: InvariantError."""
        accounts = self._accounts
        counted = _pages_by_account(accounts, self._tree, leases)
        evictable: dict[Account, int] = {}
        for _, node in self._tree.nodes():
            root = node.root
            assert root.namespace is not None, root
            account = accounts.of(root.namespace)
            if node.account is not account:
                raise InvariantError(f"{node} is in another account than its namespace {root.namespace}")
            if node.lock_ref == 0:
                evictable[account] = evictable.get(account, 0) + len(node.page_ids)
        for account in accounts:
            pages = counted.get(account, np.empty(0, np.int32))
            if not np.array_equal(accounts.owned_by(account), pages) or account.used_pages != len(pages):
                raise InvariantError(
                    f"{account.used_pages} pages of {account.namespace} are recorded, not {len(pages)}"
                )
            if account.evictable_pages != evictable.get(account, 0):
                raise InvariantError(
                    f"{account.evictable_pages} evictable pages of {account.namespace} are recorded, not "
                    f"{evictable.get(account, 0)}"
                )
        lenders = {account for account in accounts if account.lent_pages}
        if accounts.num_lent != sum(account.lent_pages for account in lenders) or accounts.lenders() != lenders:
            raise InvariantError(
                f"{accounts.num_lent} pages are recorded as lent, by {len(accounts.lenders())} accounts"
            )


def _pages_by_account(accounts: Accounts, tree: RadixTree, leases: Iterable[Lease]) -> dict[Account, Pages]:
    """The pages in the tree and of leases, sorted. O(num_pages + nodes)."""
    found: dict[Account, list[Pages]] = {}
    stack = [(accounts.of(namespace), tree.root_of(namespace)) for namespace in tree.namespaces()]
    while stack:
        account, node = stack.pop()
        assert node is not None, "a namespace without a root"
        found.setdefault(account, []).append(node.page_ids)
        stack += [(account, child) for child in node.children.values()]
    for lease in leases:
        found.setdefault(accounts.of(lease.namespace), []).append(lease.pages)
    return {account: np.unique(np.concatenate(runs)) for account, runs in found.items()}
