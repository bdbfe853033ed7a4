"""How much of a prompt is cached, kept at hand while the cache changes elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.namespace import Namespace
from radixkv.cache.tree.subscribers import Subscription

if TYPE_CHECKING:
    from radixkv.cache.readable_cache import ReadableCache


class PrefixWatch:
    """What `PrefixCache.peek` says of one prompt, without reading the prompt again as long as it stays so.

    A prefix ends somewhere in the tree. What is cached of it, to within a page, changes only if the child there that
    begins with the prompt's next page does, or if the node there leaves the tree: the tree tells the watch of both, and
    the watch tells `on_change`. It changes by less than a page if another child comes or goes: that is counted. And it
    changes if pages lose or gain what the residency gives them, which leaves a number behind. So `is_current` is O(1).

    Close it, or use it as a context manager: until then the tree remembers it. One that is dropped is forgotten when
    the next watch of the same cache is made or refreshed.

    >>> from radixkv import PrefixCache
    >>> cache = PrefixCache(num_pages=8, page_size=2)
    >>> watch = cache.watch([1, 2, 3, 4], on_change=lambda: print("told"))
    >>> with cache.acquire([1, 2]) as lease:
    ...     _ = lease.commit([1, 2])
    told
    >>> watch.cached_tokens, watch.is_current(), watch.refresh()
    (0, False, 2)
    >>> watch.close()

    Attributes:
        cached_tokens: as of the last `refresh`.
    """

    __slots__ = (
        "_cache",
        "_changes",
        "_namespace",
        "_residency_changes",
        "_subscription",
        "_tokens",
        "cached_tokens",
    )

    def __init__(
        self,
        cache: ReadableCache,
        tokens: NDArray[np.int32],
        namespace: Namespace,
        on_change: Callable[[], object] | None = None,
    ) -> None:
        """Takes ids that were checked; `PrefixCache.watch` checks them."""
        self._cache, self._tokens, self._namespace = cache, tokens, namespace
        self._subscription = Subscription(on_change)
        self._changes = self._residency_changes = 0
        self.cached_tokens = 0
        self.refresh()

    def is_current(self) -> bool:
        """Whether `cached_tokens` is what `peek` would say now; it may be, too, if not. O(1)."""
        subscribers = self._subscription.subscribers
        if subscribers is None or subscribers.changes != self._changes:
            return False
        return self._residency_changes == self._cache.residency.num_changes

    def has_same_pages(self) -> bool:
        """Whether as many whole pages are cached as at the last `refresh`: it is right to within a page. O(1)."""
        if self._subscription.subscribers is None:
            return False
        return self._residency_changes == self._cache.residency.num_changes

    def refresh(self) -> int:
        """Look again. O(tokens + depth), and O(page_size + depth) while it was not told of a change.

        Returns: `cached_tokens`, as it is now.
        """
        tree = self._cache.tree
        subscriptions = tree.subscriptions
        stands = subscriptions.node_of(self._subscription)
        subscriptions.remove(self._subscription)
        held_tokens, path = tree.peek_tokens(self._tokens, self._namespace, below=stands)
        node = path[-1] if path else None
        if node is not None and (held_tokens < node.end or node.is_tail(tree.page_size)):
            node = node.parent  # one of whose children has the most of what comes next
        end = 0 if node is None else node.end
        next_page = self._tokens[end : end + tree.page_size].tobytes()
        self._changes = subscriptions.add(self._subscription, node, self._namespace, next_page)
        self._residency_changes = self._cache.residency.num_changes
        self.cached_tokens = self._cache.usable_tokens(path, self._tokens[:held_tokens], self._namespace)
        return self.cached_tokens

    def close(self) -> None:
        """Be told of no more changes; `is_current` is False from now on. Idempotent. O(1)."""
        self._cache.tree.subscriptions.remove(self._subscription)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        subscription: Subscription | None = getattr(self, "_subscription", None)
        if subscription is not None and subscription.subscribers is not None:
            self._cache.tree.subscriptions.dropped.append(subscription)
