"""What a radix tree tells whoever listens."""

from __future__ import annotations

from typing import Protocol

from radixkv.cache.tree.node import TreeNode


class CacheObserver(Protocol):
    """Listens to a `RadixTree`: metrics, further tiers, routers.

    Each call is made while the tree is being changed: read the node (its tokens, pages, `end`, `path()`), and change
    nothing. Splits and merges of nodes are not reported, since what is cached stays the same. A tree without
    observers pays one comparison for each node stored or removed.
    """

    def stored(self, node: TreeNode) -> None:
        """The tokens of `node` are cached now; it hangs in the tree."""

    def removed(self, node: TreeNode) -> None:
        """The tokens of `node` are about to leave the cache; it still hangs in the tree."""

    def cleared(self) -> None:
        """Everything left the cache at once; `removed` is not called for the nodes."""
