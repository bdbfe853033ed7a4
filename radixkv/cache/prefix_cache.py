"""The prefix cache: the only place that knows who owns a page."""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.allocator import TokenToKVPoolAllocator
from radixkv.cache.cache_stats import CacheStats, SizeEstimate
from radixkv.cache.checks import check_cache
from radixkv.cache.events import Observer, PageRun, run_of
from radixkv.cache.eviction.policies import resolve_policy
from radixkv.cache.eviction.policy import EvictionPolicy
from radixkv.cache.held_prefix import HeldPrefix, held_prefix
from radixkv.cache.insight.diagnostics import LARGEST_SIZE, Diagnostics
from radixkv.cache.insight.eviction_ages import EvictionAges
from radixkv.cache.insight.explanation import Explanation
from radixkv.cache.insight.history import Timeline
from radixkv.cache.insight.tree_view import TreeView, TreeViewer
from radixkv.cache.keeping import checked_keep_for_s, checked_priority
from radixkv.cache.lease import Lease
from radixkv.cache.namespace import SHARED, Namespace
from radixkv.cache.quotas.accounts import QuotaKey, checked_quotas
from radixkv.cache.quotas.shares import Shares
from radixkv.cache.residency.residency import Claim, Everywhere, HeldTokens, KeptState, Residency
from radixkv.cache.token_ids import TokenIds, token_array
from radixkv.cache.tree.node import MatchResult, PartialPage, TreeNode
from radixkv.cache.tree.page_ids import PageBytes
from radixkv.cache.tree.radix_tree import RadixTree
from radixkv.cache.watch import PrefixWatch
from radixkv.config import CacheConfig, CacheQuota
from radixkv.errors import ConfigError, InvalidRequestError, OutOfPagesError, PolicyError

ESTIMATED_FACTORS = (0.5, 1.0, 2.0, float(LARGEST_SIZE))

CopyPage: TypeAlias = Callable[[int, int, int], object]
"""copy_page(source, target, num_tokens): copy the KV of the first `num_tokens` slots of page `source` to `target`."""


class PrefixCache:
    """A radix tree over a pool of pages: hands out leases, evicts when it must, and never loses a page.

    It manages page numbers; whoever holds the KV bytes indexes them by these numbers. The tree holds one reference
    on each page in it; each lease holds one on each page it reads or writes.

    With `copy_page` reuse is exact to the token at every page size. A prefix that ends inside a page is not rounded
    down: `acquire` has the slots before the first difference copied into the lease's own page (copy-on-write), and
    what is committed of a last page in part can be found again. Without it, whole pages are shared, and
    `cached_tokens` is a multiple of `page_size`.

    With a `residency` a page is of use only while it has something else besides: where some layers see only the last
    tokens, one of a smaller number of window pages (`WindowPages`). A hit then ends where every layer still has what
    the next token sees, and leases `cover` the tokens that they are about to compute.

    Invariants, proved by `check_invariants`: those of `RadixTree` and `TokenToKVPoolAllocator`, and

    - free pages + pages in the tree + pages held by leases only = `num_pages`;
    - the count of a page is 1 if it is in the tree, plus the number of leases whose `pages` hold it;
    - a node's `lock_ref` is the number of open leases that end in it or below;
    - the pages of an unpinned node have no other reference, so that evicting it frees them;
    - those of the residency; leases pin the pages that their next tokens see.

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

    def __init__(
        self,
        num_pages: int,
        page_size: int = 16,
        policy: str | EvictionPolicy = "lru",
        *,
        copy_page: CopyPage | None = None,
        residency: Residency | None = None,
        clock: Callable[[], float] = time.monotonic,
        diagnostics: bool = True,
        quotas: Mapping[QuotaKey, CacheQuota] | None = None,
    ) -> None:
        """Without `diagnostics` the cache keeps nothing for `explain` and for `stats().estimated_hit_rates`. These cost
        some tens of microseconds a request, about 100 where each one evicts, and the memory that `Diagnostics` states.

        Raises: ConfigError.
        """
        resolved = resolve_policy(policy)
        self.config = CacheConfig(num_pages=num_pages, page_size=page_size, policy=resolved.name)
        num_pages, page_size = self.config.num_pages, self.config.page_size
        self.tree = RadixTree(page_size, resolved, clock=clock)
        self.allocator = TokenToKVPoolAllocator(num_pages)
        self._diagnostics = None
        if diagnostics:
            self._diagnostics = Diagnostics(self.tree, num_pages, whole_pages=copy_page is None)
        self._copy_page = copy_page
        self.residency: Residency = Everywhere() if residency is None else residency
        self.residency.attach(num_pages, page_size, self.allocator.ref_counts)
        self._leases: weakref.WeakSet[Lease] = weakref.WeakSet()
        self._dropped: deque[tuple[TreeNode, Claim, NDArray[np.int32]]] = deque()  # of leases without release()
        self._query_tokens = self._hit_tokens = self._evicted_tokens = self._copied_tokens = 0
        self.shares: Shares | None = None
        """Who is guaranteed how much and holds how much; None without quotas."""
        if quotas:
            self.set_quotas(quotas)

    def set_quotas(self, quotas: Mapping[QuotaKey, CacheQuota]) -> None:
        """Guarantee shares of the pool to namespaces, in place of what was guaranteed before; none if it is empty.

        A namespace is named by its `extra_key`, by `(extra_key, cache_salt)`, or by None if requests name none. The
        quota of an `extra_key` is for all its salts together that have none of their own. Namespaces without a quota
        are guaranteed nothing. See docs/cache.md. O(num_pages + leaves log leaves).

        Raises: ConfigError if quotas are wrong, or guarantee more than the pool has: those before hold then.
            PolicyError if the policy cannot rank a leaf; the new ones hold then.

        >>> from radixkv import CacheQuota
        >>> cache = PrefixCache(num_pages=4, page_size=2, quotas={"a": CacheQuota(pool_tokens=4)})
        >>> for tenant, ids in ("a", [1, 2, 3, 4]), ("b", [1, 2, 3, 4]), ("b", [5, 6, 7, 8]):
        ...     with cache.acquire(ids, extra_key=tenant) as lease:
        ...         _ = lease.commit(ids)
        >>> cache.peek([1, 2, 3, 4], extra_key="a"), cache.peek([1, 2, 3, 4], extra_key="b")
        (4, 0)
        """
        checked = checked_quotas(quotas)
        self._reap()
        if not checked:
            self.shares = None
            self.tree.use_accounts(None)
            return
        self.shares = Shares(checked, self.tree, self.allocator, self.open_leases())
        self.shares.count_evictable()

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
        return self.allocator.num_free + self.tree.num_evictable_pages

    @property
    def used_pages(self) -> int:
        """Pages in the tree or held by leases. O(1)."""
        return self.allocator.num_used

    @property
    def shares_partial_pages(self) -> bool:
        """Whether reuse is exact to the token, thanks to `copy_page`."""
        return self._copy_page is not None

    @property
    def can_go_back(self) -> bool:
        """Whether a request may drop the last tokens that it computed, and compute others in their place."""
        return self.residency.can_go_back

    @property
    def sight_tokens(self) -> int:
        """How many tokens before the end of a hit have to have something besides their page: see `kept_beside`."""
        return self.residency.sight_tokens

    @property
    def residency_changes(self) -> int:
        """A number that grows when pages may lose or gain what the residency gives them. Watches are not told. O(1)."""
        return self.residency.num_changes

    def pages_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens fill, the last one perhaps in part."""
        return -(-num_tokens // self.page_size)

    def peek(self, ids: TokenIds, *, extra_key: str | None = None, cache_salt: str | None = None) -> int:
        """How many leading tokens of `ids` are cached. Changes nothing. O(tokens + depth).

        Raises: InvalidRequestError if a key is neither text nor None; TokenIdsTypeError, InvalidTokenIdsError.

        >>> cache = PrefixCache(num_pages=4, page_size=2)
        >>> with cache.acquire([1, 2, 3]) as lease:
        ...     _ = lease.commit([1, 2, 3])
        >>> cache.peek([1, 2, 3, 4])                                # the third token fills no page
        2
        """
        return self._peek(token_array(ids), Namespace.of(extra_key, cache_salt))

    def _peek(self, ids: NDArray[np.int32], namespace: Namespace) -> int:
        held_tokens, path = self.tree.peek_tokens(ids, namespace)
        return self.usable_tokens(path, ids[:held_tokens], namespace)

    def usable_tokens(self, path: Sequence[TreeNode], held: NDArray[np.int32], namespace: Namespace) -> int:
        """How many of the tokens `held`, which lie along `path`, a request would find. O(1); O(pages) with windows."""
        if not self.shares_partial_pages:
            held = held[: len(held) // self.page_size * self.page_size]
        return self.residency.usable_tokens(HeldTokens(namespace, held, [node.pages for node in path]))

    def kept_states(
        self, held: NDArray[np.int32], page_runs: Sequence[PageBytes], namespace: Namespace, first_token: int
    ) -> list[KeptState]:
        """The states of recurrent layers that are kept after more than `first_token` of the tokens `held`, in order.

        O(pages). Changes nothing; slots are good until the cache is used again.

        Args:
            held: tokens that the tree holds, in the pages of `page_runs`.
        """
        return self.residency.kept_states(HeldTokens(namespace, held, page_runs), first_token)

    def kept_beside(
        self, held: NDArray[np.int32], page_runs: Sequence[PageBytes], namespace: Namespace, first_token: int
    ) -> list[KeptState]:
        """What hits after more than `first_token` of the tokens `held` need besides pages, in order: states, or window
        pages, each as a state after the last of its tokens. Else as `kept_states`.
        """
        return self.residency.kept_beside(HeldTokens(namespace, held, page_runs), first_token)

    def watch(
        self,
        ids: TokenIds,
        *,
        extra_key: str | None = None,
        cache_salt: str | None = None,
        on_change: Callable[[], object] | None = None,
    ) -> PrefixWatch:
        """What `peek` says of `ids`, to be asked again and again. O(tokens + depth) now, O(1) while it stays so.

        The ids are kept, and must not be changed. Close the watch when it is of no use any more.

        Args:
            on_change: called when it may have changed by a page or more, once until the next `refresh`; not for
                changes of the residency. It runs in the middle of the operation that causes the change: it may take a
                note, and must not fail, nor use the cache.

        Raises: as `peek`.
        """
        return PrefixWatch(self, token_array(ids), Namespace.of(extra_key, cache_salt), on_change)

    def acquire(
        self,
        ids: TokenIds,
        *,
        extra_key: str | None = None,
        cache_salt: str | None = None,
        max_cached_tokens: int | None = None,
        priority: int = 0,
        keep_for_s: float | None = None,
        row: NDArray[np.int32] | None = None,
    ) -> Lease:
        """Pin the cached prefix of `ids` and take pages for the rest, evicting what is unused if need be.

        O(tokens + depth), and O(log leaves) for each leaf evicted.

        Args:
            extra_key, cache_salt: the namespace.
            max_cached_tokens: bounds the hit: an engine that needs the logits of the last token computes at least
                that one, and passes `len(ids) - 1`.
            priority: what the "priority" policy orders by; tokens keep the highest they were given.
            keep_for_s: after the lease is released, its tokens are evicted for so many seconds, counted from the last
                commit, only if nothing else can be.
            row: int32, where the lease keeps its `pages`: an engine passes a row of the table that its attention reads.
                Memory of the lease's own if None.

        Raises: OutOfPagesError if the rest does not fit (nothing is taken then); InvalidRequestError for a key that is
            no text, a negative `max_cached_tokens`, a `keep_for_s` outside 0 to ten years, a `priority` that is no
            integer of 64 bits or a `row` that is too short; TokenIdsTypeError, InvalidTokenIdsError.

        >>> cache = PrefixCache(num_pages=4, page_size=2)
        >>> with cache.acquire([1, 2, 3, 4]) as lease:
        ...     _ = lease.commit([1, 2, 3, 4])
        >>> with cache.acquire([1, 2, 3, 4], max_cached_tokens=3) as lease:     # the last token is computed again
        ...     lease.cached_tokens
        2
        >>> with cache.acquire([1, 2, 3, 4], extra_key="another tenant") as lease:
        ...     lease.cached_tokens
        0
        """
        tokens = token_array(ids)
        namespace = Namespace.of(extra_key, cache_salt)
        lease = self._acquire(tokens, namespace, max_cached_tokens, priority, keep_for_s, row)
        self._query_tokens += len(tokens)  # now that pages were had: who is refused asks again
        self._hit_tokens += lease.cached_tokens
        self.tree.count_hit(lease.found_node)
        if self._diagnostics is not None:
            self._diagnostics.requested(tokens, namespace)
        return lease

    def resume(
        self,
        ids: TokenIds,
        *,
        extra_key: str | None = None,
        cache_salt: str | None = None,
        max_cached_tokens: int | None = None,
        priority: int = 0,
        keep_for_s: float | None = None,
        row: NDArray[np.int32] | None = None,
    ) -> Lease:
        """As `acquire`, for a request that was counted when it first acquired, and had to give its pages back since.

        Neither hit rates nor their estimates count it. O(tokens + depth), and O(log leaves) for each leaf evicted.

        Raises: as `acquire`.
        """
        namespace = Namespace.of(extra_key, cache_salt)
        return self._acquire(token_array(ids), namespace, max_cached_tokens, priority, keep_for_s, row)

    def _acquire(
        self,
        tokens: NDArray[np.int32],
        namespace: Namespace,
        max_cached_tokens: int | None,
        priority: int,
        keep_for_s: float | None,
        row: NDArray[np.int32] | None,
    ) -> Lease:
        if max_cached_tokens is not None and max_cached_tokens < 0:
            raise InvalidRequestError(f"max_cached_tokens must be at least 0, not {max_cached_tokens}")
        priority, keep_for_s = checked_priority(priority), checked_keep_for_s(keep_for_s)
        num_pages = self.pages_for(len(tokens))
        own_row = np.empty(num_pages, np.int32) if row is None else row
        if len(own_row) < num_pages:
            raise InvalidRequestError(f"{len(tokens)} tokens need a row of {num_pages} pages, not {len(own_row)}")
        self._reap()
        wanted = tokens if max_cached_tokens is None else tokens[:max_cached_tokens]
        match, partial, held_tokens = self._find(wanted, namespace, num_pages)
        found_pages = match.pages
        num_found = len(found_pages)
        num_own_pages = num_pages - num_found
        undo: list[tuple[Callable[[Any], object], Any]] = [(self.tree.dec_lock_ref, match.node)]
        try:
            if partial is not None:  # stays until it is copied
                self.tree.touch(partial.node)
                self.tree.inc_lock_ref(partial.node)
                undo.append((self.tree.dec_lock_ref, partial.node))
            own_pages = self._take(num_own_pages, namespace)
            undo.append((self.give_back, own_pages))
            pages = own_row[:num_pages]
            pages[:num_found], pages[num_found:] = found_pages, own_pages
            cached_tokens = match.length + (0 if partial is None else partial.num_tokens)
            source = None if partial is None else partial.page
            found = HeldTokens(namespace, tokens[:cached_tokens], match.page_runs)
            claim = self.residency.claim(pages, found, held_tokens, source)
            undo.append((claim.release, pages))
            if partial is not None:
                self._copy(partial, int(own_pages[0]))
                del undo[1]  # complete even if the policy fails in it
                self.tree.dec_lock_ref(partial.node)
        except BaseException:
            _roll_back(undo)
            raise
        self.allocator.retain(found_pages)
        lease = Lease(
            self,
            len(tokens),
            tokens[:cached_tokens].tobytes(),
            own_row,
            num_pages,
            match.node,
            namespace,
            owns_row=row is None,
            claim=claim,
            source=partial,
            priority=priority,
            keep_for_s=keep_for_s,
        )
        self._leases.add(lease)
        return lease

    def reset(self) -> None:
        """Forget every prefix that no lease pins. O(nodes)."""
        self._reap()
        self._give_back_freed(self.tree.clear)

    def add_observer(self, observer: Observer) -> None:
        """Call `observer` with an event for all that is stored, removed or cleared from now on; window pages, too."""
        self.residency.report_to(self.tree.events, self.tree.cached_runs)
        self.tree.add_observer(observer)

    def add_pool_observer(self, observer: Observer) -> None:
        """As `add_observer`, without window pages: events of the medium "pool" alone are promised."""
        self.tree.add_observer(observer)

    def remove_observer(self, observer: Observer) -> None:
        """Call `observer` no more."""
        self.tree.remove_observer(observer)

    def explain(self, ids: TokenIds, *, extra_key: str | None = None, cache_salt: str | None = None) -> Explanation:
        """How far `ids` is cached now, and why not further. Changes nothing.

        Looks at the namespace of `extra_key` and `cache_salt` alone: the answer is the same whatever others hold.
        O(tokens), and up to `page_size` passes over the hashes of the evictions remembered: as many pages as the pool
        has, at most 262,144.

        Raises: ConfigError if the cache was made without diagnostics; InvalidRequestError if a key is neither text nor
            None; TokenIdsTypeError, InvalidTokenIdsError.
        """
        if self._diagnostics is None:
            raise ConfigError("this cache was made with diagnostics=False and remembers nothing to explain misses with")
        self._reap()
        tokens = token_array(ids)
        namespace = Namespace.of(extra_key, cache_salt)
        cached_tokens = self._peek(tokens, namespace)
        held_tokens, _ = self.tree.peek_tokens(tokens, namespace)
        if not self.shares_partial_pages:
            held_tokens = held_tokens // self.page_size * self.page_size
        shortfall = self.residency.shortfall
        return self._diagnostics.explain(tokens, namespace, cached_tokens, held_tokens, shortfall)

    def explain_as_admin(
        self, ids: TokenIds, *, extra_key: str | None = None, cache_salt: str | None = None
    ) -> Explanation:
        """As `explain`, and how many other namespaces hold more of `ids`. O(tokens × namespaces) besides.

        Never pass the answer on to a tenant: by asking again and again, one reads the prompts of others from it.

        Raises: as `explain`.
        """
        explanation = self.explain(ids, extra_key=extra_key, cache_salt=cache_salt)
        assert self._diagnostics is not None, "explain would have raised"
        return self._diagnostics.add_other_namespaces(
            explanation, token_array(ids), Namespace.of(extra_key, cache_salt)
        )

    def committed(self, tokens: NDArray[np.int32], namespace: Namespace) -> None:
        """Note that more is cached now than a request asked for. Leases call it."""
        if self._diagnostics is not None:
            self._diagnostics.committed(tokens, namespace)

    def give_back(self, pages: NDArray[np.int32]) -> None:
        """Take a reference from each of `pages`; those without any are free, in all layers. Leases call it."""
        freed = self.allocator.release(pages)
        self.residency.drop(freed)
        if self.shares is not None:
            self.shares.freed(freed)

    def remove(self, leaf: TreeNode) -> None:
        """Forget an unpinned leaf of the tree. Leases call it. Raises: PolicyError; it is gone then, too."""
        self._give_back_freed(self.tree.remove, leaf)

    def _give_back_freed(self, free: Callable[..., NDArray[np.int32]], *arguments: Any) -> None:
        """Give back the pages that a verb of the tree frees, those too that it freed before it failed."""
        try:
            freed = free(*arguments)
        except PolicyError as error:
            self.give_back(np.asarray(error.freed, np.int32))
            raise
        self.give_back(freed)

    def stats(self) -> CacheStats:
        """What the cache holds now, and what it did so far. O(quotas), with a summation of some thousand numbers."""
        self._reap()
        side_pages, states = self.residency.side_pages(), self.residency.states()
        return CacheStats(
            num_pages=self.num_pages,
            page_size=self.page_size,
            free_pages=self.allocator.num_free,
            leased_pages=self.allocator.num_used - self.tree.num_pages,
            total_tokens=self.tree.total_size,
            evictable_tokens=self.tree.evictable_size,
            protected_tokens=self.tree.protected_size,
            num_leases=len(self._leases),
            query_tokens=self._query_tokens,
            hit_tokens=self._hit_tokens,
            copied_tokens=self._copied_tokens,
            evicted_tokens=self._evicted_tokens,
            window_pages=side_pages.total,
            free_window_pages=side_pages.free,
            evictable_window_pages=side_pages.evictable,
            window_pages_taken_back=side_pages.num_taken_back,
            states=states.total,
            free_states=states.free,
            evictable_states=states.evictable,
            states_taken_back=states.num_taken_back,
            estimated_hit_rates=self.estimate_hit_rates(),
            broken_promise_tokens=self.tree.broken_promise_tokens,
            eviction_ages=EvictionAges() if self._diagnostics is None else self._diagnostics.ages.ages(),
            namespaces=() if self.shares is None else self.shares.uses(),
        )

    def most_tokens(self, namespace: Namespace) -> int:
        """The most tokens that one request can have pages for, while others hold what they are guaranteed.

        O(1). Safe to call from any thread.
        """
        shares = self.shares
        return self.num_pages * self.page_size if shares is None else shares.most_tokens(namespace)

    def available_to(self, namespace: Namespace) -> int:
        """Pages that are free, or that can be evicted for a request of `namespace`. O(1)."""
        return self.available_pages if self.shares is None else self.shares.available_pages(namespace)

    def has_room(
        self,
        num_tokens: int,
        *,
        cached_tokens: int,
        next_tokens: int,
        spare_pages: int,
        namespace: Namespace = SHARED,
    ) -> bool:
        """Whether a request could start, and leave `spare_pages` for others. O(1).

        Args:
            num_tokens: that it needs pages for.
            cached_tokens: how many of them `peek` found.
            next_tokens: how many it would compute in its first step.
        """
        needed = self.pages_for(num_tokens) - cached_tokens // self.page_size
        if needed + spare_pages > self.available_to(namespace):
            return False
        return self.residency.has_room(cached_tokens, next_tokens, spare_pages)

    def nodes(self) -> Iterator[tuple[int, TreeNode]]:
        """Depth and node of all that is cached, parents first; the cache must not be changed meanwhile. O(nodes)."""
        return self.tree.nodes()

    def cached_runs(self) -> Iterator[tuple[TreeNode, PageRun]]:
        """The nodes of all that is cached with their pages as values, parents first. O(nodes)."""
        return ((node, run_of(node, self.page_size)) for _, node in self.nodes() if not node.is_root)

    def cached_runs_of(
        self, ids: TokenIds, *, extra_key: str | None = None, cache_salt: str | None = None
    ) -> list[tuple[TreeNode, PageRun]]:
        """As `cached_runs`, of the nodes that hold the leading tokens of `ids`. O(tokens + depth)."""
        _, path = self.cached_path(ids, extra_key=extra_key, cache_salt=cache_salt)
        return [(node, run_of(node, self.page_size)) for node in path]

    def cached_path(
        self, ids: TokenIds, *, extra_key: str | None = None, cache_salt: str | None = None
    ) -> tuple[int, list[TreeNode]]:
        """How many leading tokens of `ids` the tree holds, usable or not, and the nodes that hold them in order.

        Changes nothing. O(tokens + depth).
        """
        return self.tree.peek_path(ids, extra_key=extra_key, cache_salt=cache_salt)

    @property
    def tick(self) -> int:
        """The cache's clock of uses: a node's `last_access` is the tick of its last one."""
        return self.tree.tick

    @property
    def now_s(self) -> float:
        """The time by the cache's clock, in seconds."""
        return self.tree.clock()

    def timeline(self) -> Timeline:
        """About when each tick was, by the cache's clock; empty without diagnostics. A copy. O(log ticks)."""
        return Timeline() if self._diagnostics is None else self._diagnostics.timeline()

    def view(self, viewer: TreeViewer, nodes_a_part: int) -> Iterator[TreeView | None]:
        """What `viewer` sees of all that is cached, after None for each part before; as `TreeViewer.parts`."""
        return viewer.parts(self.tree, nodes_a_part)

    def open_leases(self) -> list[Lease]:
        """The leases that were not released yet, in no order. O(leases)."""
        return list(self._leases)

    def check_invariants(self) -> None:
        """Prove every invariant of the class docstring. O(num_pages + tokens). Raises: InvariantError."""
        self._reap()
        check_cache(self.tree, self.allocator, self.residency, self.open_leases(), self.shares)

    def estimate_hit_rates(self, factors: Sequence[float] = ESTIMATED_FACTORS) -> tuple[SizeEstimate, ...]:
        """The hit rates that this traffic would have had in pools of `factors` times the size, up to 4.

        Empty without diagnostics. O(4,096) for each factor. Raises: InvalidRequestError for a factor out of that range.
        """
        if self._diagnostics is None:
            return ()
        pool_tokens = self.num_pages * self.page_size
        sizes = {factor: int(factor * pool_tokens) for factor in factors}
        curve = self._diagnostics.curve
        return tuple(SizeEstimate(factor, size, curve.hit_rate(size)) for factor, size in sizes.items())

    def _find(
        self, wanted: NDArray[np.int32], namespace: Namespace, num_pages: int
    ) -> tuple[MatchResult, PartialPage | None, int]:
        """The longest part of `wanted` after which a request with `num_pages` can go on, and pin its whole pages.

        Returns: its whole pages, what can be copied of the page after them, and how many tokens the tree holds, usable
            or not.
        """
        match = self.tree.match_tokens(wanted, namespace)
        partial = self._find_partial(match.node, wanted[match.length :])
        held_tokens = match.length + (0 if partial is None else partial.num_tokens)
        held = wanted[:held_tokens]
        while True:
            usable = self._usable(match, partial, held, namespace)
            if usable < len(held):
                held = held[:usable]
                match = self.tree.leading(match, usable // self.page_size * self.page_size)
                partial = self._find_partial(match.node, held[match.length :])
            self.tree.inc_lock_ref(match.node)
            if partial is None or self._can_copy(partial, num_pages - match.length // self.page_size, namespace):
                return match, partial, held_tokens
            partial, held = None, held[: match.length]
            if self._usable(match, partial, held, namespace) == len(held):
                return match, None, held_tokens
            self.tree.dec_lock_ref(match.node)

    def _usable(
        self, match: MatchResult, partial: PartialPage | None, held: NDArray[np.int32], namespace: Namespace
    ) -> int:
        """How many of the tokens `held`, which were found there, may be hit."""
        runs = match.page_runs
        if partial is not None:
            runs = [*runs, np.array([partial.page], np.int32).data]
        return self.residency.usable_tokens(HeldTokens(namespace, held, runs))

    def _find_partial(self, node: TreeNode, rest: NDArray[np.int32]) -> PartialPage | None:
        """What could be copied of the page after `node`."""
        return self.tree.find_partial(node, rest) if self._copy_page is not None and len(rest) else None

    def _can_copy(self, partial: PartialPage, num_pages: int, namespace: Namespace) -> bool:
        """Whether `num_pages` can be had while the source of a copy, which is not pinned yet, stays."""
        held = len(partial.node.page_ids) if partial.node.lock_ref == 0 else 0
        return num_pages <= self.available_to(namespace) - held

    def _copy(self, partial: PartialPage, target: int) -> None:
        assert self._copy_page is not None, "nothing to copy with"
        self._copy_page(partial.page, target, partial.num_tokens)
        self._copied_tokens += partial.num_tokens

    def _reap(self) -> None:
        """Release what dropped leases held. Not in their `__del__`: that may run in the middle of any operation."""
        while self._dropped:
            node, claim, pages = self._dropped.popleft()
            claim.release(pages)
            try:
                self.tree.dec_lock_ref(node)
            finally:
                self.give_back(pages)

    def _take(self, num_pages: int, namespace: Namespace) -> NDArray[np.int32]:
        self._reap()
        missing = num_pages - self.allocator.num_free
        if missing > 0:
            before = self.allocator.num_free
            evictable = self.available_to(namespace) - before
            if missing > evictable:
                raise OutOfPagesError(needed=num_pages, free=before, evictable=evictable, total=self.num_pages)
            try:
                if self.shares is None:
                    self._give_back_freed(self.tree.evict, missing * self.page_size)
                else:
                    self._evict_for(self.shares, namespace, num_pages)
            finally:
                self._evicted_tokens += (self.allocator.num_free - before) * self.page_size
        pages = self.allocator.alloc(num_pages)
        if self.shares is not None:
            self.shares.taken(pages, namespace)
        return pages

    def _evict_for(self, shares: Shares, namespace: Namespace, num_pages: int) -> None:
        """Evict leaves until `num_pages` are free, those of namespaces that hold more than their quota first."""
        while (missing := num_pages - self.allocator.num_free) > 0:
            self._give_back_freed(shares.evict, namespace, num_pages, missing)

    def __repr__(self) -> str:
        stats = self.stats()
        return (
            f"PrefixCache({stats.num_pages} pages of {stats.page_size}: {stats.free_pages} free, "
            f"{stats.total_tokens} tokens cached, {stats.num_leases} leases)"
        )

    # -- looking, without taking pages -------------------------------------------------------------------------------

    @contextmanager
    def reading(
        self, ids: TokenIds, *, extra_key: str | None = None, cache_salt: str | None = None
    ) -> Iterator[NDArray[np.int32]]:
        """Pin the cached prefix of `ids`, to the token, while a `with` block reads its pages. O(tokens + depth).

        Takes and copies no page: in the last one only the slots of the prefix are its own. It is a use of the prefix,
        and counts as no request. Layers of a window may have let go of what lies before it.

        Raises: InvalidRequestError if a key is neither text nor None; TokenIdsTypeError, InvalidTokenIdsError.

        >>> cache = PrefixCache(num_pages=4, page_size=2)
        >>> with cache.acquire([1, 2, 3, 4]) as lease:
        ...     _, pages = lease.commit([1, 2, 3, 4]), lease.pages.tolist()
        >>> with cache.reading([1, 2, 9]) as found:
        ...     found.tolist() == pages[:1]
        True
        """
        self._reap()
        tokens = token_array(ids)
        match = self.tree.match_tokens(tokens, Namespace.of(extra_key, cache_salt))
        partial = self.tree.find_partial(match.node, tokens[match.length :]) if self.shares_partial_pages else None
        pages, node = match.pages, match.node
        if partial is not None:
            pages, node = np.append(pages, np.int32(partial.page)), partial.node
        self.tree.inc_lock_ref(node)
        try:
            yield pages
        finally:
            self.tree.dec_lock_ref(node)

    def keep(
        self,
        ids: TokenIds,
        keep_for_s: float,
        *,
        extra_key: str | None = None,
        cache_salt: str | None = None,
    ) -> int:
        """Let what is cached of `ids`, and nothing after it, outlive others, as `keep_for_s` of `acquire` does.

        It is a use of the prefix, and counts as no request. The last page is kept whole, also if `ids` end in it.
        O(tokens + depth).

        Returns: how many leading tokens of `ids` are cached, and kept now.
        Raises: InvalidRequestError for a key that is no text, or a `keep_for_s` outside 0 to ten years;
            TokenIdsTypeError, InvalidTokenIdsError.

        >>> cache = PrefixCache(num_pages=4, page_size=2)
        >>> with cache.acquire([1, 2, 3, 4]) as lease:
        ...     _ = lease.commit([1, 2, 3, 4])
        >>> cache.keep([1, 2, 9], keep_for_s=60)
        2
        """
        tokens, namespace = token_array(ids), Namespace.of(extra_key, cache_salt)
        kept_for_s = checked_keep_for_s(keep_for_s)
        self._reap()
        match = self.tree.match_tokens(tokens, namespace)
        rest = tokens[match.length :]
        partial = self.tree.find_partial(match.node, rest) if self.shares_partial_pages else None
        node = match.node
        if partial is not None:  # cut after its first page, so that nothing after that is kept
            ids_of_page = np.concatenate([tokens[: match.length], partial.node.token_ids[: self.page_size]])
            node = partial.node
            if node.num_tokens > self.page_size:
                node = self.tree.match_tokens(ids_of_page, namespace).node
        if node.parent is not None:
            self.tree.retain(node, keep_for_s=kept_for_s)
        return match.length + (0 if partial is None else partial.num_tokens)

    def held(self, ids: TokenIds, *, extra_key: str | None = None, cache_salt: str | None = None) -> HeldPrefix:
        """How many leading tokens of `ids` are cached now, in which pages. Changes nothing. O(tokens + depth).

        Raises: InvalidRequestError if a key is neither text nor None; TokenIdsTypeError, InvalidTokenIdsError.
        """
        return held_prefix(self.tree, token_array(ids), Namespace.of(extra_key, cache_salt))


def _roll_back(undo: Sequence[tuple[Callable[[Any], object], Any]]) -> None:
    """Call each function with its argument, the last one first, and the rest even if one fails.

    A stack that is made when it is needed: filling one in each `acquire` would slow it down.
    """
    with ExitStack() as stack:
        for call, argument in undo:
            stack.callback(call, argument)
