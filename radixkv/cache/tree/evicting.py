"""How leaves leave a radix tree: in the order of the policy, and first those of namespaces beyond their quota."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.events import Cleared, RemovalCause, prefix_of, run_of
from radixkv.cache.quotas.account_queues import AccountQueues
from radixkv.cache.quotas.accounts import Account, Accounts
from radixkv.cache.token_ids import TOKEN_BYTES
from radixkv.cache.tree.leaf_queue import LeafQueue
from radixkv.cache.tree.node import TreeNode
from radixkv.cache.tree.page_ids import PageBytes, leading_pages
from radixkv.cache.tree.shape import TreeShape, removal
from radixkv.errors import PolicyError

WHOLE_KEY_OF = 8  # a trimmed leaf keeps its whole key down to this part of it: 4 bytes a token, where KV has thousands
LEAST_SHARE_KEPT = 20  # a leaf goes whole where less than this part of the cache would be left of it


class EvictingTree(TreeShape):
    """A `TreeShape` that makes room."""

    def evict(self, num_tokens: int) -> NDArray[np.int32]:
        """Remove unpinned leaves in policy order until the pages of `num_tokens` tokens are gone, or none is left.

        Of the last leaf no more than these pages go, from its end, unless what stays would be less than 1/20 of all
        that is cached; a parent becomes a leaf when its last child goes.
        O(log leaves) a leaf, and O(pages freed).

        Returns: the freed pages, int32, read-only; no longer the tree's.
        Raises: PolicyError if the policy fails, with the pages that were freed before in its `freed`.

        >>> from radixkv import RadixTree
        >>> tree = RadixTree()
        >>> _ = tree.insert([1, 2], pages=[7, 8]), tree.insert([5, 6, 7], pages=[9, 10, 11])
        >>> _ = tree.match_prefix([1, 2])                           # used last, so it goes last
        >>> tree.evict(1).tolist(), tree.evict(3).tolist()
        ([11], [9, 10, 8])
        """
        return self._evict(num_tokens, "evicted")

    def _evict(self, num_tokens: int, cause: RemovalCause) -> NDArray[np.int32]:
        freed: list[PageBytes] = []
        missing = -(-num_tokens // self.page_size) * TOKEN_BYTES  # in bytes of page ids
        queue = self._queue
        try:
            while missing > 0 and self._evictable_bytes:
                leaf = queue.first()
                size = len(leaf.pages)
                rest = size - missing
                trims = rest > 0 and not self.policy.whole_leaves and self._is_worth_keeping(rest)
                if leaf.keep_until and cause == "evicted" and leaf.keep_until > self.clock():
                    self.broken_promise_tokens += (missing if trims else size) // TOKEN_BYTES * self.page_size
                if trims:
                    try:
                        self._trim(leaf, rest, cause)
                    finally:
                        freed.append(leaf.pages)  # what is left of it: its end
                    break
                missing -= size
                freed.append(leaf.pages)
                self._remove_leaf(leaf, cause)
        except PolicyError as error:
            error.freed = np.frombuffer(b"".join(freed), np.int32)
            raise
        return np.frombuffer(freed[0] if len(freed) == 1 else b"".join(freed), np.int32)

    def _is_worth_keeping(self, page_bytes: int) -> bool:
        """Whether so much of a leaf, in bytes of page ids, is worth the time that cutting it off takes."""
        return page_bytes * LEAST_SHARE_KEPT >= self._total_bytes

    def _trim(self, leaf: TreeNode, kept_bytes: int, cause: RemovalCause) -> None:
        """Remove the end of an unpinned leaf, but for its first pages, `kept_bytes` in page ids. O(pages removed).

        The rest is a new node in its place, so that nobody takes the whole for cached who knows the leaf; that becomes
        the part which is removed. It is, whether or not the policy fails.
        """
        told = self._on_trimmed or self._on_split or self._on_evicted
        observed = bool(self.events.observers)
        kept = self._cut_end(leaf, kept_bytes, with_key=observed or told is not None)
        run = run_of(leaf, self.page_size) if observed else None
        try:
            if self._on_trimmed is not None:
                self._on_trimmed(kept, leaf)
            elif told is not None:
                if self._on_split is not None:
                    self._on_split(kept, leaf)
                if self._on_evicted is not None:
                    self._on_evicted(leaf)
        finally:
            leaf.parent = None
            self._count_removed(leaf)
            try:
                self._queue.replace(leaf, kept)
            finally:
                if run is not None:
                    self.events.send(removal(leaf, run, cause))

    def _cut_end(self, leaf: TreeNode, kept_bytes: int, *, with_key: bool) -> TreeNode:
        """Put a node that takes over the first pages of `leaf` in its place; tokens are not copied if many.

        `leaf` stays the rest, which has the new node as its parent, though that knows of no child. Its `key` is a
        window on that of the whole unless `with_key`.
        """
        parent = leaf.parent
        assert parent is not None, leaf
        kept_tokens = kept_bytes // TOKEN_BYTES * self.page_size
        size = kept_tokens * TOKEN_BYTES
        key, pages = leaf.key, leaf.pages
        prefix = prefix_of(leaf, self.page_size) if self.events.observers else None
        kept = TreeNode(
            key if WHOLE_KEY_OF * size > len(key) else key[:size],
            leading_pages(pages, kept_bytes),
            parent.end + kept_tokens,
            parent,
            leaf.last_access,
        )
        kept.num_tokens = kept_tokens
        kept.created, kept.priority, kept.keep_until = leaf.created, leaf.priority, leaf.keep_until
        kept.state, kept.fork, kept.hits, kept.account = leaf.state, leaf.fork, leaf.hits, leaf.account
        if prefix is not None:
            kept.prefix = prefix.first(kept.end)
        end = leaf.num_tokens * TOKEN_BYTES
        # windows will do for a node that leaves the tree: copies would cost more than all else here
        leaf.key = key[size:end] if with_key else memoryview(key)[size:end]  # type: ignore[assignment]
        leaf.pages = pages[kept_bytes:]
        leaf.num_tokens -= kept_tokens
        leaf.parent = kept
        first_page = key[: self._page_bytes]
        parent.children[first_page] = kept
        if parent.subscribers is not None:
            self.subscriptions.tell(parent.subscribers, first_page)
        if leaf.subscribers is not None:
            self.subscriptions.tell_all(leaf.subscribers)
        return kept

    def clear(self) -> NDArray[np.int32]:
        """Remove everything that is not pinned. Observers are sent `Cleared` if nothing was. O(nodes).

        Returns: the freed pages, int32, read-only; no longer the tree's.
        Raises: PolicyError, after all of that was done, with the pages.
        """
        if self._evictable_bytes < self._total_bytes:
            return self._evict_all()
        observers, self.events.observers = self.events.observers, ()
        try:
            return self._evict_all()
        finally:
            self.events.observers = observers
            if observers:
                self.events.send(Cleared("pool"))

    def _evict_all(self) -> NDArray[np.int32]:
        freed: list[NDArray[np.int32]] = []
        failure: PolicyError | None = None
        while self._queue:
            try:
                freed.append(self._evict(self.evictable_size, "reset"))
            except PolicyError as error:  # on with the others: what the policy fails on comes first now
                freed.append(np.asarray(error.freed, np.int32))
                failure = failure or error
        pages = np.concatenate(freed) if freed else np.empty(0, np.int32)
        pages.flags.writeable = False
        if failure is not None:
            failure.freed = pages
            raise failure
        return pages

    # -- quotas ------------------------------------------------------------------------------------------------------

    def evict_for(self, asker: Account, num_pages: int, missing_pages: int) -> NDArray[np.int32]:
        """As `evict`, of one leaf, for a lease of `asker` that takes `num_pages`, of which `missing_pages` are missing.

        Of the leaf of another account no more goes than that has beyond its guarantee, whatever would be left of it.
        O(log leaves + log accounts) under a policy without groups, and O(pages freed).
        """
        assert isinstance(self._queue, AccountQueues), "a cache without quotas"
        leaf = self._queue.first_for(asker, num_pages)
        account, size = leaf.account, len(leaf.pages) // TOKEN_BYTES
        assert account is not None, leaf
        allowed = size if account is asker else account.lent_pages
        least = min(size, missing_pages)
        rest_bytes = (size - least) * TOKEN_BYTES
        trims = rest_bytes > 0 and not self.policy.whole_leaves and self._is_worth_keeping(rest_bytes)
        return self._take_from(leaf, size if allowed >= size and not trims else min(allowed, least))

    def _take_from(self, leaf: TreeNode, num_pages: int) -> NDArray[np.int32]:
        """Evict so many pages of an unpinned leaf, from its end."""
        kept_bytes = len(leaf.pages) - num_pages * TOKEN_BYTES
        freed = np.frombuffer(bytes(leaf.pages[kept_bytes:]), np.int32)
        if leaf.keep_until > self.clock():
            self.broken_promise_tokens += num_pages * self.page_size
        try:
            if kept_bytes:
                self._trim(leaf, kept_bytes, "evicted")
            else:
                self._remove_leaf(leaf, "evicted")
        except PolicyError as error:
            error.freed = freed
            raise
        return freed

    def use_accounts(self, accounts: Accounts | None) -> None:
        """Count evictable pages by account from now on, in new `accounts`; None for no more of it.

        O(leaves log leaves + nodes). Raises: PolicyError, after all of that was done.
        """
        leaves = list(self._queue)
        for leaf in leaves:
            self._queue.remove(leaf)
        self._accounts = accounts
        self._queue = (
            LeafQueue(self.policy, self.clock) if accounts is None else AccountQueues(accounts, self.policy, self.clock)
        )
        for _, node in self.nodes():
            node.account = None if accounts is None else self._account_of(node, accounts)
            if accounts is not None and node.account is not None and node.lock_ref == 0:
                accounts.evictable(node.account, len(node.pages) // TOKEN_BYTES)
        failure: PolicyError | None = None
        for leaf in leaves:
            try:
                self._queue.add(leaf)
            except PolicyError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def _account_of(self, node: TreeNode, accounts: Accounts) -> Account:
        """The account of a root, or of a node whose parent has one."""
        if node.namespace is not None:
            return accounts.of(node.namespace)
        account = None if node.parent is None else node.parent.account
        assert account is not None, node
        return account
