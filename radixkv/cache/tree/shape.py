"""The shape of a radix tree: its nodes and edges, and how edges are cut, merged, added and removed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.events import EventChannel, Observer, PageRun, RemovalCause, Removed, Stored, run_of
from radixkv.cache.eviction.policies import resolve_policy
from radixkv.cache.eviction.policy import EvictionPolicy, hook
from radixkv.cache.namespace import Namespace
from radixkv.cache.token_ids import TOKEN_BYTES
from radixkv.cache.tree.checks import check_subscribers, check_tree
from radixkv.cache.tree.leaf_queue import LeafQueue
from radixkv.cache.tree.node import TreeNode
from radixkv.cache.tree.page_ids import PageBytes
from radixkv.cache.tree.subscribers import Subscriptions
from radixkv.config.checks import checked_int
from radixkv.errors import InvalidRequestError

if TYPE_CHECKING:
    from radixkv.cache.quotas.account_queues import AccountQueues
    from radixkv.cache.quotas.accounts import Accounts
    from radixkv.cache.tree.radix_tree import RadixTree


class TreeShape:
    """What `RadixTree` is made of below its verbs: roots, nodes, the eviction queue, and the counts of their pages.

    Its methods keep the invariants that `RadixTree` states, `check_invariants` proves them. They tell the policy and
    the observers of each change.
    """

    def __init__(
        self,
        page_size: int = 1,
        policy: str | EvictionPolicy = "lru",
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.page_size = checked_int("page_size", page_size, 1)
        self.policy = resolve_policy(policy)
        self.clock = clock
        self.broken_promise_tokens = 0
        self._page_bytes = self.page_size * TOKEN_BYTES
        self._roots: dict[Namespace, TreeNode] = {}
        self.subscriptions = Subscriptions(self._roots)
        self._tick = 0
        self._total_bytes = self._evictable_bytes = 0  # of page ids: as nodes keep them, so counting is one addition
        self._unclaimed: TreeNode | None = None  # what the last match or insert cut, until it is pinned
        self.events = EventChannel()
        self.policy.bind(cast("RadixTree", self))  # the only class of this kind
        self._queue: LeafQueue | AccountQueues = LeafQueue(self.policy, clock)
        self._accounts: Accounts | None = None  # of a cache with quotas
        self._on_requested = hook(self.policy, "requested")
        self._on_matched = hook(self.policy, "matched")
        self._on_added = hook(self.policy, "added")
        self._on_evicted = hook(self.policy, "evicted")
        self._on_trimmed = hook(self.policy, "trimmed")
        self._on_split = hook(self.policy, "split")
        self._on_merged = hook(self.policy, "merged")

    # -- sizes -------------------------------------------------------------------------------------------------------

    @property
    def total_size(self) -> int:
        """Tokens that the tree's pages have room for: the tokens in it, and what tails leave free. O(1)."""
        return self._total_bytes // TOKEN_BYTES * self.page_size

    @property
    def evictable_size(self) -> int:
        """As `total_size`, of unpinned nodes. O(1)."""
        return self._evictable_bytes // TOKEN_BYTES * self.page_size

    @property
    def protected_size(self) -> int:
        """As `total_size`, of pinned nodes. O(1)."""
        return self.total_size - self.evictable_size

    @property
    def num_pages(self) -> int:
        """Pages in the tree. O(1)."""
        return self._total_bytes // TOKEN_BYTES

    @property
    def num_evictable_pages(self) -> int:
        """Pages in unpinned nodes. O(1)."""
        return self._evictable_bytes // TOKEN_BYTES

    @property
    def tick(self) -> int:
        """Matches and inserts so far: the clock of `last_access`."""
        return self._tick

    # -- looking -----------------------------------------------------------------------------------------------------

    def root_of(self, namespace: Namespace) -> TreeNode | None:
        """The root of a namespace; None if nothing is cached there."""
        return self._roots.get(namespace)

    def namespaces(self) -> list[Namespace]:
        """The namespaces under which something is cached."""
        return list(self._roots)

    def nodes(self) -> Iterator[tuple[int, TreeNode]]:
        """All nodes with their depth (roots have 0), parents before children, in no other order. O(1) a node."""
        stack = [(0, root) for root in reversed(self._roots.values())]
        while stack:
            depth, node = stack.pop()
            yield depth, node
            stack.extend((depth + 1, child) for child in reversed(node.children.values()))

    def path_pages(self, node: TreeNode) -> NDArray[np.int32]:
        """The pages from the root to `node`, int32, read-only. O(depth + pages).

        Raises: InvalidRequestError if `node` was evicted.
        """
        pages = b"".join([above.pages for above in self._standing(node).path()])
        return np.frombuffer(pages, np.int32)[: -(-node.end // self.page_size)]  # its heir's path may be longer

    def cached_runs(self) -> Iterator[PageRun]:
        """All that is cached now, parents before children: where an observer that comes late begins. O(nodes)."""
        return (run_of(node, self.page_size) for _, node in self.nodes() if not node.is_root)

    def check_invariants(self) -> None:
        """Prove every invariant of the class docstring. O(tokens).

        Raises: InvariantError with what contradicts what.
        """
        check_tree(self, self._roots, self._queue, num_pages=self.num_pages, num_evictable=self.num_evictable_pages)
        check_subscribers(self, self.subscriptions.of_roots)

    def add_observer(self, observer: Observer) -> None:
        """Call `observer` with an event for everything stored and removed from now on (see `radixkv.cache.events`)."""
        self.events.add(observer)

    def remove_observer(self, observer: Observer) -> None:
        """Call `observer` no more."""
        self.events.remove(observer)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _touch(self, node: TreeNode) -> None:
        """Mark the path from `node` to its root as used now."""
        tick = self._tick
        current = node
        while (parent := current.parent) is not None:
            current.last_access = tick
            current = parent
        if node.entry is not None:
            self._queue.use(node)

    def _cut(self, node: TreeNode, head_tokens: int) -> TreeNode:
        """Cut `node`'s edge after `head_tokens`; returns the new upper node, which is merged back unless it is claimed.

        `node` stays the lower part, so that a pin on it still holds the whole path.
        """
        parent = node.parent
        assert parent is not None, "a root has no edge to cut"
        head_bytes = head_tokens * TOKEN_BYTES
        head_pages = head_bytes // self.page_size
        upper = TreeNode(
            node.key[:head_bytes], node.pages[:head_pages], parent.end + head_tokens, parent, node.last_access
        )
        upper.created, upper.priority, upper.keep_until = node.created, node.priority, node.keep_until
        upper.lock_ref, upper.hits = node.lock_ref, node.hits
        upper.state, upper.account = node.state, node.account
        upper.fork = upper.cut = True
        first_page = upper.key[: self._page_bytes]
        parent.children[first_page] = upper
        if parent.subscribers is not None:
            self.subscriptions.tell(parent.subscribers, first_page)
        node.key = node.edge[head_bytes:]
        node.num_tokens -= head_tokens
        node.pages = node.pages[head_pages:]
        node.parent = upper
        upper.children[node.key[: self._page_bytes]] = node
        self._unclaimed = upper
        if self._on_split is not None:
            self._on_split(upper, node)
        if node.entry is not None:  # a rank may depend on the edge
            self._queue.update(node)
        return upper

    def _merge_unclaimed(self) -> None:
        node = self._unclaimed
        self._unclaimed = None
        if node is not None and node.cut and node.parent is not None:
            self._merge(node)

    def _merge(self, upper: TreeNode) -> None:
        """Undo a cut, unless exactly that prefix is pinned or kept."""
        if not upper.children:  # the lower part was evicted: what is left is a leaf like any other
            upper.cut = False
            if upper.lock_ref == 0 and upper.entry is None:
                self._queue.add(upper)
            return
        (lower,) = upper.children.values()
        if lower.lock_ref == upper.lock_ref and not self._is_kept_apart(upper, lower):
            self._absorb([upper], lower)

    def _is_kept_apart(self, upper: TreeNode, lower: TreeNode) -> bool:
        """Whether `upper` outlives what comes after it, which a merge would then keep as well."""
        return upper.keep_until > lower.keep_until and upper.keep_until > self.clock()

    def _shorten(self, path: list[TreeNode]) -> None:
        """Merge the forks on `path` that have one child left, and are neither pinned nor kept apart from it."""
        start = 0
        while start < len(path):
            end = start
            while path[end].fork and len(path[end].children) == 1 and end + 1 < len(path):
                if path[end].lock_ref != path[end + 1].lock_ref or self._is_kept_apart(path[end], path[end + 1]):
                    break
                end += 1
            if end > start:
                self._absorb(path[start:end], path[end])
            start = end + 1

    def _absorb(self, uppers: list[TreeNode], lower: TreeNode) -> None:
        """Let `lower` take up the edges of `uppers`: the ancestors above it, top first, without other children."""
        chain = [*uppers, lower]
        for upper, below in pairwise(chain):
            if self._on_merged is not None:
                self._on_merged(upper, below)
            below.state = upper.state
            below.last_access = upper.last_access
            below.hits = upper.hits  # at least as many
            below.priority = max(upper.priority, below.priority)
            below.keep_until = max(upper.keep_until, below.keep_until)
        top, parent = uppers[0], uppers[0].parent
        assert parent is not None, top
        first_page = top.key[: self._page_bytes]
        parent.children[first_page] = lower
        if parent.subscribers is not None:
            self.subscriptions.tell(parent.subscribers, first_page)
        lower.key = b"".join([node.edge for node in chain])
        lower.num_tokens = lower.end - parent.end
        lower.pages = b"".join([node.pages for node in chain])
        lower.parent = parent
        for upper in uppers:
            upper.parent, upper.heir, upper.children = None, lower, {}
            if upper.subscribers is not None:
                self.subscriptions.tell_all(upper.subscribers)
        if lower.entry is not None:
            self._queue.update(lower)

    def _standing(self, node: TreeNode) -> TreeNode:
        """`node`, or what it was merged into. Raises: InvalidRequestError if that was evicted."""
        while node.heir is not None:
            node = node.heir
        if not node.in_tree:
            raise InvalidRequestError(f"{node} was evicted; match the prefix again")
        return node

    def _add_leaf(self, parent: TreeNode, key: bytes, pages: PageBytes) -> TreeNode:
        """Add a leaf that is used now. If the policy fails the tree is as before."""
        leaf = TreeNode(key, pages, parent.end + len(key) // TOKEN_BYTES, parent, self._tick)
        first_page = key[: self._page_bytes]
        if parent.namespace is not None:
            self._roots[parent.namespace] = parent
            parent.subscribers = self.subscriptions.of_roots.get(parent.namespace)
        parent.children[first_page] = leaf
        if parent.subscribers is not None:
            self.subscriptions.tell(parent.subscribers, first_page)
        if parent.ordered is not None:
            parent.ordered.add(first_page)
        self._evictable_bytes += len(pages)
        self._total_bytes += len(pages)
        if self._accounts is not None:
            if parent.namespace is not None:
                parent.account = self._accounts.of(parent.namespace)
            leaf.account = parent.account
            self._count_evictable(leaf, len(pages))
        try:
            if self._on_added is not None:
                self._on_added(leaf)
            self._queue.add_used(leaf)
        except BaseException:
            if leaf.entry is not None:
                self._queue.remove(leaf)
            self._unlink(parent, first_page, leaf)
            raise
        if parent.entry is not None:
            self._queue.remove(parent)
        parent.cut = False
        if self.events.observers:
            self.events.send(Stored(run_of(leaf, self.page_size), "pool"))
        return leaf

    def _remove_leaf(self, leaf: TreeNode, cause: RemovalCause) -> None:
        """Remove an unpinned leaf from the tree and from the queue. It is removed whether or not the policy fails."""
        parent = leaf.parent
        assert parent is not None, leaf
        assert leaf.lock_ref == 0, leaf
        run = run_of(leaf, self.page_size) if self.events.observers else None
        try:
            if self._on_evicted is not None:
                self._on_evicted(leaf)
        finally:
            self._queue.remove(leaf)
            self._unlink(parent, leaf.key[: self._page_bytes], leaf)
            try:
                if not parent.children and parent.namespace is None and parent.lock_ref == 0:
                    self._queue.add(parent)
            finally:
                if run is not None:
                    self.events.send(removal(leaf, run, cause))

    def _count_evictable(self, node: TreeNode, page_bytes: int) -> None:
        """So many more pages of the account of `node`, in bytes of page ids, can be evicted; fewer if negative."""
        if self._accounts is not None and page_bytes:
            assert node.account is not None, node
            self._accounts.evictable(node.account, page_bytes // TOKEN_BYTES)

    def _unlink(self, parent: TreeNode, first_page: bytes, leaf: TreeNode) -> None:
        """Take a leaf from its parent; a root goes with its last child."""
        del parent.children[first_page]
        if parent.subscribers is not None:
            self.subscriptions.tell(parent.subscribers, first_page)
        if leaf.subscribers is not None:
            self.subscriptions.tell_all(leaf.subscribers)
        if parent.ordered is not None:
            parent.ordered.remove(first_page)
        leaf.parent = None
        self._count_removed(leaf)
        if parent.namespace is not None and not parent.children:
            del self._roots[parent.namespace]
            parent.subscribers = None

    def _count_removed(self, leaf: TreeNode) -> None:
        """Count the pages of an unpinned leaf no more."""
        page_bytes = len(leaf.pages)
        self._evictable_bytes -= page_bytes
        self._total_bytes -= page_bytes
        if self._accounts is not None:
            self._count_evictable(leaf, -page_bytes)


def removal(leaf: TreeNode, run: PageRun, cause: RemovalCause) -> Removed:
    """What observers are told of `leaf`, which was `run`."""
    return Removed(run, "pool", cause, leaf.last_access, leaf.hits, leaf.priority, leaf.keep_until)
