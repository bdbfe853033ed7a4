"""The prefix cache: finds what is cached of a request, and hands out leases on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.keeping import checked_keep_for_s, checked_priority
from radixkv.cache.lease import Lease
from radixkv.cache.namespace import Namespace
from radixkv.cache.readable_cache import ReadableCache
from radixkv.cache.residency.residency import HeldTokens
from radixkv.cache.token_ids import TokenIds, token_array
from radixkv.cache.tree.node import MatchResult, PartialPage, TreeNode
from radixkv.errors import InvalidRequestError


class PrefixCache(ReadableCache):
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
            self._diagnostics.requested(tokens, namespace, lease.cached_tokens)
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
        while True:
            lease = self._take_lease(tokens, wanted, namespace, own_row, priority, keep_for_s, owns_row=row is None)
            if lease is not None:
                return lease

    def _take_lease(
        self,
        tokens: NDArray[np.int32],
        wanted: NDArray[np.int32],
        namespace: Namespace,
        own_row: NDArray[np.int32],
        priority: int,
        keep_for_s: float | None,
        *,
        owns_row: bool,
    ) -> Lease | None:
        """A lease of `tokens` on what is found of `wanted`, their first ones.

        None, with nothing taken, if what the hit needs besides its pages was evicted for the others: less is found now.
        """
        num_pages = self.pages_for(len(tokens))
        match, partial, held_tokens = self._find(wanted, namespace, num_pages)
        found_pages = match.pages
        num_found = len(found_pages)
        undo: list[tuple[Callable[[Any], object], Any]] = [(self.tree.dec_lock_ref, match.node)]
        try:
            if partial is not None:  # stays until it is copied
                self.tree.touch(partial.node)
                self.tree.inc_lock_ref(partial.node)
                undo.append((self.tree.dec_lock_ref, partial.node))
            own_pages = self._take(num_pages - num_found, namespace)
            undo.append((self.give_back, own_pages))
            pages = own_row[:num_pages]
            pages[:num_found], pages[num_found:] = found_pages, own_pages
            cached_tokens = match.length + (0 if partial is None else partial.num_tokens)
            source = None if partial is None else partial.page
            found = HeldTokens(namespace, tokens[:cached_tokens], match.page_runs)
            if self._usable(match, partial, found.tokens, namespace) < cached_tokens:
                _roll_back(undo)
                return None
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
            owns_row=owns_row,
            claim=claim,
            source=partial,
            priority=priority,
            keep_for_s=keep_for_s,
        )
        self._leases.add(lease)
        return lease

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

    def committed(self, tokens: NDArray[np.int32], namespace: Namespace) -> None:
        """Note that more is cached now than a request asked for. Leases call it."""
        if self._diagnostics is not None:
            self._diagnostics.committed(tokens, namespace)

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


def _roll_back(undo: Sequence[tuple[Callable[[Any], object], Any]]) -> None:
    """Call each function with its argument, the last one first, and the rest even if one fails.

    A stack that is made when it is needed: filling one in each `acquire` would slow it down.
    """
    with ExitStack() as stack:
        for call, argument in undo:
            stack.callback(call, argument)
