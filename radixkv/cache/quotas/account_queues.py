"""The unpinned leaves of a cache with quotas: a queue for each account."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from heapq import heapify, heappop, heappush
from typing import Any

from radixkv.cache.eviction.policy import EvictionPolicy, hook
from radixkv.cache.quotas.accounts import Account, Accounts
from radixkv.cache.tree.leaf_queue import SLACK, LeafQueue
from radixkv.cache.tree.node import TreeNode
from radixkv.errors import PolicyError


class AccountQueues:
    """As one `LeafQueue`, and tells the leaf that goes first among those of accounts that lend.

    What a leaf does costs what it costs in a `LeafQueue`. The first leaves of accounts that lend are in a heap: a queue
    that changes makes its entry stale, and gets another one with the next eviction, at O(log accounts). A policy with
    groups may rank leaves otherwise at each eviction, so there each account is looked at: O(accounts × groups).
    """

    def __init__(self, accounts: Accounts, policy: EvictionPolicy, clock: Callable[[], float]) -> None:
        self._policy, self._clock = policy, clock
        self._accounts = list(accounts)
        self._book = accounts
        for account in self._accounts:
            account.queue = LeafQueue(policy, clock)
        self._serial = 0
        self._is_ordered = hook(policy, "group") is None
        self._changed: set[Account] = set()  # accounts that have no entry, or one that is stale
        self._versions = [0] * len(self._accounts)
        self._firsts: list[tuple[tuple[Any, ...], int, int]] = []  # a heap: order, number of the account, version
        self._expiries: list[tuple[float, int, int]] = []  # a heap: when a first leaf may change, number, version

    def __len__(self) -> int:
        return sum(len(account.queue) for account in self._accounts)

    def __iter__(self) -> Iterator[TreeNode]:
        """The leaves; those of an account together, in its order. O(leaves log leaves)."""
        for account in self._accounts:
            yield from account.queue

    def add(self, node: TreeNode) -> None:
        """As `LeafQueue.add`."""
        self._queue_of(node).add(node)

    def add_used(self, node: TreeNode) -> None:
        """As `LeafQueue.add_used`."""
        self._queue_of(node).add_used(node)

    def update(self, node: TreeNode) -> None:
        """As `LeafQueue.update`."""
        self._queue_of(node).update(node)

    def use(self, node: TreeNode) -> None:
        """As `LeafQueue.use`."""
        self._queue_of(node).use(node)

    def replace(self, old: TreeNode, new: TreeNode) -> None:
        """As `LeafQueue.replace`."""
        self._queue_of(old).replace(old, new)

    def remove(self, node: TreeNode) -> None:
        """As `LeafQueue.remove`."""
        self._queue_of(node).remove(node)

    def first(self) -> TreeNode:
        """The leaf that goes first of all. O(accounts). Raises: PolicyError."""
        return self.first_of(self._accounts)

    def first_for(self, asker: Account, num_pages: int) -> TreeNode:
        """The leaf that is to give way first, if `asker` wants `num_pages` more; one of its own if nobody lends.

        It may be one of its own besides if it will hold more than it is guaranteed.
        O(log accounts) for each account that has changed since the last eviction, if the policy has no groups.
        Raises: PolicyError.
        """
        will_lend = asker.used_pages + num_pages > asker.guaranteed_pages and asker.evictable_pages > 0
        if not self._is_ordered:
            lenders = self._book.lenders()
            return self.first_of(lenders | {asker} if will_lend or not lenders else lenders)
        first = self._first_lender()
        if first is None:
            return asker.queue.first()
        return self.first_of({first, asker} if will_lend else {first})

    def _first_lender(self) -> Account | None:
        """The account that lends whose first leaf goes first; None if none does. Raises: PolicyError."""
        try:
            self._enter_changed()
            while self._firsts:
                _, number, version = self._firsts[0]
                account = self._accounts[number]
                if version == self._versions[number] and account.lent_pages:
                    return account
                heappop(self._firsts)
            return None
        except PolicyError:
            raise
        except Exception as error:  # ranks that do not compare, in the middle of a heap
            self._firsts.clear()
            self._changed.update(self._accounts)
            self.first_of(self._book.lenders())  # finds two of them, which go first then
            raise PolicyError(self._policy.name, error) from error

    def _enter_changed(self) -> None:
        """Give each account that has changed, or begun to lend, an entry for its first leaf."""
        now = self._clock() if self._expiries else 0.0
        while self._expiries and self._expiries[0][0] <= now:
            _, number, version = heappop(self._expiries)
            if version == self._versions[number]:
                self._changed.add(self._accounts[number])
        self._changed |= self._book.take_new_lenders()
        while self._changed:
            account = next(iter(self._changed))
            number, queue = account.number, account.queue
            self._versions[number] += 1
            if queue and account.lent_pages:
                heappush(self._firsts, (queue.first_place().order, number, self._versions[number]))
                if (expiry := queue.next_expiry()) is not None:
                    heappush(self._expiries, (expiry, number, self._versions[number]))
            self._changed.discard(account)
        most = 2 * len(self._accounts) + SLACK
        if len(self._firsts) > most:
            self._firsts = [entry for entry in self._firsts if entry[2] == self._versions[entry[1]]]
            heapify(self._firsts)
        if len(self._expiries) > most:
            self._expiries = [entry for entry in self._expiries if entry[2] == self._versions[entry[1]]]
            heapify(self._expiries)

    def first_of(self, accounts: Iterable[Account]) -> TreeNode:
        """The leaf that goes first of those of `accounts`. O(accounts). Raises: PolicyError."""
        places = [account.queue.first_place() for account in accounts if account.queue]
        assert places, "no leaf is left"
        best = places[0]
        for place in places[1:]:
            try:
                if place.order < best.order:
                    best = place
            except Exception as error:  # ranks that do not compare: let these leaves go first, to fail only once
                for node in (best.node, place.node):
                    self._queue_of(node).set_aside(node)
                raise PolicyError(self._policy.name, error) from error
        return best.node

    def _queue_of(self, node: TreeNode) -> LeafQueue:
        """The queue of a node's account, which numbers what comes after all that came to others."""
        assert node.account is not None, node
        self._changed.add(node.account)
        queue = node.account.queue
        queue.serial = self._serial = max(self._serial, queue.serial) + 1
        return queue
