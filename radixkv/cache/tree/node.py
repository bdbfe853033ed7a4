"""What the radix tree is made of, and what its verbs return."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.namespace import Namespace as Namespace  # others may find it here
from radixkv.cache.token_ids import TOKEN_BYTES
from radixkv.cache.tree.page_ids import PageBytes

if TYPE_CHECKING:
    from sortedcontainers import SortedList

    from radixkv.cache.events import Prefix
    from radixkv.cache.quotas.accounts import Account
    from radixkv.cache.tree.leaf_queue import Entry
    from radixkv.cache.tree.subscribers import Subscribers


class TreeNode:
    """One edge of the tree and the node it leads to.

    Attributes:
        key: the edge's tokens, little-endian int32 `bytes`: a whole number of pages, or less than one page in a tail.
            Empty in a root. In a leaf whose end was evicted other tokens may follow: see `edge`.
        num_tokens: tokens on the edge.
        pages: the edge's pages, int32 `bytes`, or a window on such.
        end: tokens from the root to the end of this edge.
        children: by the bytes of the first page of their key.
        subscribers: who is told of changes of `children`; None while nobody is.
        ordered: the keys of `children` in order, kept only where there are many and `find_partial` looked at them.
        parent: None in a root, and in a node that has left the tree.
        heir: the node that this one was merged into, after it was.
        namespace: set in roots alone.
        lock_ref: how many locks pin this node; a pinned node is never evicted.
        fork: whether this node was made by cutting an edge.
        cut: the same, as long as nothing has branched off here.
        created: tick of the insert that brought its tokens.
        last_access: tick of the last match or insert that came this way.
        hits: requests that found its tokens cached.
        priority: the highest of the requests that came this way.
        keep_until: by the tree's clock; before that it is evicted only if nothing else can be.
        entry: its rank in the eviction queue; None while it is not an unpinned leaf.
        before, after: its neighbours there, if it is linked with others.
        state: belongs to the eviction policy; None at first.
        account: whose its pages are, in a cache with quotas; None in one without.
        prefix: the tokens from the root to its end, for events; None until an observer asks.
    """

    __slots__ = (
        "account",
        "after",
        "before",
        "children",
        "created",
        "cut",
        "end",
        "entry",
        "fork",
        "heir",
        "hits",
        "keep_until",
        "key",
        "last_access",
        "lock_ref",
        "namespace",
        "num_tokens",
        "ordered",
        "pages",
        "parent",
        "prefix",
        "priority",
        "state",
        "subscribers",
    )

    def __init__(self, key: bytes, pages: PageBytes, end: int, parent: TreeNode | None, tick: int) -> None:
        self.key = key
        self.num_tokens = len(key) // TOKEN_BYTES
        self.pages = pages
        self.end = end
        self.parent = parent
        self.created = self.last_access = tick
        self.children: dict[bytes, TreeNode] = {}
        self.subscribers: Subscribers | None = None
        self.ordered: SortedList | None = None
        self.heir: TreeNode | None = None
        self.namespace: Namespace | None = None
        self.lock_ref = self.hits = 0
        self.fork = self.cut = False
        self.priority = 0
        self.keep_until = 0.0
        self.entry: Entry | None = None
        self.before: TreeNode | None = None
        self.after: TreeNode | None = None
        self.state: Any = None
        self.account: Account | None = None
        self.prefix: Prefix | None = None

    @property
    def edge(self) -> bytes:
        """The edge's tokens, little-endian int32. O(1), and O(tokens) in a leaf whose end was evicted."""
        return bytes(self.key[: self.num_tokens * TOKEN_BYTES])

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """The edge's tokens, read-only."""
        return np.frombuffer(self.key, np.int32)[: self.num_tokens]

    @property
    def page_ids(self) -> NDArray[np.int32]:
        """The edge's pages, read-only."""
        return np.frombuffer(self.pages, np.int32)

    @property
    def is_root(self) -> bool:
        return not self.key

    def is_tail(self, page_size: int) -> bool:
        """Whether it holds less than a page."""
        return 0 < self.num_tokens < page_size

    @property
    def is_evictable(self) -> bool:
        """Whether it is an unpinned leaf of its tree."""
        return self.entry is not None

    @property
    def in_tree(self) -> bool:
        """Whether it is still in its tree; it may have been evicted or merged."""
        return self.parent is not None or not self.key

    @property
    def root(self) -> TreeNode:
        """The root above it. O(depth)."""
        node = self
        while node.parent is not None:
            node = node.parent
        return node

    def path(self) -> list[TreeNode]:
        """The nodes from below the root to this one. O(depth)."""
        nodes: list[TreeNode] = []
        node: TreeNode | None = self
        while node is not None and node.key:
            nodes.append(node)
            node = node.parent
        nodes.reverse()
        return nodes

    def __repr__(self) -> str:
        return (
            f"TreeNode({self.num_tokens} tokens, {len(self.children)} children, lock_ref={self.lock_ref}, "
            f"last_access={self.last_access})"
        )


def new_root(namespace: Namespace, tick: int) -> TreeNode:
    """A root without children; the tree keeps it once it has one."""
    root = TreeNode(b"", b"", 0, None, tick)
    root.namespace = namespace
    return root


class MatchResult(NamedTuple):
    """The longest cached prefix: its `length` in tokens, the `node` it ends in, and the pages of each edge above."""

    length: int
    node: TreeNode
    page_runs: list[PageBytes]

    @property
    def pages(self) -> NDArray[np.int32]:
        """The pages that held the prefix when it was matched, int32, read-only. O(pages)."""
        return np.frombuffer(b"".join(self.page_runs), np.int32)


class InsertResult(NamedTuple):
    """How many leading tokens (`prefix_len`) the tree had before, and the `node` the inserted sequence ends in."""

    prefix_len: int
    node: TreeNode


class PartialPage(NamedTuple):
    """The first `num_tokens` slots of `page` hold what comes next, though not the whole page does; `node` owns it."""

    num_tokens: int
    page: int
    node: TreeNode
