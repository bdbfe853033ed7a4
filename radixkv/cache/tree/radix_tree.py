"""The radix tree: which token prefixes are cached, and in which pages."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.keeping import checked_keep_for_s, checked_priority
from radixkv.cache.namespace import SHARED, Namespace
from radixkv.cache.token_ids import TOKEN_BYTES, TokenIds, check_tokens, common_tokens, int32_array, token_array
from radixkv.cache.tree.evicting import EvictingTree
from radixkv.cache.tree.first_pages import common_prefix_tokens, likest_children
from radixkv.cache.tree.node import InsertResult, MatchResult, PartialPage, TreeNode, new_root
from radixkv.cache.tree.page_ids import PageBytes, page_array, page_bytes
from radixkv.errors import InvalidPagesError, InvalidRequestError, PolicyError

SHORTEN_PATHS_LONGER_THAN = 16  # nodes; on such a path, forks that have one child left are merged …
SHORTEN_EVERY_TICKS = 16  # … though not in each match: looking for them costs a pass over the path

Tokens: TypeAlias = "NDArray[np.int32]"
_new_tuple = tuple.__new__  # calling a NamedTuple costs 0.3 µs; this leaves out its wrapper in Python


class RadixTree(EvictingTree):
    """Maps token prefixes to KV pages, shares common prefixes and evicts unused ones.

    The unit is the page: a sequence is kept up to its last whole page of `page_size` tokens, and two sequences share
    whole pages. What follows the last whole page can be kept too, as a *tail*: a leaf of less than one page, which
    `match_prefix` never finds and `find_partial` does. Each namespace (`extra_key`, `cache_salt`) has its own root.

    A match that ends midway in an edge cuts it, so that exactly the prefix can be pinned. The cut is merged back when
    the pin is gone, or with the next match or insert if it was not pinned, unless the tree has branched there. Where
    the other branches were evicted since, matches along a deep path merge what is left.

    Invariants, proved by `check_invariants`:

    - every root-to-node path spells the tokens whose KV lies in its nodes' pages, in order;
    - siblings differ in their first page of tokens; every node but a root holds whole pages and at least one, or is a
      tail: a leaf of one page and fewer tokens;
    - `lock_ref(parent) >= sum(lock_ref(children))`, and `last_access` never grows from parent to child;
    - `evictable_size + protected_size == total_size`, counted over unpinned and pinned nodes;
    - the eviction queue holds exactly the unpinned leaves;
    - a root is kept only while something is cached under it;
    - no page is in two nodes.

    Not thread-safe.

    >>> tree = RadixTree(page_size=2)
    >>> tree.insert([1, 2, 3, 4, 5], [7, 8]).prefix_len         # the fifth token fills no page
    0
    >>> found = tree.match_prefix([1, 2, 3, 9])
    >>> found.length, found.pages.tolist()
    (2, [7])
    >>> tree.evict(1).tolist()                                  # the leaf [3, 4] goes first
    [8]

    Attributes:
        page_size: tokens a page.
        policy: the `EvictionPolicy`.
        clock: seconds, for `keep_for_s` and policies that look at the time.
        broken_promise_tokens: room in the pages that were evicted before their `keep_for_s` was over.
        events: the channel that tells observers what is stored and removed.
    """

    # -- reading -----------------------------------------------------------------------------------------------------

    def match_prefix(
        self, ids: TokenIds, *, extra_key: str | None = None, cache_salt: str | None = None
    ) -> MatchResult:
        """The longest cached prefix of `ids`, in whole pages. O(tokens + depth).

        Counts as a use of the edges it came to, the last one included, and cuts the last one where the match ends, so
        that exactly the prefix can be pinned. `peek` changes nothing.

        Raises: TokenIdsTypeError, InvalidTokenIdsError, InvalidRequestError for a key that is not text (the tree is as
            before then).

        >>> tree = RadixTree(page_size=2)
        >>> _ = tree.insert([1, 2, 3, 4, 5, 6], pages=[7, 8, 9])
        >>> found = tree.match_prefix([1, 2, 3, 4, 5, 0])           # the third page differs in its last token
        >>> found.length, found.pages.tolist()
        (4, [7, 8])
        >>> tree.match_prefix([1, 2], extra_key="another tenant").length
        0
        """
        named = extra_key is not None or cache_salt is not None  # a call less for those that name none
        return self.match_tokens(int32_array(ids), Namespace.of(extra_key, cache_salt) if named else SHARED)

    def match_tokens(self, tokens: Tokens, namespace: Namespace) -> MatchResult:
        """As `match_prefix`, of an int32 array, in a namespace that was checked."""
        if self._unclaimed is not None:
            self._merge_unclaimed()
        runs: list[PageBytes] = []
        node, partial = self._descend(self._roots.get(namespace) or new_root(namespace, 0), tokens, runs)
        length = node.end
        if partial is not None:
            common = self._common_pages(tokens, length, partial)
            length += common
        if length < len(tokens):
            check_tokens(tokens, length)
        self._tick += 1
        if self._on_requested is not None:
            self._on_requested(tokens, length, namespace)
        if self._on_matched is not None:
            for used in reversed((partial or node).path()):
                self._on_matched(used)
        if partial is None:
            self._touch(node)
        else:
            self._touch(partial)
            node = self._cut(partial, common)
            runs.append(node.pages)
        if len(runs) > SHORTEN_PATHS_LONGER_THAN and self._tick % SHORTEN_EVERY_TICKS == 0:
            self._shorten(node.path())
        return _new_tuple(MatchResult, (length, node, runs))

    def leading(self, match: MatchResult, num_tokens: int) -> MatchResult:
        """The first `num_tokens` tokens, whole pages, of a match that was just made. It counts as no further use.

        O(depth).
        """
        if num_tokens == match.length:
            return match
        if self._unclaimed is not None:
            self._merge_unclaimed()
        node = self._standing(match.node)
        while node.parent is not None and node.parent.end >= num_tokens:
            node = node.parent
        if node.parent is not None and node.end > num_tokens:
            node = self._cut(node, num_tokens - node.parent.end)
        return MatchResult(num_tokens, node, [each.pages for each in node.path()])

    def peek(self, ids: TokenIds, *, extra_key: str | None = None, cache_salt: str | None = None) -> int:
        """How many tokens `match_prefix` would find. Changes nothing: no cut, no use. O(tokens + depth).

        >>> tree = RadixTree(page_size=2)
        >>> _ = tree.insert([1, 2, 3, 4], pages=[7, 8])
        >>> tree.peek([1, 2, 3, 9]), tree.tick                      # the insert was the only use
        (2, 1)
        """
        tokens, _ = self.peek_path(ids, extra_key=extra_key, cache_salt=cache_salt)
        return tokens // self.page_size * self.page_size

    def peek_path(
        self, ids: TokenIds, *, extra_key: str | None = None, cache_salt: str | None = None
    ) -> tuple[int, list[TreeNode]]:
        """How many leading tokens of `ids` lie in the tree, to the token, and the nodes that hold them, top first.

        The last node may reach beyond them. Changes nothing. O(tokens + depth), and what `find_partial` costs.

        Raises: TokenIdsTypeError, InvalidTokenIdsError, InvalidRequestError.
        """
        return self.peek_tokens(token_array(ids), Namespace.of(extra_key, cache_salt))

    def peek_tokens(
        self, tokens: Tokens, namespace: Namespace, *, below: TreeNode | None = None
    ) -> tuple[int, list[TreeNode]]:
        """As `peek_path`, of what `token_array` returned, in a namespace that was checked.

        Tokens down to the end of `below`, a node of the tree, are taken to be those of its path, and are not compared.
        """
        start = below or self._roots.get(namespace)
        if start is None:
            return 0, []
        node, partial = self._descend(start, tokens, [])
        length = node.end
        if partial is not None:
            return length + common_tokens(tokens[length:], partial.token_ids), partial.path()
        found = self.find_partial(node, tokens[length:])
        return (length, node.path()) if found is None else (length + found.num_tokens, found.node.path())

    def find_partial(self, node: TreeNode, rest: TokenIds) -> PartialPage | None:
        """The page under `node` whose first slots hold the most of `rest`, the tokens that follow its path.

        For when a match has ended in `node`: no whole page is shared any more then, but the slots before the first
        difference can be copied. Changes nothing. O(page_size) for each child up to 16 of them; with more
        O(log children), and O(children log children) the first time.

        Returns: None if not even one token is shared.

        >>> tree = RadixTree(page_size=4)
        >>> _ = tree.insert([1, 2, 3, 4], pages=[7])
        >>> found = tree.match_prefix([1, 2, 3, 9])
        >>> partial = tree.find_partial(found.node, [1, 2, 3, 9])
        >>> found.length, partial.num_tokens, partial.page          # no whole page, but three slots of page 7
        (0, 3, 7)
        """
        wanted = int32_array(rest)[: self.page_size].tobytes()
        if self.page_size == 1 or not wanted:
            return None
        best, best_tokens = None, 0
        for first_page in likest_children(node, wanted):
            common = common_prefix_tokens(first_page, wanted)
            if common > best_tokens:
                best, best_tokens = node.children[first_page], common
        return None if best is None else PartialPage(best_tokens, int(best.page_ids[0]), best)

    # -- writing -----------------------------------------------------------------------------------------------------

    def insert(
        self, ids: TokenIds, pages: Any, *, extra_key: str | None = None, cache_salt: str | None = None
    ) -> InsertResult:
        """Remember that the KV of `ids` lies in `pages`, one for each whole page of `ids`. O(tokens + depth).

        Of a prefix that is cached already the tree keeps its own pages; those given for it remain the caller's.

        Raises: TokenIdsTypeError, InvalidTokenIdsError, InvalidRequestError for a key that is not text;
            InvalidPagesError if `pages` are not page ids, or not `len(ids) // page_size` of them.

        >>> tree = RadixTree(page_size=2)
        >>> tree.insert([1, 2, 3, 4], pages=[7, 8]).prefix_len
        0
        >>> tree.insert([1, 2, 5, 6], pages=[20, 21]).prefix_len    # page 20 stays the caller's
        2
        >>> tree.match_prefix([1, 2, 5, 6]).pages.tolist()
        [7, 21]
        """
        named = extra_key is not None or cache_salt is not None
        return self.insert_tokens(int32_array(ids), pages, Namespace.of(extra_key, cache_salt) if named else SHARED)

    def insert_tokens(self, tokens: Tokens, pages: Any, namespace: Namespace) -> InsertResult:
        """As `insert`, of an int32 array, in a namespace that was checked."""
        page_size = self.page_size
        num_pages = len(tokens) // page_size
        page_ids = page_array(pages)
        if len(page_ids) != num_pages:
            raise InvalidPagesError(
                f"{num_pages} whole pages of {page_size} tokens need as many page ids, not {len(page_ids)}"
            )
        if self._unclaimed is not None:
            self._merge_unclaimed()
        root = self._roots.get(namespace) or new_root(namespace, 0)
        node, partial = self._descend(root, tokens, [])
        length = node.end
        if partial is not None:
            common = self._common_pages(tokens, length, partial)
            length += common
        check_tokens(tokens, length)
        new_pages = page_bytes(page_ids, length // page_size)
        self._tick += 1
        self._touch(partial or node)
        if partial is not None:
            node = self._cut(partial, common)
        if new_pages:
            node = self._add_leaf(node, tokens[length : num_pages * page_size].tobytes(), new_pages)
        return _new_tuple(InsertResult, (length, node))

    def insert_tail(self, node: TreeNode, rest: TokenIds, page: int) -> TreeNode:
        """Keep `rest`, the less than one page of tokens that follow the path of `node`, whose KV is in `page`.

        Counts as a use of that path along with the last match or insert. O(page_size), and what `find_partial` costs.

        Returns: the new leaf.
        Raises: InvalidRequestError if `rest` fills a page, another child of `node` begins with it, or `node` is a tail
            or left the tree; InvalidPagesError, TokenIdsTypeError, InvalidTokenIdsError.

        >>> tree = RadixTree(page_size=4)
        >>> node = tree.insert([1, 2, 3, 4], pages=[7]).node
        >>> _ = tree.insert_tail(node, [5, 6], page=8)
        >>> tree.peek([1, 2, 3, 4, 5, 6]), tree.peek_path([1, 2, 3, 4, 5, 6])[0]
        (4, 6)
        """
        key = int32_array(rest).tobytes()
        page_id = page_bytes(page_array([page]))
        if node.namespace is not None:  # the root may be new, or not be any more
            node = self._roots.get(node.namespace, node)
        elif not node.in_tree:
            raise InvalidRequestError(f"{node} is not in the tree any more; match the prefix again")
        elif node.is_tail(self.page_size):
            raise InvalidRequestError(f"{node} is a tail, which nothing can follow")
        found = self.find_partial(node, rest)
        if not 0 < len(key) < self._page_bytes or (found and found.num_tokens * TOKEN_BYTES == len(key)):
            raise InvalidRequestError(
                f"a tail must hold at least 1 token, fewer than a page of {self.page_size}, and not be cached yet; "
                f"got {len(key) // TOKEN_BYTES} tokens"
            )
        check_tokens(int32_array(rest))
        if node.namespace is None and node.last_access < self._tick:
            self._touch(node)
        return self._add_leaf(node, key, page_id)

    def remove(self, leaf: TreeNode) -> NDArray[np.int32]:
        """Forget an unpinned leaf out of turn. O(1).

        Returns: its pages, int32, read-only; no longer the tree's.
        Raises: InvalidRequestError if it is pinned, no leaf, or not in the tree.
        """
        if not leaf.is_evictable:
            raise InvalidRequestError(f"{leaf} cannot be removed: it is pinned, has children, or has left the tree")
        try:
            self._remove_leaf(leaf, "removed")
        except PolicyError as error:
            error.freed = leaf.page_ids
            raise
        return leaf.page_ids

    def touch(self, node: TreeNode) -> None:
        """Count as a use of the path to `node` that belongs to the last match, which ended right above it.

        O(depth + log leaves).
        """
        if self._on_matched is not None and node.last_access < self._tick:  # else it was part of that match
            self._on_matched(node)
        self._touch(node)

    def count_hit(self, node: TreeNode) -> None:
        """Note that a request found the path to `node` cached. O(depth)."""
        current: TreeNode | None = node
        while current is not None:
            current.hits += 1
            current = current.parent

    def recall_hits(self, node: TreeNode, hits: int) -> None:
        """Let the path to `node` count as found by so many requests at least. O(depth + log leaves)."""
        current: TreeNode | None = node
        while current is not None:
            current.hits = max(current.hits, hits)
            current = current.parent
        if node.entry is not None:
            self._queue.update(node)

    def retain(self, node: TreeNode, *, priority: int = 0, keep_for_s: float | None = None) -> None:
        """Let the path from the root to `node` outlive others. O(depth + log leaves).

        Args:
            priority: what the "priority" policy orders by; a node keeps the highest it was given.
            keep_for_s: for this many seconds its tokens are evicted only if nothing else can be: unlike a lock
                this never blocks anybody, and it ends by itself. A node keeps the latest end it was given.

        Raises: InvalidRequestError if `priority` is not an integer of 64 bits, `keep_for_s` not from 0 to ten years,
            or `node` was evicted.

        >>> now_s = 0.0
        >>> tree = RadixTree(clock=lambda: now_s)
        >>> tree.retain(tree.insert([1], pages=[7]).node, keep_for_s=60)
        >>> _ = tree.insert([2], pages=[8]), tree.insert([3], pages=[9])
        >>> tree.evict(1).tolist()                                  # page 7 is the oldest, and is kept
        [8]
        >>> now_s = 61.0
        >>> tree.evict(1).tolist()
        [7]
        """
        priority, keep_for_s = checked_priority(priority), checked_keep_for_s(keep_for_s)
        self.keep_until(node, 0.0 if keep_for_s is None else self.clock() + keep_for_s, priority=priority)

    def keep_until(self, node: TreeNode, keep_until: float, *, priority: int) -> None:
        """As `retain`, by a time of the tree's clock, of arguments that were checked."""
        node = self._standing(node)
        for kept in node.path():
            kept.priority = max(kept.priority, priority)
            kept.keep_until = max(kept.keep_until, keep_until)
        if node.entry is not None:
            self._queue.update(node)

    def inc_lock_ref(self, node: TreeNode) -> None:
        """Pin the path from `node` to its root: none of it will be evicted. O(depth).

        Raises: InvalidRequestError if `node` was evicted already; match again.

        >>> tree = RadixTree()
        >>> node = tree.insert([1, 2], pages=[7, 8]).node
        >>> tree.inc_lock_ref(node)
        >>> tree.evict(2).tolist(), tree.protected_size
        ([], 2)
        >>> tree.dec_lock_ref(node)
        >>> tree.evict(2).tolist()
        [7, 8]
        """
        if node.parent is None:
            node = self._standing(node)
        if node.entry is not None:
            self._queue.remove(node)
        before = evictable = self._evictable_bytes
        while (parent := node.parent) is not None:
            if node.lock_ref == 0:
                evictable -= len(node.pages)
            node.lock_ref += 1
            node = parent
        self._evictable_bytes = evictable
        if self._accounts is not None:
            self._count_evictable(node, evictable - before)

    def dec_lock_ref(self, node: TreeNode) -> None:
        """Undo one `inc_lock_ref(node)`. O(depth), and O(tokens of the edge) if a cut is merged back.

        Raises: InvalidRequestError if `node` is not pinned.
        """
        if node.parent is None:
            node = self._standing(node)
        if node.lock_ref == 0 and node.key:
            raise InvalidRequestError(f"{node} is not pinned, so it cannot be unpinned")
        current = node
        before = evictable = self._evictable_bytes
        while (parent := current.parent) is not None:
            current.lock_ref -= 1
            if current.lock_ref == 0:
                evictable += len(current.pages)
            current = parent
        self._evictable_bytes = evictable
        if self._accounts is not None:
            self._count_evictable(current, evictable - before)
        if node.cut:
            self._merge(node)
        elif node.lock_ref == 0 and not node.children and node.key:
            self._queue.add(node)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _descend(self, start: TreeNode, tokens: Tokens, runs: list[PageBytes]) -> tuple[TreeNode, TreeNode | None]:
        """Follow whole edges from `start` as far as `tokens` go, and gather their pages in `runs`.

        Returns: the node reached, and its child whose edge shares at least its first page with what comes next, but
            not all; None if there is none.
        """
        page_size = self.page_size
        node, position, num_tokens = start, start.end, len(tokens)
        data = tokens.data  # compared in place: nothing is copied but the first page of each edge
        while (first_end := position + page_size) <= num_tokens:
            child = node.children.get(data[position:first_end].tobytes())
            if child is None:
                break
            end = child.end
            # a slice that ends with the data would be a prefix of a longer key: not a whole edge
            if end > num_tokens or not child.key.startswith(data[position:end]):
                return node, child
            position, node = end, child
            runs.append(child.pages)
        return node, None

    def _common_pages(self, tokens: Tokens, position: int, node: TreeNode) -> int:
        """Tokens, in whole pages, that `tokens` from `position` on have in common with `node`; not all of its edge."""
        return common_tokens(tokens[position:], node.token_ids) // self.page_size * self.page_size

    def __repr__(self) -> str:
        return (
            f"RadixTree(page_size={self.page_size}, policy={self.policy.name!r}, total_size={self.total_size}, "
            f"evictable_size={self.evictable_size}, leaves_unpinned={len(self._queue)})"
        )
