"""Whose pages are whose, and how many of them others may have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.namespace import SHARED, Namespace
from radixkv.config import CacheQuota
from radixkv.config.checks import shown
from radixkv.errors import ConfigError, InvalidRequestError

if TYPE_CHECKING:
    from radixkv.cache.tree.leaf_queue import LeafQueue

QuotaKey: TypeAlias = "Namespace | tuple[str | None, str | None] | str | None"
"""How a caller names a namespace: an `extra_key`, a `Namespace`, or None for that of requests that name none."""

Pages: TypeAlias = NDArray[np.int32]


class NamespaceUse(NamedTuple):
    """What a namespace with a quota holds of the pool. `namespace` is None for all those without one together.

    `used_tokens` are what its pages have room for: those in the tree, `evictable_tokens` of them unpinned, and those
    that its leases hold. Of more than `guaranteed_tokens` the unpinned ones give way to whoever needs them.
    """

    namespace: Namespace | None
    guaranteed_tokens: int
    used_tokens: int
    evictable_tokens: int


class Account:
    """The pages of a namespace with a quota, or of all namespaces without one.

    Attributes:
        number: its place among all accounts.
        namespace: None in the account of those without a quota.
        guaranteed_pages: that others cannot take.
        used_pages: in the tree, or held by leases alone.
        evictable_pages: in unpinned nodes of the tree.
        queue: its unpinned leaves.
    """

    __slots__ = ("evictable_pages", "guaranteed_pages", "namespace", "number", "queue", "used_pages")

    queue: LeafQueue

    def __init__(self, number: int, namespace: Namespace | None, guaranteed_pages: int) -> None:
        self.number, self.namespace, self.guaranteed_pages = number, namespace, guaranteed_pages
        self.used_pages = self.evictable_pages = 0

    @property
    def pinned_pages(self) -> int:
        """Pages that running requests hold: nobody can have them before these end or are retracted."""
        return self.used_pages - self.evictable_pages

    @property
    def lent_pages(self) -> int:
        """Pages that others may have now: evictable ones beyond its guarantee."""
        return max(0, min(self.evictable_pages, self.used_pages - self.guaranteed_pages))


class Accounts:
    """The accounts of a cache with quotas.

    A namespace has the account of the quota that names it. One with a `cache_salt` that no quota names has that of its
    `extra_key` without the salt: a salt narrows what is shared, and does not leave the share. All others have one
    account together, and nothing is guaranteed to it.

    A page belongs to the account of the lease that took it until it is free.

    Invariants, which `Shares.check_invariants` proves: `used_pages` and `evictable_pages` of each account are as
    counted; `num_lent` is the sum of `lent_pages`, and `lenders` are the accounts where it is not 0.
    """

    def __init__(self, quotas: Mapping[Namespace, CacheQuota], num_pages: int, page_size: int) -> None:
        """Raises: ConfigError if more pages are guaranteed than there are."""
        self.num_pages, self.page_size = num_pages, page_size
        guaranteed = [(name, quota.pool_tokens // page_size) for name, quota in quotas.items()]
        self._accounts = [Account(number, *named) for number, named in enumerate(guaranteed)]
        self._by_namespace = {account.namespace: account for account in self._accounts}
        self._others = Account(len(guaranteed), None, 0)
        self._accounts.append(self._others)
        self.guaranteed_pages = sum(account.guaranteed_pages for account in self._accounts)
        asked_tokens = sum(quota.pool_tokens for quota in quotas.values())
        if asked_tokens > num_pages * page_size:
            raise ConfigError(
                f"quotas must not guarantee more than the pool's {num_pages * page_size} tokens; "
                f"{len(guaranteed)} of them guarantee {asked_tokens}"
            )
        self._owners = np.full(num_pages, -1, np.int32)  # by page: the number of its account; -1 if it is free
        self._lenders: set[Account] = set()
        self._new_lenders: set[Account] = set()
        self._num_lent = 0

    def __iter__(self) -> Iterator[Account]:
        return iter(self._accounts)

    def of(self, namespace: Namespace) -> Account:
        """The account of a namespace. O(1). Safe to call from any thread."""
        account = self._by_namespace.get(namespace)
        if account is None and namespace.cache_salt is not None:
            account = self._by_namespace.get(Namespace(namespace.extra_key))
        return self._others if account is None else account

    def most_pages(self, namespace: Namespace) -> int:
        """Pages that one request can have at most, while others hold what they are guaranteed. O(1). Thread-safe."""
        return self.num_pages - self.guaranteed_pages + self.of(namespace).guaranteed_pages

    def available_pages(self, account: Account, num_free: int) -> int:
        """Pages that are free, or that `account` can have evicted: its own, and what others were lent. O(1)."""
        return num_free + account.evictable_pages + self._num_lent - account.lent_pages

    def lenders(self) -> set[Account]:
        """The accounts that hold more than they are guaranteed, and have evictable pages. O(result)."""
        return set(self._lenders)

    def take_new_lenders(self) -> set[Account]:
        """Those that have begun to lend since the last call; some may have ended since."""
        begun, self._new_lenders = self._new_lenders, set()
        return begun

    # -- what the cache and its tree tell ----------------------------------------------------------------------------

    def taken(self, pages: Pages, account: Account) -> None:
        """A lease of `account` took free pages."""
        self._owners[pages] = account.number
        self._count(account, used=len(pages))

    def freed(self, pages: Pages) -> None:
        """These pages are free now. O(pages), and O(pages) for each account of them but one."""
        while len(pages):
            owners = self._owners[pages]
            account = self._accounts[owners[0]]
            is_its = owners == owners[0]
            self._owners[pages[is_its]] = -1
            self._count(account, used=-int(is_its.sum()))
            pages = pages[~is_its]

    def evictable(self, account: Account, num_pages: int) -> None:
        """So many more pages of `account` are in unpinned nodes; fewer if negative. O(1)."""
        self._count(account, evictable=num_pages)

    def owned_by(self, account: Account) -> Pages:
        """The pages of `account`. O(num_pages)."""
        return np.flatnonzero(self._owners == account.number).astype(np.int32)

    def uses(self) -> tuple[NamespaceUse, ...]:
        """What each account holds; the last one is that of namespaces without a quota. O(accounts)."""
        size = self.page_size
        return tuple(
            NamespaceUse(a.namespace, a.guaranteed_pages * size, a.used_pages * size, a.evictable_pages * size)
            for a in self._accounts
        )

    @property
    def num_lent(self) -> int:
        """Pages that can be had of those that lend any, as counted all along."""
        return self._num_lent

    def _count(self, account: Account, used: int = 0, evictable: int = 0) -> None:
        before = account.lent_pages
        account.used_pages += used
        account.evictable_pages += evictable
        after = account.lent_pages
        if after != before:
            self._num_lent += after - before
            if not after:
                self._lenders.remove(account)
            elif not before:
                self._lenders.add(account)
                self._new_lenders.add(account)


def checked_quotas(quotas: object) -> dict[Namespace, CacheQuota]:
    """A mapping of namespaces to quotas, as callers give it. Raises: ConfigError, InvalidRequestError."""
    if not isinstance(quotas, Mapping):
        raise ConfigError(f"quotas must be a mapping of namespaces to CacheQuota, not {shown(quotas)}")
    checked: dict[Namespace, CacheQuota] = {}
    for key, quota in quotas.items():
        if not isinstance(quota, CacheQuota):
            raise ConfigError(f"the quota of {shown(key)} must be a CacheQuota, not {shown(quota)}")
        namespace = _namespace(key)
        if namespace in checked:
            raise ConfigError(f"two quotas name the namespace {shown(key)}; give it one")
        checked[namespace] = quota
    return checked


def _namespace(key: object) -> Namespace:
    parts = key if isinstance(key, tuple) else (key, None)
    try:
        if len(parts) == 2:
            return Namespace.of(*parts)
    except InvalidRequestError:
        pass
    raise ConfigError(
        f"a quota must name an extra_key, (extra_key, cache_salt), or None for {SHARED}; it names {shown(key)}"
    )
