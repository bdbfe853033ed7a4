"""In which order unused leaves leave the tree: what a policy is."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from radixkv.errors import PolicyError

if TYPE_CHECKING:
    from radixkv.cache.namespace import Namespace
    from radixkv.cache.tree.node import TreeNode
    from radixkv.cache.tree.radix_tree import RadixTree


class EvictionPolicy:
    """Ranks leaves: of the unpinned ones that of the smallest rank is evicted first. Subclass it to write your own.

    A policy needs a `name` and a `rank`. The other methods are hooks: what a subclass does not override costs
    nothing. A policy object serves one tree, and keeps what it knows of a node in `node.state`.

    If a method raises an exception, whoever called the tree or the cache gets a PolicyError with that cause, and
    everything stays consistent. A match or insert has not happened then. Evictions, removals and unpinning have, as
    far as they came; a leaf that could not be ranked is evicted before all others, unless it is ranked anew before.

    >>> from radixkv import RadixTree
    >>> class ShortestFirst(EvictionPolicy):
    ...     name = "shortest"
    ...     def rank(self, node):
    ...         return (node.num_tokens, node.last_access)
    >>> tree = RadixTree(policy=ShortestFirst())
    >>> _ = tree.insert([1, 2, 3], [0, 1, 2]), tree.insert([7], [3])
    >>> tree.evict(1).tolist()
    [3]
    """

    name: str
    ranks_by_last_access = False
    """Whether `rank` is `node.last_access`: what is used goes to the end of the queue then, without further thought."""
    both_ends = False
    """Whether the leaf that ranks last in its group may go, too: `urgency` is then asked for both."""
    whole_leaves = False
    """Whether leaves go whole, also where less than that is needed."""
    tree: RadixTree

    def bind(self, tree: RadixTree) -> None:
        """Know the tree whose leaves are ranked. Called once, when the tree is made."""
        self.tree = tree

    def rank(self, node: TreeNode) -> Any:
        """A value that compares with the ranks of other leaves. Should cost O(1).

        It is asked for when the node becomes an unpinned leaf, and again whenever it is used or its edge changes; a
        rank that changes at other times takes effect no sooner. Of equal ranks the one that was asked for first wins.
        """
        raise NotImplementedError

    def group(self, node: TreeNode) -> Hashable:
        """Keep the node in a queue of its own group, ordered by `rank`; see `urgency`. Asked for with `rank`."""
        return None

    def urgency(self, node: TreeNode) -> float:
        """How soon the head of a group should go *now*, smallest first: asked at each eviction of each group's head.

        This lets whole groups age at different speeds, at O(groups) for each eviction. In a cache with quotas each
        namespace with one has groups of its own; of heads that are as urgent, the one of the smallest rank goes.
        """
        raise NotImplementedError

    def requested(self, tokens: NDArray[np.int32], matched_tokens: int, namespace: Namespace) -> None:
        """A match found the first `matched_tokens` of `tokens`. Before its nodes are touched."""

    def matched(self, node: TreeNode) -> None:
        """A match came through `node`; `last_access` still tells of the use before. The deepest node comes first."""

    def added(self, node: TreeNode) -> None:
        """`node` is a new leaf."""

    def evicted(self, node: TreeNode) -> None:
        """`node` is about to be removed; it still hangs in the tree."""

    def trimmed(self, kept: TreeNode, gone: TreeNode) -> None:
        """The end of a leaf, now `gone`, is about to be removed, and `kept` is what stays of it; they share `state`.

        Without it `split(kept, gone)` and `evicted(gone)` are told instead. The parent of `gone` is `kept`, which knows
        of no child.
        """

    def split(self, upper: TreeNode, lower: TreeNode) -> None:
        """The edge of `lower` was cut, and `upper` is its new parent. By default they share `state`."""

    def merged(self, upper: TreeNode, lower: TreeNode) -> None:
        """`lower` is about to take up the edge of its parent `upper`. By default it takes up its `state`, too."""


def hook(policy: EvictionPolicy, name: str) -> Callable[..., Any] | None:
    """The policy's own method of that name, whose exceptions come as PolicyError; None if it did not override it."""
    method = getattr(type(policy), name, None)
    if method is None or method is getattr(EvictionPolicy, name):
        return None
    call: Callable[..., Any] = getattr(policy, name)

    def checked(*arguments: Any) -> Any:
        try:
            return call(*arguments)
        except Exception as error:
            raise PolicyError(policy.name, error) from error

    return checked
