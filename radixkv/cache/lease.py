"""One request's claim on the cache."""

from __future__ import annotations

import warnings
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.namespace import Namespace
from radixkv.cache.residency.residency import HeldTokens
from radixkv.cache.token_ids import TOKEN_BYTES, TokenIds, token_array
from radixkv.cache.tree.node import MatchResult, PartialPage, TreeNode
from radixkv.cache.tree.page_ids import PageBytes
from radixkv.errors import ClosedError, InvalidRequestError

if TYPE_CHECKING:
    from radixkv.cache.prefix_cache import PrefixCache
    from radixkv.cache.residency.residency import Claim


class Lease:
    """One request's claim on the cache: the pinned prefix it reads and the pages it may write.

    The KV of `[0, cached_tokens)` was there when the lease was made; the request computes the rest into `pages` and
    calls `commit`. Use it as a context manager, or call `release`. What a lease that is dropped without either held
    is taken back with the cache's next operation, and a ResourceWarning tells of it.

    Attributes:
        cached_tokens: leading tokens whose KV was found.
    """

    def __init__(
        self,
        cache: PrefixCache,
        num_tokens: int,
        known: bytes,
        row: NDArray[np.int32],
        num_pages: int,
        node: TreeNode,
        namespace: Namespace,
        *,
        owns_row: bool,
        claim: Claim,
        source: PartialPage | None,
        priority: int,
        keep_for_s: float | None,
    ) -> None:
        self.cached_tokens = len(known) // TOKEN_BYTES
        self._row, self._num_pages = row, num_pages  # what lies after the first `num_pages` means nothing
        self._cache = cache
        self._announced_tokens = num_tokens  # of those it asked for, or committed since
        self._known = known  # tokens whose KV is in `pages` for certain
        self._node = node
        self._namespace = namespace
        self._source = source  # where the last of them were copied from
        self._priority, self._keep_for_s = priority, keep_for_s
        self._closed = False
        self._owns_row = owns_row
        self._claim = claim

    @property
    def pages(self) -> NDArray[np.int32]:
        """The page of each `page_size` tokens in order, int32; a view of the row that `acquire` was given, if any.

        A commit may replace entries, where another request had shared the same tokens before.
        """
        return self._row[: self._num_pages]

    @property
    def node(self) -> TreeNode:
        """Where the pinned prefix ends in the tree."""
        return self._node

    @property
    def found_node(self) -> TreeNode:
        """Where what it found ends, when it was just made: the node that it copied tokens from, or else `node`."""
        return self._node if self._source is None else self._source.node

    def whole_path(self) -> list[TreeNode]:
        """The nodes of the pinned prefix that hold whole pages, root side first; `pages` begins with theirs."""
        path = self._node.path()
        if path and path[-1].is_tail(self._cache.page_size):
            path.pop()
        return path

    @property
    def namespace(self) -> Namespace:
        """Where it shares."""
        return self._namespace

    @property
    def closed(self) -> bool:
        """Whether the lease was released."""
        return self._closed

    @property
    def committed_tokens(self) -> int:
        """Leading tokens that are in the tree, and pinned there by this lease."""
        return self._node.end

    @property
    def capacity_tokens(self) -> int:
        """Tokens for which the lease holds pages."""
        return self._num_pages * self._cache.page_size

    def grow(self, num_tokens: int) -> None:
        """Hold pages for at least `num_tokens` tokens in all, evicting what is unused if need be.

        Raises: OutOfPagesError if they do not suffice, InvalidRequestError if the row is too short for them (the lease
            is as before); ClosedError.

        >>> from radixkv import PrefixCache
        >>> with PrefixCache(num_pages=4, page_size=2).acquire([1, 2, 3]) as lease:
        ...     before = lease.capacity_tokens
        ...     lease.grow(5)                                       # two tokens of output
        ...     before, lease.capacity_tokens
        (4, 6)
        """
        self._check_open()
        needed = self._cache.pages_for(num_tokens)
        if needed > self._num_pages:
            row = self._row
            if needed > len(row):
                row = self._longer_row(needed)
            row[self._num_pages : needed] = self._cache._take(needed - self._num_pages, self._namespace)
            self._row, self._num_pages = row, needed

    def shrink(self, num_tokens: int) -> None:
        """Give back the pages behind the first `num_tokens` tokens, which hold nothing that is still wanted.

        What is committed stays. O(pages given back). Raises: ClosedError.

        >>> from radixkv import PrefixCache
        >>> with PrefixCache(num_pages=4, page_size=2).acquire([1, 2, 3]) as lease:
        ...     lease.grow(8)
        ...     before = lease.capacity_tokens
        ...     lease.shrink(5)
        ...     before, lease.capacity_tokens
        (8, 6)
        """
        self._check_open()
        kept = self._cache.pages_for(max(num_tokens, self.committed_tokens))
        if kept < self._num_pages:
            self._claim.uncover(self.pages, kept)
            dropped = self.pages[kept:].copy()
            self._num_pages = kept
            self._cache.give_back(dropped)

    @property
    def seen_pages(self) -> NDArray[np.int32]:
        """The pages that the next token sees in layers of a window, as far as `cover` went."""
        return self._claim.seen_pages(self.pages)

    def coverable_tokens(self) -> int:
        """Up to which token `cover` could, or should, go now, if nothing is given up before. O(1).

        With recurrent states it stops where hits are expected to end, so that a state is kept there.
        """
        return self._claim.coverable_tokens(self.capacity_tokens)

    @property
    def claim(self) -> Claim:
        """Its share of what pages need besides."""
        return self._claim

    def checkpoint_at(self, num_tokens: int) -> None:
        """Expect hits to end after so many tokens. Of use where layers keep states: see `coverable_tokens`. O(1)."""
        self._check_open()
        self._claim.checkpoint_at(num_tokens)

    def advance(self, num_tokens: int) -> None:
        """Note that the first `num_tokens` tokens, to which `cover` went, are computed. O(1). Raises: ClosedError."""
        self._check_open()
        self._claim.advance(num_tokens)

    def state_slots(self) -> tuple[int, ...]:
        """The slots of recurrent states that the next step reads and writes; () in a cache without such states. O(1).

        At the start of a sequence nothing is read, and both are the same.
        """
        return self._claim.state_slots()

    def cover(self, first: int, last: int) -> None:
        """Get ready to compute the tokens `[first, last)`, for which the lease has pages, in layers of a window.

        What no token from `first` on sees is given up there, so `first` must not fall back behind it. Nothing to do for
        a cache without windows. O(pages that come or go).

        Raises: OutOfPagesError if the window pages do not suffice (what was given up stays so); InvalidRequestError if
            the tokens see what was given up, or the lease has no pages for them; ClosedError.
        """
        self._check_open()
        self._claim.cover(self.pages, first, last)

    def prepare_load(self, first: int, last: int) -> None:
        """Get ready for the KV of the tokens `[first, last)` to be loaded rather than computed. O(pages lent).

        In layers of a window this is for the pages alone that the token after them sees. `cover` from `last` on if they
        came, and else from `first` on.

        Raises: OutOfPagesError if window pages or states do not suffice, and nothing has changed; ClosedError.
        """
        self._check_open()
        self._claim.prepare_load(self.pages, first, last)

    def commit(self, ids: TokenIds) -> int:
        """Share the KV of `ids`, all of which lies in `pages` by now. O(tokens + depth).

        Whole pages enter the tree. A last page in part does too where the cache shares partial pages, and the lease
        may go on writing behind these tokens; otherwise it stays this lease's alone. Where another request committed
        the same tokens first, its whole pages replace this lease's in `pages`.

        Returns: how many tokens of `ids` are shared now.
        Raises: InvalidRequestError if `ids` does not begin with the tokens that were found or committed before, or is
            longer than the lease's pages; ClosedError; TokenIdsTypeError, InvalidTokenIdsError; PolicyError: nothing or
            only the whole pages may be shared then, and the lease can be used as before.

        >>> from radixkv import PrefixCache
        >>> cache = PrefixCache(num_pages=4, page_size=2)
        >>> with cache.acquire([1, 2, 3]) as lease:
        ...     lease.commit([1, 2, 3])                             # the third token's page is not full
        2
        >>> cache.peek([1, 2, 3])
        2
        """
        self._check_open()
        tokens = token_array(ids)
        cache = self._cache
        if len(tokens) > self.capacity_tokens:
            raise InvalidRequestError(
                f"{len(tokens)} tokens cannot be committed: the lease has pages for {self.capacity_tokens}; grow it"
            )
        num_pages = len(tokens) // cache.page_size
        whole_tokens = num_pages * cache.page_size
        known_tokens = len(self._known) // TOKEN_BYTES
        if tokens[:known_tokens].tobytes() != self._known:
            raise InvalidRequestError(
                f"the ids to commit must begin with the {known_tokens} tokens that were found or committed before"
            )
        shared_pages = self.committed_tokens // cache.page_size
        inserted = cache.tree.insert_tokens(tokens[:whole_tokens], self.pages[:num_pages], self._namespace)
        first_new = inserted.prefix_len // cache.page_size
        cache.allocator.retain(self.pages[first_new:num_pages])  # the tree's own reference
        before = self._move_pin(inserted.node)
        self._adopt(shared_pages, first_new)
        self._known = tokens[:whole_tokens].tobytes()
        self._unpin(before)  # from here on a policy may fail: what was done so far stands
        rest = tokens[whole_tokens:]
        is_shared = cache.shares_partial_pages or not len(rest)
        page_runs: list[PageBytes] = [self.pages[:num_pages].data]
        if is_shared and len(rest):
            page_runs.append(np.array([self._share_tail(rest, int(self.pages[num_pages]))], np.int32).data)
            self._known = tokens.tobytes()
        self._claim.share(
            HeldTokens(self._namespace, tokens if is_shared else tokens[:whole_tokens], page_runs), shared_pages
        )
        self._drop_source(len(tokens))
        if self._priority or self._keep_for_s is not None:
            cache.tree.retain(self._node, priority=self._priority, keep_for_s=self._keep_for_s)
        if before.is_tail(cache.page_size):
            self._ask_as_for(before, tokens)
        if len(tokens) > self._announced_tokens:
            self._announced_tokens = len(tokens)
            cache.committed(tokens, self._namespace)
        return len(tokens) if is_shared else whole_tokens

    def recall_hits(self, hits: int) -> None:
        """Let what it pins count as found by so many requests at least, as it was before this process. O(depth)."""
        self._check_open()
        self._cache.tree.recall_hits(self._node, hits)

    def release(self) -> None:
        """Unpin the prefix and give up the pages; what was not committed becomes free. Idempotent. O(pages + depth).

        >>> from radixkv import PrefixCache
        >>> cache = PrefixCache(num_pages=4, page_size=2)
        >>> lease = cache.acquire([1, 2, 3])
        >>> before = cache.stats().free_pages
        >>> lease.release()
        >>> before, cache.stats().free_pages
        (2, 4)
        """
        if self._closed:
            return
        self._closed = True
        self._cache._leases.discard(self)
        self._claim.release(self.pages)
        try:
            self._cache.tree.dec_lock_ref(self._node)
        finally:  # a policy of the caller's own may fail there
            self._cache.give_back(self.pages)
            self._num_pages = 0

    def _move_pin(self, node: TreeNode) -> TreeNode:
        """Pin `node` as the end of the prefix. Returns: what was pinned before, which is to be unpinned."""
        self._cache.tree.inc_lock_ref(node)
        before, self._node = self._node, node
        return before

    def _unpin(self, before: TreeNode) -> None:
        """Unpin what was pinned before; a tail that this lease had put there goes, its tokens live on."""
        try:
            self._cache.tree.dec_lock_ref(before)
        finally:
            if before.is_tail(self._cache.page_size):
                self._cache.remove(before)

    def _share_tail(self, rest: NDArray[np.int32], page: int) -> int:
        """Let others copy the tokens of a last page in part; nothing to do if they can from somebody else's page.

        Returns: the page that they copy from.
        """
        tree = self._cache.tree
        while (found := tree.find_partial(self._node, rest)) is not None and found.num_tokens == len(rest):
            if not self._is_worn_out(found):
                return found.page
            self._cache.remove(found.node)
        tail = tree.insert_tail(self._node, rest, page)
        self._cache.allocator.retain(np.array([page], np.int32))
        tree.dec_lock_ref(self._move_pin(tail))
        return page

    def _is_worn_out(self, found: PartialPage) -> bool:
        """Whether it is a tail that has lost its window page, so that nobody can copy it, and that nobody pins."""
        node = found.node
        if node.entry is None or node.num_tokens != found.num_tokens:
            return False
        return node.is_tail(self._cache.page_size) and not self._cache.residency.holds(found.page)

    def _drop_source(self, num_tokens: int) -> None:
        """Forget the tail that was copied from, once a longer copy of it is shared."""
        source, self._source = self._source, None
        if source is None or not source.node.is_tail(self._cache.page_size) or source.node.entry is None:
            return
        if source.num_tokens == source.node.num_tokens and num_tokens > source.node.end:
            tree, tail = self._cache.tree, source.node
            if tail.priority or tail.keep_until:  # its tokens live on, and so does what was asked for them
                tree.keep_until(self._node, max(tail.keep_until, tree.clock()), priority=tail.priority)
            self._cache.remove(tail)

    def _ask_as_for(self, tail: TreeNode, tokens: NDArray[np.int32]) -> None:
        """Keep what has the tokens of a tail of this lease, which is no more, as was asked for the tail meanwhile.

        Nothing is handed on to a half page of somebody else's that has the same tokens.
        """
        tree, page_size, node = self._cache.tree, self._cache.page_size, self._node
        if tail.priority <= node.priority and tail.keep_until <= max(node.keep_until, tree.clock()):
            return
        page_end = -(-tail.end // page_size) * page_size
        if page_end <= len(tokens):  # the page is full now: cut after it, so that nothing more is kept
            node = tree.leading(MatchResult(node.end, node, []), page_end).node
        elif not node.is_tail(page_size):
            return
        tree.keep_until(node, max(tail.keep_until, tree.clock()), priority=tail.priority)

    def _adopt(self, first: int, last: int) -> None:
        """Read pages `[first, last)` from the tree, where another request's came first, and free this lease's own."""
        if first >= last:
            return
        theirs = self._cache.tree.path_pages(self._node)[first:last]
        self._cache.allocator.retain(theirs)
        self._cache.residency.hand_over(self.pages[first:last], theirs)
        self._cache.give_back(self.pages[first:last])
        self._row[first:last] = theirs

    def _longer_row(self, num_pages: int) -> NDArray[np.int32]:
        """A copy of the row, with room for `num_pages` and a quarter more; rows of others stay as long as they are."""
        if not self._owns_row:
            raise InvalidRequestError(f"the row given to acquire holds {len(self._row)} pages, not {num_pages}")
        row = np.empty(num_pages + num_pages // 4, np.int32)
        row[: self._num_pages] = self.pages
        return row

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
            self._cache._dropped.append((self._node, self._claim, self.pages.copy()))
            warnings.warn(f"{self!r} was dropped without release()", ResourceWarning, stacklevel=2, source=self)

    def __repr__(self) -> str:
        if self._closed:
            return "Lease(closed)"
        return f"Lease({self.cached_tokens} tokens found, {self.committed_tokens} shared, {self._num_pages} pages)"
