"""What is cached, asked without taking or changing anything."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.cache_stats import CacheStats, SizeEstimate
from radixkv.cache.events import PageRun, run_of
from radixkv.cache.eviction.policy import EvictionPolicy
from radixkv.cache.held_prefix import HeldPrefix, held_prefix
from radixkv.cache.insight.diagnostics import LARGEST_SIZE, Diagnostics
from radixkv.cache.insight.eviction_ages import EvictionAges
from radixkv.cache.insight.explanation import Explanation
from radixkv.cache.insight.history import Timeline
from radixkv.cache.insight.tree_view import TreeView, TreeViewer
from radixkv.cache.namespace import Namespace
from radixkv.cache.page_owner import CopyPage, PageOwner
from radixkv.cache.quotas.accounts import QuotaKey
from radixkv.cache.residency.residency import HeldTokens, KeptState, Residency
from radixkv.cache.token_ids import TokenIds, token_array
from radixkv.cache.tree.node import TreeNode
from radixkv.cache.tree.page_ids import PageBytes
from radixkv.cache.watch import PrefixWatch
from radixkv.config import CacheQuota
from radixkv.errors import ConfigError

ESTIMATED_FACTORS = (0.5, 1.0, 2.0, float(LARGEST_SIZE))


class ReadableCache(PageOwner):
    """A page owner that tells what is cached, why not more is, and what it did so far.

    No question here is a use of what it asks about: the tree, its order of eviction and all counts stay as they are.
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
        super().__init__(
            num_pages, page_size, policy, copy_page=copy_page, residency=residency, clock=clock, quotas=quotas
        )
        self._diagnostics = None
        if diagnostics:
            self._diagnostics = Diagnostics(self.tree, self.num_pages, whole_pages=copy_page is None)
        self._query_tokens = self._hit_tokens = self._copied_tokens = 0

    def peek(self, ids: TokenIds, *, extra_key: str | None = None, cache_salt: str | None = None) -> int:
        """How many leading tokens of `ids` are cached. Changes nothing. O(tokens + depth).

        Raises: InvalidRequestError if a key is neither text nor None; TokenIdsTypeError, InvalidTokenIdsError.

        >>> from radixkv import PrefixCache
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

    @property
    def sight_tokens(self) -> int:
        """How many tokens before the end of a hit have to have something besides their page: see `kept_beside`."""
        return self.residency.sight_tokens

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

    def held(self, ids: TokenIds, *, extra_key: str | None = None, cache_salt: str | None = None) -> HeldPrefix:
        """How many leading tokens of `ids` are cached now, in which pages. Changes nothing. O(tokens + depth).

        Raises: InvalidRequestError if a key is neither text nor None; TokenIdsTypeError, InvalidTokenIdsError.
        """
        return held_prefix(self.tree, token_array(ids), Namespace.of(extra_key, cache_salt))

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

    def __repr__(self) -> str:
        stats = self.stats()
        return (
            f"PrefixCache({stats.num_pages} pages of {stats.page_size}: {stats.free_pages} free, "
            f"{stats.total_tokens} tokens cached, {stats.num_leases} leases)"
        )
