"""The unpinned leaves of a cache with quotas: a queue for each account."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from radixkv.cache.eviction.policy import EvictionPolicy
from radixkv.cache.quotas.accounts import Account, Accounts
from radixkv.cache.tree.leaf_queue import LeafQueue
from radixkv.cache.tree.node import TreeNode
from radixkv.errors import PolicyError


class AccountQueues:
    """As one `LeafQueue`, and tells the leaf that goes first among those of some accounts.

    What a leaf does costs what it costs in a `LeafQueue`; to choose among accounts costs O(accounts), since the ranks
    of a policy may change with time, so that no order of their first leaves could be kept.
    """

    def __init__(self, accounts: Accounts, policy: EvictionPolicy, clock: Callable[[], float]) -> None:
        self._policy = policy
        self._accounts = list(accounts)
        for account in self._accounts:
            account.queue = LeafQueue(policy, clock)
        self._serial = 0

    def __len__(self) -> int:
        return sum(len(account.queue) for account in self._accounts)

    @property
    def num_entries(self) -> int:
        """Leaves, and stale entries in memory. O(accounts × groups)."""
        return sum(account.queue.num_entries for account in self._accounts)

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

    def pop(self) -> TreeNode:
        """Take out the leaf that goes first of all. Raises: PolicyError."""
        node = self.first()
        self.remove(node)
        return node

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
        queue = node.account.queue
        queue.serial = self._serial = max(self._serial, queue.serial) + 1
        return queue
