"""The radix tree: which token prefixes are cached, and in which pages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.eviction import EvictionPolicy, LeafQueue, resolve_policy
from radixkv.cache.token_ids import TOKEN_BYTES, TokenIds, token_array, token_bytes
from radixkv.errors import (
    ConfigError,
    InvalidPagesError,
    InvalidRequestError,
    InvalidTokenIdsError,
    InvariantError,
    TokenIdsTypeError,
)

Namespace = tuple[str | None, str | None]
"""(`extra_key`, `cache_salt`): requests in different namespaces never share."""


class TreeNode:
    """One edge of the tree and the node it leads to.

    Attributes:
        key: the edge's tokens, little-endian int32 `bytes`; a whole number of pages. Empty in a root.
        pages: the edge's pages, int32 `bytes`, one for each `page_size` tokens of `key`.
        children: by the bytes of the first page of their key.
        parent: None in a root and in a node that was evicted.
        namespace: set in roots alone.
        lock_ref: how many locks pin this node; a pinned node is never evicted.
        last_access: tick of the last match or insert that passed through here.
        queue_key: where the node stands in the eviction queue; None while it is not an unpinned leaf.
    """

    __slots__ = ("children", "key", "last_access", "lock_ref", "namespace", "pages", "parent", "queue_key")

    def __init__(self, key: bytes, pages: bytes, parent: TreeNode | None, last_access: int) -> None:
        self.key = key
        self.pages = pages
        self.parent = parent
        self.last_access = last_access
        self.children: dict[bytes, TreeNode] = {}
        self.namespace: Namespace | None = None
        self.lock_ref = 0
        self.queue_key: tuple[Any, int] | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens on the edge."""
        return len(self.key) // TOKEN_BYTES

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """The edge's tokens, read-only."""
        return np.frombuffer(self.key, np.int32)

    @property
    def is_root(self) -> bool:
        return not self.key

    def __repr__(self) -> str:
        return (
            f"TreeNode({self.num_tokens} tokens, {len(self.children)} children, lock_ref={self.lock_ref}, "
            f"last_access={self.last_access})"
        )


class MatchResult(NamedTuple):
    """The longest cached prefix: its `length` in tokens, its `pages` (int32, read-only) and the `node` it ends in."""

    length: int
    pages: NDArray[np.int32]
    node: TreeNode


class InsertResult(NamedTuple):
    """How many leading tokens (`prefix_len`) the tree had before, and the `node` the inserted sequence ends in."""

    prefix_len: int
    node: TreeNode


class RadixTree:
    """Maps token prefixes to KV pages, shares common prefixes and evicts unused ones.

    The unit is the page: a sequence is kept up to its last whole page of `page_size` tokens, and two sequences share
    whole pages. Each namespace (`extra_key`, `cache_salt`) has a root of its own.

    Invariants, proved by `check_invariants`:

    - every root-to-node path spells the tokens whose KV lies in its nodes' pages, in order;
    - siblings differ in their first page of tokens, and every node but a root holds at least one page;
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
    """

    def __init__(self, page_size: int = 1, policy: str | EvictionPolicy = "lru") -> None:
        if isinstance(page_size, bool) or not isinstance(page_size, int) or page_size < 1:
            raise ConfigError(f"page_size must be an integer of at least 1, not {page_size!r}")
        self.page_size = page_size
        self.policy = resolve_policy(policy)
        self._page_bytes = page_size * TOKEN_BYTES
        self._roots: dict[Namespace, TreeNode] = {}
        self._queue = LeafQueue(self.policy)
        self._tick = 0
        self._evictable_bytes = 0
        self._total_bytes = 0

    # -- sizes -------------------------------------------------------------------------------------------------------

    @property
    def total_size(self) -> int:
        """Tokens in the tree. O(1)."""
        return self._total_bytes // TOKEN_BYTES

    @property
    def evictable_size(self) -> int:
        """Tokens in unpinned nodes. O(1)."""
        return self._evictable_bytes // TOKEN_BYTES

    @property
    def protected_size(self) -> int:
        """Tokens in pinned nodes. O(1)."""
        return (self._total_bytes - self._evictable_bytes) // TOKEN_BYTES

    @property
    def tick(self) -> int:
        """Matches and inserts so far: the clock of `last_access`."""
        return self._tick

    # -- reading -----------------------------------------------------------------------------------------------------

    def match_prefix(
        self, ids: TokenIds, *, extra_key: str | None = None, cache_salt: str | None = None
    ) -> MatchResult:
        """The longest cached prefix of `ids`, in whole pages. O(tokens + depth).

        Counts as a use of that prefix, and splits the node it ends in, so that exactly the prefix can be pinned.
        `peek` changes nothing.

        Raises: TokenIdsTypeError, InvalidTokenIdsError.
        """
        data = token_bytes(ids)
        self._tick += 1
        root = self._roots.get((extra_key, cache_salt))
        if root is None:
            return MatchResult(0, np.empty(0, np.int32), _new_root((extra_key, cache_salt), self._tick))
        length_bytes, node = self._walk(root, data)
        return MatchResult(length_bytes // TOKEN_BYTES, self.path_pages(node), node)

    def peek(self, ids: TokenIds, *, extra_key: str | None = None, cache_salt: str | None = None) -> int:
        """How many tokens `match_prefix` would find. Changes nothing: no split, no use. O(tokens + depth)."""
        return self.peek_path(ids, extra_key=extra_key, cache_salt=cache_salt)[0]

    def peek_path(
        self, ids: TokenIds, *, extra_key: str | None = None, cache_salt: str | None = None
    ) -> tuple[int, list[TreeNode]]:
        """As `peek`, with the nodes that hold the prefix, top first; the last may reach beyond it."""
        data = token_bytes(ids)
        node = self._roots.get((extra_key, cache_salt))
        position, path = 0, []
        while node is not None:
            child = node.children.get(data[position : position + self._page_bytes])
            if child is None:
                break
            path.append(child)
            if not data.startswith(child.key, position):
                position += self._common_bytes(data, position, child.key)
                break
            position += len(child.key)
            node = child
        return position // TOKEN_BYTES, path

    def nodes(self) -> Iterator[tuple[int, TreeNode]]:
        """All nodes with their depth (roots have 0), parents before children, in no other order. O(1) a node."""
        stack = [(0, root) for root in reversed(self._roots.values())]
        while stack:
            depth, node = stack.pop()
            yield depth, node
            stack.extend((depth + 1, child) for child in reversed(node.children.values()))

    def path_pages(self, node: TreeNode) -> NDArray[np.int32]:
        """The pages from the root to `node`, int32, read-only. O(depth + pages)."""
        parts: list[bytes] = []
        current: TreeNode | None = node
        while current is not None:
            parts.append(current.pages)
            current = current.parent
        return np.frombuffer(b"".join(reversed(parts)), np.int32)

    # -- writing -----------------------------------------------------------------------------------------------------

    def insert(
        self, ids: TokenIds, pages: Any, *, extra_key: str | None = None, cache_salt: str | None = None
    ) -> InsertResult:
        """Remember that the KV of `ids` lies in `pages`, one for each whole page of `ids`. O(tokens + depth).

        Of a prefix that is cached already the tree keeps its own pages; those given for it remain the caller's.

        Raises: TokenIdsTypeError, InvalidTokenIdsError; InvalidPagesError if `pages` are not page ids, or not
            `len(ids) // page_size` of them.
        """
        data = token_bytes(ids)
        data = data[: len(data) // self._page_bytes * self._page_bytes]
        page_data = _page_bytes(pages)
        if len(page_data) * self.page_size != len(data):
            raise InvalidPagesError(
                f"{len(data) // self._page_bytes} whole pages of {self.page_size} tokens need as many page ids, "
                f"not {len(page_data) // TOKEN_BYTES}"
            )
        self._tick += 1
        namespace = (extra_key, cache_salt)
        root = self._roots.get(namespace)
        if root is None:
            root = _new_root(namespace, self._tick)
        length_bytes, node = self._walk(root, data)
        if length_bytes < len(data):
            self._roots[namespace] = root
            node = self._add_leaf(node, data[length_bytes:], page_data[length_bytes // self.page_size :])
        return InsertResult(length_bytes // TOKEN_BYTES, node)

    def inc_lock_ref(self, node: TreeNode) -> None:
        """Pin the path from `node` to its root: none of it will be evicted. O(depth).

        Raises: InvalidRequestError if `node` was evicted already; match again.
        """
        if node.parent is None and not node.is_root:
            raise InvalidRequestError(f"{node} was evicted and cannot be pinned; match the prefix again")
        if node.lock_ref == 0 and not node.is_root and not node.children:
            self._queue.remove(node)
        current: TreeNode | None = node
        while current is not None and not current.is_root:
            if current.lock_ref == 0:
                self._evictable_bytes -= len(current.key)
            current.lock_ref += 1
            current = current.parent

    def dec_lock_ref(self, node: TreeNode) -> None:
        """Undo one `inc_lock_ref(node)`. O(depth).

        Raises: InvalidRequestError if `node` is not pinned.
        """
        if node.lock_ref == 0 and not node.is_root:
            raise InvalidRequestError(f"{node} is not pinned, so it cannot be unpinned")
        current: TreeNode | None = node
        while current is not None and not current.is_root:
            current.lock_ref -= 1
            if current.lock_ref == 0:
                self._evictable_bytes += len(current.key)
            current = current.parent
        if node.lock_ref == 0 and not node.is_root and not node.children:
            self._queue.add(node)

    def evict(self, num_tokens: int) -> NDArray[np.int32]:
        """Remove unpinned leaves in policy order until at least `num_tokens` tokens are gone or none is left.

        Leaves go whole; a parent becomes a leaf when its last child goes. O(log leaves) a leaf.

        Returns: the freed pages, int32, read-only; no longer the tree's.
        """
        freed: list[bytes] = []
        missing_bytes = num_tokens * TOKEN_BYTES
        while missing_bytes > 0 and self._queue:
            leaf = self._queue.pop()
            missing_bytes -= len(leaf.key)
            freed.append(leaf.pages)
            self._remove_leaf(leaf)
        return np.frombuffer(b"".join(freed), np.int32)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _walk(self, root: TreeNode, data: bytes) -> tuple[int, TreeNode]:
        """Follow `data` from `root`, touching nodes; split where it leaves an edge midway. Returns (bytes, node)."""
        page_bytes, tick = self._page_bytes, self._tick
        node, position, end = root, 0, len(data)
        root.last_access = tick
        while position < end:
            child = node.children.get(data[position : position + page_bytes])
            if child is None:
                break
            if data.startswith(child.key, position):
                position += len(child.key)
                child.last_access = tick
                node = child
                continue
            common = self._common_bytes(data, position, child.key)
            node = self._split(child, common)
            node.last_access = tick
            position += common
            break
        if node.queue_key is not None:  # a leaf was used: it takes its new place in the order
            self._queue.remove(node)
            self._queue.add(node)
        return position, node

    def _common_bytes(self, data: bytes, position: int, key: bytes) -> int:
        """Bytes, in whole pages, that `data[position:]` and `key` have in common; they differ or `data` ends first."""
        size = min(len(data) - position, len(key)) // TOKEN_BYTES
        ours = np.frombuffer(data, np.int32, size, position)
        differs = ours != np.frombuffer(key, np.int32, size)
        first = int(differs.argmax())
        same = first if differs[first] else size
        return same // self.page_size * self._page_bytes

    def _split(self, node: TreeNode, head_bytes: int) -> TreeNode:
        """Cut `node`'s edge after `head_bytes`; returns the new upper node.

        `node` stays the lower part, so whoever pinned it still holds the whole path.
        """
        parent = node.parent
        assert parent is not None, "a root has no edge to split"
        head_pages = head_bytes // self.page_size
        upper = TreeNode(node.key[:head_bytes], node.pages[:head_pages], parent, node.last_access)
        upper.lock_ref = node.lock_ref
        parent.children[upper.key[: self._page_bytes]] = upper
        node.key = node.key[head_bytes:]
        node.pages = node.pages[head_pages:]
        node.parent = upper
        upper.children[node.key[: self._page_bytes]] = node
        if node.queue_key is not None:  # a rank may depend on the edge
            self._queue.remove(node)
            self._queue.add(node)
        return upper

    def _add_leaf(self, parent: TreeNode, key: bytes, pages: bytes) -> TreeNode:
        leaf = TreeNode(key, pages, parent, self._tick)
        if parent.queue_key is not None:
            self._queue.remove(parent)
        parent.children[key[: self._page_bytes]] = leaf
        self._queue.add(leaf)
        self._evictable_bytes += len(key)
        self._total_bytes += len(key)
        return leaf

    def _remove_leaf(self, leaf: TreeNode) -> None:
        parent = leaf.parent
        assert parent is not None, leaf
        assert leaf.lock_ref == 0, leaf
        del parent.children[leaf.key[: self._page_bytes]]
        leaf.parent = None
        self._evictable_bytes -= len(leaf.key)
        self._total_bytes -= len(leaf.key)
        if parent.children:
            return
        if parent.namespace is not None:
            del self._roots[parent.namespace]
        elif parent.lock_ref == 0:
            self._queue.add(parent)

    # -- proof -------------------------------------------------------------------------------------------------------

    def check_invariants(self) -> None:
        """Prove every invariant of the class docstring. O(tokens).

        Raises: InvariantError with what contradicts what.
        """
        total = evictable = 0
        leaves: set[int] = set()
        pages: list[bytes] = []
        for _, node in self.nodes():
            self._check_links(node)
            total += len(node.key)
            evictable += len(node.key) if node.lock_ref == 0 else 0
            pages.append(node.pages)
            if not node.is_root and not node.children and node.lock_ref == 0:
                leaves.add(id(node))
            _require((node.queue_key is not None) == (id(node) in leaves), "wrongly in or out of the queue", node)
        _require(leaves == {id(node) for node in self._queue}, "the queue is not the set of unpinned leaves", self)
        _require(total == self._total_bytes, f"counted {total} bytes, recorded {self._total_bytes}", self)
        _require(
            evictable == self._evictable_bytes,
            f"counted {evictable} bytes, recorded {self._evictable_bytes}",
            self,
        )
        all_pages = np.frombuffer(b"".join(pages), np.int32)
        _require(len(np.unique(all_pages)) == len(all_pages), "a page is in two places", self)

    def _check_links(self, node: TreeNode) -> None:
        if node.is_root:
            _require(node.namespace is not None and self._roots.get(node.namespace) is node, "a lost root", node)
            _require(bool(node.children) and node.lock_ref == 0, "an empty or pinned root", node)
        else:
            _require(len(node.key) % self._page_bytes == 0, "not whole pages", node)
            _require(len(node.pages) * self.page_size == len(node.key), "pages and tokens differ in number", node)
        pins_below = sum(child.lock_ref for child in node.children.values())
        _require(node.is_root or node.lock_ref >= pins_below, "children are pinned more often than it", node)
        for first_page, child in node.children.items():
            _require(child.parent is node, "a child has another parent", child)
            _require(not child.is_root, "an empty edge", child)
            _require(child.key[: self._page_bytes] == first_page, "filed under another first page", child)
            _require(child.lock_ref >= 0, "pinned a negative number of times", child)
            _require(node.last_access >= child.last_access, "used later than its parent", child)

    def __repr__(self) -> str:
        return (
            f"RadixTree(page_size={self.page_size}, policy={self.policy.name!r}, total_size={self.total_size}, "
            f"evictable_size={self.evictable_size}, leaves_unpinned={len(self._queue)})"
        )


def _new_root(namespace: Namespace, tick: int) -> TreeNode:
    root = TreeNode(b"", b"", None, tick)
    root.namespace = namespace
    return root


def _page_bytes(pages: Any) -> bytes:
    try:
        return token_array(pages).tobytes()
    except (InvalidTokenIdsError, TokenIdsTypeError) as error:
        raise InvalidPagesError(f"page ids: {str(error).replace('token id', 'page id')}") from error


def _require(holds: bool, what: str, where: object) -> None:
    if not holds:
        raise InvariantError(f"{what}: {where}")
