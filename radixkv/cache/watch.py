"""How much of a prompt is cached, kept at hand while the cache changes elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.namespace import Namespace

if TYPE_CHECKING:
    from radixkv.cache.prefix_cache import PrefixCache
    from radixkv.cache.tree.node import TreeNode


class PrefixWatch:
    """What `PrefixCache.peek` says of one prompt, without reading the prompt again as long as it stays so.

    A prefix ends somewhere in the tree; what is cached of it changes only if the node there changes its children or its
    place, or if pages lose or gain what the residency gives them. Both leave a number behind, so `is_current` is O(1).

    >>> from radixkv import PrefixCache
    >>> cache = PrefixCache(num_pages=8, page_size=2)
    >>> watch = cache.watch([1, 2, 3, 4])
    >>> with cache.acquire([1, 2]) as lease:
    ...     _ = lease.commit([1, 2])
    >>> watch.cached_tokens, watch.is_current(), watch.refresh()
    (0, False, 2)
    """

    __slots__ = (
        "_cache",
        "_changes",
        "_child",
        "_child_tokens",
        "_end",
        "_namespace",
        "_next_page",
        "_node",
        "_residency_changes",
        "_tokens",
        "cached_tokens",
    )

    def __init__(self, cache: PrefixCache, tokens: NDArray[np.int32], namespace: Namespace) -> None:
        """Takes ids that were checked; `PrefixCache.watch` checks them."""
        self._cache, self._tokens, self._namespace = cache, tokens, namespace
        self._node: TreeNode | None = None
        self.cached_tokens = 0  # as of the last `refresh`
        self.refresh()

    def is_current(self) -> bool:
        """Whether `cached_tokens` is what `peek` would say now; it may be, too, if not. O(1)."""
        node = self._node
        if node is not None and node.parent is not None:
            stands = node.changes == self._changes and node.end == self._end
        else:
            root = self._cache.tree.root_of(self._namespace)
            stands = node is root and (root is None or root.changes == self._changes)
        return stands and self._residency_changes == self._cache.residency.num_changes

    def has_same_pages(self) -> bool:
        """Whether as many whole pages are cached as at the last `refresh`: it is right to within a page. O(1)."""
        node = self._node
        if node is None or node.namespace is not None:
            node, stands = self._cache.tree.root_of(self._namespace), True  # roots come and go with their children
        else:
            stands = node.parent is not None and node.end == self._end
        child = None if node is None else node.children.get(self._next_page)
        same_child = child is self._child and (child is None or child.num_tokens == self._child_tokens)
        return stands and same_child and self._residency_changes == self._cache.residency.num_changes

    def refresh(self) -> int:
        """Look again. O(tokens + depth). Returns: `cached_tokens`, as it is now."""
        tree = self._cache.tree
        held_tokens, path = tree.peek_tokens(self._tokens, self._namespace)
        node = path[-1] if path else tree.root_of(self._namespace)
        if node is not None and (held_tokens < node.end or node.is_tail(tree.page_size)):
            node = node.parent  # one of whose children has the most of what comes next
        self._node, self._changes, self._end = (None, 0, 0) if node is None else (node, node.changes, node.end)
        self._next_page = self._tokens[self._end : self._end + tree.page_size].tobytes()
        child = self._child = None if node is None else node.children.get(self._next_page)
        self._child_tokens = 0 if child is None else child.num_tokens
        self._residency_changes = self._cache.residency.num_changes
        self.cached_tokens = self._cache.usable_tokens(path, held_tokens)
        return self.cached_tokens
