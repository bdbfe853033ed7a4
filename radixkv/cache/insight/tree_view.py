"""What a radix tree holds at one moment, for someone who looks on from outside its thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Reversible
from itertools import islice
from operator import attrgetter
from typing import NamedTuple

from radixkv.cache.namespace import Namespace
from radixkv.cache.token_ids import TOKEN_BYTES
from radixkv.cache.tree.node import TreeNode
from radixkv.cache.tree.radix_tree import RadixTree
from radixkv.config.checks import checked_int

LOOKED_AT = 2  # children of a node that are compared, for each that there is room for


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

    A look can be taken in parts, between which the tree may change: what each part tells is as that part found it, and
    what was cut or merged meanwhile may be left out until the next look.

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
        """What `tree` holds now: all of it, or the `max_nodes` nearest to the roots. Where a node has more children
        than there is room for, the most recently used of the newest are shown. It copies no tokens, except of leaves
        whose end was evicted.

        O(max_nodes log max_nodes).
        """
        (view,) = [view for view in self.parts(tree, self.max_nodes) if view is not None]
        return view

    def parts(self, tree: RadixTree, nodes_a_part: int) -> Iterator[TreeView | None]:
        """As `look`, but at most `nodes_a_part` nodes at a time: None after each part, and the view at last."""
        view = TreeView([], [], [], [], [], [], [], [], [], tree.total_size)
        id_of: dict[TreeNode, int] = {}
        roots = [root for root in map(tree.root_of, tree.namespaces()) if root is not None]
        queue = deque(_recent(roots, len(roots), self.max_nodes))
        num_seen = 0
        while queue:
            if num_seen and num_seen % nodes_a_part == 0:
                yield None
            num_seen += 1
            node = queue.popleft()
            parent = node.parent
            while parent is not None and parent not in id_of:
                parent = parent.parent
            if parent is None and node.namespace is None:  # it has left the tree
                continue
            id_of[node] = number = self._number(node)
            view.ids.append(number)
            view.parents.append(None if parent is None else id_of[parent])
            view.namespaces.append(node.namespace)
            view.token_ids.append(node.edge)
            view.num_children.append(len(node.children))
            view.hits.append(node.hits)
            view.last_access.append(node.last_access)
            view.keep_until.append(node.keep_until)
            view.pinned.append(node.lock_ref > 0)
            if node.children:
                room = self.max_nodes - len(view.ids) - len(queue)
                queue += _recent(node.children.values(), len(node.children), room)
        self._id_of = id_of
        yield view

    def _number(self, node: TreeNode) -> int:
        """The number that `node` had in the view before, or a new one."""
        number = self._id_of.get(node)
        if number is None:
            number, self._next_id = self._next_id, self._next_id + 1
        return number


def _recent(nodes: Reversible[TreeNode], num_nodes: int, room: int) -> Iterable[TreeNode]:
    """`nodes`, or as many as there is room for: of the newest, those that were used last."""
    if num_nodes <= room:
        return nodes
    newest = islice(reversed(nodes), LOOKED_AT * room)
    return sorted(newest, key=attrgetter("last_access"), reverse=True)[:room]
