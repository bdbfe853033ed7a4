"""What a radix tree holds at one moment, for someone who looks on from outside its thread."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from operator import attrgetter
from typing import NamedTuple

from radixkv.cache.namespace import Namespace
from radixkv.cache.token_ids import TOKEN_BYTES
from radixkv.cache.tree.node import TreeNode
from radixkv.cache.tree.radix_tree import RadixTree
from radixkv.config.checks import checked_int

LOOKED_AT = 2  # nodes of one level that are looked at, for each that there is room for


class TreeView(NamedTuple):
    """Some or all nodes of a tree, parents first: one entry in each list for each of them.

    Attributes:
        ids: numbers of the nodes; a node keeps its number as long as it is seen.
        parents: the number of each one's parent; None for a root.
        namespaces: of a root; None for others.
        token_ids: of the edge, little-endian int32 `bytes`; empty for a root.
        num_children: children in the tree, whether they are in the view or not.
        hits, last_access, keep_until: as of `TreeNode`.
        pinned: whether a running request reads it.
        total_tokens: tokens that the tree's pages have room for, seen or not.
    """

    ids: list[int]
    parents: list[int | None]
    namespaces: list[Namespace | None]
    token_ids: list[bytes]
    num_children: list[int]
    hits: list[int]
    last_access: list[int]
    keep_until: list[float]
    pinned: list[bool]
    total_tokens: int

    def num_tokens(self) -> list[int]:
        """Tokens on each edge."""
        return [len(token_ids) // TOKEN_BYTES for token_ids in self.token_ids]


class TreeViewer:
    """Looks at a tree again and again, and numbers its nodes. Belongs to the thread of the tree.

    >>> tree = RadixTree(page_size=2)
    >>> _ = tree.insert([1, 2, 3, 4], pages=[7, 8]), tree.insert([1, 2, 5, 6], pages=[7, 9])
    >>> view = TreeViewer(max_nodes=100).look(tree)
    >>> view.parents, view.num_tokens()
    ([None, 0, 1, 1], [0, 2, 2, 2])
    """

    def __init__(self, max_nodes: int) -> None:
        """max_nodes: how many nodes a view has at most. Raises: ConfigError."""
        self.max_nodes = checked_int("max_nodes", max_nodes, 1)
        self._id_of: dict[TreeNode, int] = {}
        self._next_id = 0

    def look(self, tree: RadixTree) -> TreeView:
        """What `tree` holds now: all of it, or the `max_nodes` nearest to the roots, and of the last level among these
        the most recently used. O(max_nodes log max_nodes); it copies no tokens.
        """
        nodes = self._nearest(tree)
        ids = self._numbered(nodes)
        id_of = self._id_of
        return TreeView(
            ids=ids,
            parents=[None if node.parent is None else id_of[node.parent] for node in nodes],
            namespaces=[node.namespace for node in nodes],
            token_ids=[node.key for node in nodes],
            num_children=[len(node.children) for node in nodes],
            hits=[node.hits for node in nodes],
            last_access=[node.last_access for node in nodes],
            keep_until=[node.keep_until for node in nodes],
            pinned=[node.lock_ref > 0 for node in nodes],
            total_tokens=tree.total_size,
        )

    def _nearest(self, tree: RadixTree) -> list[TreeNode]:
        level = [root for root in map(tree.root_of, tree.namespaces()) if root is not None]
        nodes: list[TreeNode] = []
        while level:
            room = self.max_nodes - len(nodes)
            if len(level) > room:
                return nodes + sorted(level, key=attrgetter("last_access"), reverse=True)[:room]
            nodes += level
            children = (child for node in level for child in node.children.values())
            level = list(islice(children, LOOKED_AT * (room + 1)))
        return nodes

    def _numbered(self, nodes: Sequence[TreeNode]) -> list[int]:
        """The numbers of `nodes`; those that were not seen before get new ones, and numbers of others are forgotten."""
        ids: list[int] = []
        for node in nodes:
            number = self._id_of.get(node)
            if number is None:
                number, self._next_id = self._next_id, self._next_id + 1
            ids.append(number)
        self._id_of = dict(zip(nodes, ids, strict=True))
        return ids
