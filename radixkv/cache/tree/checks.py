"""Proves the invariants of a radix tree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from radixkv.cache.namespace import Namespace
from radixkv.cache.quotas.account_queues import AccountQueues
from radixkv.cache.token_ids import TOKEN_BYTES
from radixkv.cache.tree.leaf_queue import LeafQueue
from radixkv.cache.tree.node import TreeNode
from radixkv.cache.tree.page_ids import PageBytes
from radixkv.errors import InvariantError

if TYPE_CHECKING:
    from radixkv.cache.tree.shape import TreeShape
    from radixkv.cache.tree.subscribers import Subscribers


def check_tree(
    tree: TreeShape,
    roots: Mapping[Namespace, TreeNode],
    queue: LeafQueue | AccountQueues,
    *,
    num_pages: int,
    num_evictable: int,
) -> None:
    """Prove every invariant that the docstring of `RadixTree` states. O(tokens). Raises: InvariantError."""
    evictable = 0
    leaves: set[int] = set()
    pages: list[PageBytes] = []
    for _, node in tree.nodes():
        if node.is_root:
            _check_root(node, roots)
        else:
            _check_edge(node, tree.page_size)
        _check_children(node, tree.page_size)
        pages.append(node.pages)
        if not node.is_root and node.lock_ref == 0:
            evictable += len(node.pages) // TOKEN_BYTES
            if not node.children:
                leaves.add(id(node))
        _require((node.entry is not None) == (id(node) in leaves), "wrongly in or out of the queue", node)
    queued = [id(node) for node in queue]
    _require(leaves == set(queued), "the queue is not the set of unpinned leaves", tree)
    _require(len(queue) == len(queued) == len(leaves), f"a queue of {len(queue)} holds {len(queued)}", tree)
    all_pages = np.frombuffer(b"".join(pages), np.int32)
    _require(len(all_pages) == num_pages, f"counted {len(all_pages)} pages, recorded {num_pages}", tree)
    _require(evictable == num_evictable, f"counted {evictable} evictable pages, recorded {num_evictable}", tree)
    _require(len(np.unique(all_pages)) == len(all_pages), "a page is in two places", tree)


def check_subscribers(tree: TreeShape, of_roots: Mapping[Namespace, Subscribers]) -> None:
    """Prove that the subscribers of each node are its own and not none. O(nodes). Raises: InvariantError."""
    for _, node in tree.nodes():
        subscribers = node.subscribers
        if node.namespace is not None:
            _require(subscribers is of_roots.get(node.namespace), "a root that tells somebody else", node)
        elif subscribers is not None:
            _require(subscribers.owner is node and bool(subscribers), "subscribers of another node, or none", node)
    for namespace, subscribers in of_roots.items():
        _require(subscribers.owner == namespace and bool(subscribers), "subscribers of another root, or none", tree)


def _check_root(root: TreeNode, roots: Mapping[Namespace, TreeNode]) -> None:
    _require(root.namespace is not None and roots.get(root.namespace) is root, "a lost root", root)
    _require(bool(root.children) and root.lock_ref == 0, "an empty or pinned root", root)
    _require(root.end == 0 and not root.pages, "a root with tokens", root)


def _check_edge(node: TreeNode, page_size: int) -> None:
    assert node.parent is not None, node
    num_pages = len(node.pages) // TOKEN_BYTES
    is_tail = num_pages == 1 and node.num_tokens < page_size and not node.children
    _require(node.num_tokens == num_pages * page_size or is_tail, "neither whole pages nor a tail", node)
    _require(len(node.key) >= node.num_tokens * TOKEN_BYTES, "fewer tokens than it says", node)
    _require(node.end == node.parent.end + node.num_tokens, "it ends elsewhere than it says", node)
    _require(node.heir is None, "merged, and in the tree", node)
    _require(not node.cut or len(node.children) < 2, "a cut that branches", node)
    pins_below = sum(child.lock_ref for child in node.children.values())
    _require(node.lock_ref >= pins_below, "children are pinned more often than it", node)


def _check_children(node: TreeNode, page_size: int) -> None:
    for first_page, child in node.children.items():
        _require(child.parent is node, "a child has another parent", child)
        _require(not child.is_root, "an empty edge", child)
        _require(child.key[: page_size * TOKEN_BYTES] == first_page, "filed under another first page", child)
        _require(child.lock_ref >= 0, "pinned a negative number of times", child)
        _require(node.is_root or node.last_access >= child.last_access, "used later than its parent", child)
    ordered = node.ordered
    _require(ordered is None or list(ordered) == sorted(node.children), "its children are ordered wrongly", node)


def _require(holds: bool, what: str, where: object) -> None:
    if not holds:
        raise InvariantError(f"{what}: {where}")
