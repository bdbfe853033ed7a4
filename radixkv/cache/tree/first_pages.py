"""Finds, among the children of a node, the one whose first page is most like what is looked for."""

from __future__ import annotations

from sortedcontainers import SortedList

from radixkv.cache.token_ids import TOKEN_BYTES
from radixkv.cache.tree.node import TreeNode

FEW_CHILDREN = 16  # up to that many are looked through one by one


def likest_children(node: TreeNode, wanted: bytes) -> list[bytes]:
    """First pages of children, among them one that shares the most bytes with `wanted`.

    In sorted order that is a neighbour of `wanted`.
    """
    if node.ordered is None and len(node.children) <= FEW_CHILDREN:
        return list(node.children)
    if node.ordered is None:
        node.ordered = SortedList(node.children)
    index = node.ordered.bisect_left(wanted)
    return list(node.ordered[max(0, index - 1) : index + 1])


def common_prefix_tokens(a: bytes, b: bytes) -> int:
    """Leading tokens that `a` and `b` have in common."""
    size = min(len(a), len(b))
    differing_bits = int.from_bytes(a[:size], "little") ^ int.from_bytes(b[:size], "little")
    if not differing_bits:
        return size // TOKEN_BYTES
    lowest_bit = (differing_bits & -differing_bits).bit_length() - 1
    return lowest_bit // (8 * TOKEN_BYTES)
