"""In which order unused leaves leave the tree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from sortedcontainers import SortedDict

from radixkv.errors import ConfigError

if TYPE_CHECKING:
    from radixkv.cache.radix_tree import TreeNode


class EvictionPolicy(Protocol):
    """Ranks leaves: the unpinned leaf of the smallest rank is evicted first.

    A rank may depend on the node alone, and is asked for again whenever the node is used, is split or becomes an
    unpinned leaf; ties are broken by which node entered the queue first.
    """

    name: str

    def rank(self, node: TreeNode) -> Any:
        """A value that compares with every other rank of this policy. Should cost O(1)."""
        ...


class LRUPolicy:
    """Least recently used first."""

    name = "lru"

    def rank(self, node: TreeNode) -> int:
        return node.last_access


POLICIES: dict[str, type[EvictionPolicy]] = {"lru": LRUPolicy}


def resolve_policy(policy: str | EvictionPolicy) -> EvictionPolicy:
    """The policy of that name, or `policy` itself if it is one already.

    Raises: ConfigError for an unknown name, or an object that is no policy.
    """
    if not isinstance(policy, str):
        if not hasattr(policy, "rank") or not hasattr(policy, "name"):
            raise ConfigError(f"an eviction policy has a name and a rank(node), and {policy!r} has not")
        return policy
    if policy not in POLICIES:
        raise ConfigError(f"unknown eviction policy {policy!r}; the policies are {', '.join(POLICIES)}")
    return POLICIES[policy]()


class LeafQueue:
    """The unpinned leaves in eviction order, kept in order at every change.

    Adding, removing and popping cost O(log leaves); nothing ever scans or re-sorts the leaves.
    """

    def __init__(self, policy: EvictionPolicy) -> None:
        self._rank = policy.rank
        self._nodes = SortedDict()  # (rank, serial) -> node
        self._serial = 0

    def __len__(self) -> int:
        return len(self._nodes)

    def __iter__(self) -> Iterator[TreeNode]:
        """The leaves, next to be evicted first."""
        return iter(self._nodes.values())

    def __contains__(self, node: TreeNode) -> bool:
        return node.queue_key is not None

    def add(self, node: TreeNode) -> None:
        """Enter a node that is not in the queue."""
        assert node.queue_key is None, node
        self._serial += 1
        node.queue_key = key = (self._rank(node), self._serial)
        self._nodes[key] = node

    def remove(self, node: TreeNode) -> None:
        """Take out a node that is in the queue."""
        assert node.queue_key is not None, node
        del self._nodes[node.queue_key]
        node.queue_key = None

    def pop(self) -> TreeNode:
        """Take out the node to be evicted next."""
        node: TreeNode = self._nodes.popitem(0)[1]
        node.queue_key = None
        return node
