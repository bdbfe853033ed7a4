"""The prefix cache: the only place that knows who owns a page."""

from __future__ import annotations

import warnings
import weakref
from collections import deque
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.allocator import TokenToKVPoolAllocator
from radixkv.cache.eviction import EvictionPolicy, resolve_policy
from radixkv.cache.radix_tree import RadixTree, TreeNode
from radixkv.cache.token_ids import TOKEN_BYTES, TokenIds, token_array
from radixkv.config import CacheConfig
from radixkv.errors import ClosedError, InvalidRequestError, InvariantError, OutOfPagesError


class CacheStats(NamedTuple):
    """What a `PrefixCache` holds now, and what it did so far.

    `total_tokens = evictable_tokens + protected_tokens` lie in the tree; `leased_pages` are held by leases only.
    `hit_tokens` of `query_tokens` asked for by `acquire` were cached; `evicted_tokens` made room for others (what
    `reset` forgot is not among them).
    """

    num_pages: int
    page_size: int
    free_pages: int
    leased_pages: int
    total_tokens: int
    evictable_tokens: int
    protected_tokens: int
    num_leases: int
    query_tokens: int
    hit_tokens: int
    evicted_tokens: int

    @property
    def hit_rate(self) -> float:
        """Share of the tokens asked for that were cached; 0 before the first query."""
        return self.hit_tokens / self.query_tokens if self.query_tokens else 0.0

    @property
    def used_pages(self) -> int:
        """Pages in the tree or held by leases."""
        return self.num_pages - self.free_pages


class PrefixCache:
    """A radix tree over a pool of pages: hands out leases, evicts when it must, and never loses a page.

    It manages page numbers; whoever holds the KV bytes indexes them by these numbers. The tree holds one reference
    on each page in it; each lease holds one on each page it reads or writes.

    Invariants, proved by `check_invariants`: those of `RadixTree` and `TokenToKVPoolAllocator`, and

    - free pages + pages in the tree + pages held by leases only = `num_pages`;
    - the count of a page is 1 if it is in the tree, plus the number of leases whose `pages` hold it;
    - a node's `lock_ref` is the number of open leases that end in it or below.

    Not thread-safe.

    >>> cache = PrefixCache(num_pages=8, page_size=4)
    >>> prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    >>> with cache.acquire(prompt) as lease:
    ...     lease.cached_tokens, len(lease.pages)       # compute KV for prompt[0:] into these pages …
    ...     lease.commit(prompt)                        # … and share it
    (0, 3)
    8
    >>> with cache.acquire([1, 2, 3, 4, 5, 6, 7, 8, 10]) as lease:
    ...     lease.cached_tokens
    8
    >>> cache.stats().free_pages
    6
    """

    def __init__(self, num_pages: int, page_size: int = 16, policy: str | EvictionPolicy = "lru") -> None:
        resolved = resolve_policy(policy)
        self.config = CacheConfig(num_pages=num_pages, page_size=page_size, policy=resolved.name)
        self.tree = RadixTree(page_size, resolved)
        self.allocator = TokenToKVPoolAllocator(num_pages)
        self._leases: weakref.WeakSet[Lease] = weakref.WeakSet()
        self._dropped: deque[tuple[TreeNode, NDArray[np.int32]]] = deque()  # what leases without release() held
        self._query_tokens = self._hit_tokens = self._evicted_tokens = 0

    @property
    def page_size(self) -> int:
        """Tokens a page."""
        return self.config.page_size

    @property
    def num_pages(self) -> int:
        """Pages in the pool."""
        return self.config.num_pages

    @property
    def available_pages(self) -> int:
        """Pages that are free or can be evicted. O(1)."""
        return self.allocator.num_free + self.tree.evictable_size // self.page_size

    def pages_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens fill, the last one perhaps in part."""
        return -(-num_tokens // self.page_size)

    def peek(self, ids: TokenIds, *, extra_key: str | None = None, cache_salt: str | None = None) -> int:
        """How many leading tokens of `ids` are cached. Changes nothing. O(tokens + depth)."""
        return self.tree.peek(ids, extra_key=extra_key, cache_salt=cache_salt)

    def acquire(
        self,
        ids: TokenIds,
        *,
        extra_key: str | None = None,
        cache_salt: str | None = None,
        max_cached_tokens: int | None = None,
    ) -> Lease:
        """Pin the cached prefix of `ids` and take pages for the rest, evicting what is unused if need be.

        O(tokens + depth), and O(log leaves) for each leaf evicted. `max_cached_tokens` bounds the hit: an engine
        that needs the logits of the last token computes at least that one, and passes `len(ids) - 1`.

        Raises: OutOfPagesError if the rest does not fit (nothing is taken then); InvalidRequestError for a negative
            `max_cached_tokens`; TokenIdsTypeError, InvalidTokenIdsError.
        """
        if max_cached_tokens is not None and max_cached_tokens < 0:
            raise InvalidRequestError(f"max_cached_tokens must not be negative, as {max_cached_tokens} is")
        self._reap()
        tokens = token_array(ids)
        wanted = tokens if max_cached_tokens is None else tokens[:max_cached_tokens]
        match = self.tree.match_prefix(wanted, extra_key=extra_key, cache_salt=cache_salt)
        self.tree.inc_lock_ref(match.node)
        try:
            own_pages = self._take(self.pages_for(len(tokens)) - len(match.pages))
        except BaseException:
            self.tree.dec_lock_ref(match.node)
            raise
        self.allocator.retain(match.pages)
        self._query_tokens += len(tokens)
        self._hit_tokens += match.length
        lease = Lease(
            self,
            tokens[: match.length].tobytes(),
            np.concatenate([match.pages, own_pages]),
            match.node,
            (extra_key, cache_salt),
        )
        self._leases.add(lease)
        return lease

    def reset(self) -> None:
        """Forget every prefix that no lease pins. O(nodes)."""
        self._reap()
        self.allocator.release(self.tree.evict(self.tree.evictable_size))

    def stats(self) -> CacheStats:
        """What the cache holds now, and what it did so far. O(1)."""
        self._reap()
        tree_pages = self.tree.total_size // self.page_size
        return CacheStats(
            num_pages=self.num_pages,
            page_size=self.page_size,
            free_pages=self.allocator.num_free,
            leased_pages=self.allocator.num_used - tree_pages,
            total_tokens=self.tree.total_size,
            evictable_tokens=self.tree.evictable_size,
            protected_tokens=self.tree.protected_size,
            num_leases=len(self._leases),
            query_tokens=self._query_tokens,
            hit_tokens=self._hit_tokens,
            evicted_tokens=self._evicted_tokens,
        )

    def check_invariants(self) -> None:
        """Prove every invariant of the class docstring. O(num_pages + tokens). Raises: InvariantError."""
        self._reap()
        self.tree.check_invariants()
        self.allocator.check_invariants()
        expected = np.zeros(self.num_pages, np.int64)
        locks: dict[int, int] = {}
        for _, node in self.tree.nodes():
            expected[np.frombuffer(node.pages, np.int32)] += 1
        for lease in self._leases:
            expected[lease.pages] += 1
            pinned: TreeNode | None = lease.node
            while pinned is not None:
                locks[id(pinned)] = locks.get(id(pinned), 0) + 1
                pinned = pinned.parent
        counts = np.array([self.allocator.ref_count(page) for page in range(self.num_pages)])
        if not np.array_equal(counts, expected):
            wrong = np.flatnonzero(counts != expected)
            raise InvariantError(f"pages {wrong.tolist()} count {counts[wrong]} references, not {expected[wrong]}")
        for _, node in self.tree.nodes():
            if not node.is_root and node.lock_ref != locks.get(id(node), 0):
                raise InvariantError(f"{node} is pinned by {locks.get(id(node), 0)} leases")

    def _reap(self) -> None:
        """Release what dropped leases held. Not in their `__del__`: that may run in the middle of any operation."""
        while self._dropped:
            node, pages = self._dropped.popleft()
            self.tree.dec_lock_ref(node)
            self.allocator.release(pages)

    def _take(self, num_pages: int) -> NDArray[np.int32]:
        self._reap()
        missing = num_pages - self.allocator.num_free
        if missing > 0:
            evictable = self.tree.evictable_size // self.page_size
            if missing > evictable:
                raise OutOfPagesError(
                    needed=num_pages, free=self.allocator.num_free, evictable=evictable, total=self.num_pages
                )
            freed = self.tree.evict(missing * self.page_size)
            self._evicted_tokens += len(freed) * self.page_size
            self.allocator.release(freed)
        return self.allocator.alloc(num_pages)

    def __repr__(self) -> str:
        stats = self.stats()
        return (
            f"PrefixCache({stats.num_pages} pages of {stats.page_size}: {stats.free_pages} free, "
            f"{stats.total_tokens} tokens cached, {stats.num_leases} leases)"
        )


class Lease:
    """One request's claim on the cache: the pinned prefix it reads and the pages it may write.

    `[0, cached_tokens)` were computed when the lease was made; the request computes the rest into `pages` and calls
    `commit`. Use it as a context manager, or call `release`. What a lease that is dropped without either held is taken
    back with the cache's next operation, and a ResourceWarning tells of it.

    Attributes:
        cached_tokens: leading tokens whose KV was found.
        pages: int32, the page of each `page_size` tokens in order. A commit may replace entries, where another
            request had shared the same tokens before: read it anew after each commit.
    """

    def __init__(
        self,
        cache: PrefixCache,
        committed: bytes,
        pages: NDArray[np.int32],
        node: TreeNode,
        namespace: tuple[str | None, str | None],
    ) -> None:
        self.cached_tokens = len(committed) // TOKEN_BYTES
        self.pages = pages
        self._cache = cache
        self._committed = committed  # the tokens that `node`'s path spells
        self._node = node
        self._namespace = namespace
        self._closed = False

    @property
    def node(self) -> TreeNode:
        """Where the pinned prefix ends in the tree."""
        return self._node

    @property
    def closed(self) -> bool:
        """Whether the lease was released."""
        return self._closed

    @property
    def committed_tokens(self) -> int:
        """Leading tokens that are in the tree, and pinned there by this lease."""
        return len(self._committed) // TOKEN_BYTES

    @property
    def capacity_tokens(self) -> int:
        """Tokens for which the lease holds pages."""
        return len(self.pages) * self._cache.page_size

    def grow(self, num_tokens: int) -> None:
        """Hold pages for at least `num_tokens` tokens in all, evicting what is unused if need be.

        Raises: OutOfPagesError if they do not suffice (the lease is as before); ClosedError.
        """
        self._check_open()
        missing = self._cache.pages_for(num_tokens) - len(self.pages)
        if missing > 0:
            self.pages = np.concatenate([self.pages, self._cache._take(missing)])

    def commit(self, ids: TokenIds) -> int:
        """Share the KV of `ids`, all of which lies in `pages` by now. O(tokens + depth).

        Whole pages enter the tree; a last page in part stays this lease's alone. Where another request committed the
        same tokens first, its pages replace this lease's in `pages`.

        Returns: how many tokens of `ids` are shared now.
        Raises: InvalidRequestError if `ids` does not begin with the tokens this lease has pinned, or is longer than
            its pages; ClosedError; TokenIdsTypeError, InvalidTokenIdsError.
        """
        self._check_open()
        tokens = token_array(ids)
        cache, extra_key, cache_salt = self._cache, *self._namespace
        if len(tokens) > self.capacity_tokens:
            raise InvalidRequestError(
                f"{len(tokens)} tokens cannot be committed: the lease has pages for {self.capacity_tokens}; grow it"
            )
        whole = tokens[: len(tokens) // cache.page_size * cache.page_size]
        data = whole.tobytes()
        if not data.startswith(self._committed):
            raise InvalidRequestError(
                f"the ids to commit must begin with the {self.committed_tokens} tokens that the lease has pinned"
            )
        num_pages = len(whole) // cache.page_size
        inserted = cache.tree.insert(whole, self.pages[:num_pages], extra_key=extra_key, cache_salt=cache_salt)
        cache.tree.inc_lock_ref(inserted.node)
        cache.tree.dec_lock_ref(self._node)
        self._node = inserted.node
        first_new = inserted.prefix_len // cache.page_size
        cache.allocator.retain(self.pages[first_new:num_pages])  # the tree's own reference
        self._adopt(self.committed_tokens // cache.page_size, first_new)
        self._committed = data
        return len(whole)

    def release(self) -> None:
        """Unpin the prefix and give up the pages; what was not committed becomes free. Idempotent. O(pages + depth)."""
        if self._closed:
            return
        self._closed = True
        self._cache._leases.discard(self)
        self._cache.tree.dec_lock_ref(self._node)
        self._cache.allocator.release(self.pages)
        self.pages = np.empty(0, np.int32)

    def _adopt(self, first: int, last: int) -> None:
        """Read pages `[first, last)` from the tree, where another request's came first, and free this lease's own."""
        if first >= last:
            return
        theirs = self._cache.tree.path_pages(self._node)[first:last]
        self._cache.allocator.retain(theirs)
        self._cache.allocator.release(self.pages[first:last])
        self.pages = np.concatenate([self.pages[:first], theirs, self.pages[last:]])

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the lease was released; acquire a new one")

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self._cache._dropped.append((self._node, self.pages))
            warnings.warn(f"{self!r} was dropped without release()", ResourceWarning, stacklevel=2, source=self)

    def __repr__(self) -> str:
        if self._closed:
            return "Lease(closed)"
        return f"Lease({self.cached_tokens} tokens found, {self.committed_tokens} shared, {len(self.pages)} pages)"
