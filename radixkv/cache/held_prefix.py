"""What the cache holds of a sequence at a moment, for those who only look."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.namespace import Namespace
from radixkv.cache.tree.radix_tree import RadixTree


class HeldPrefix(NamedTuple):
    """The first `tokens` of a sequence lie in `pages`, the last one perhaps in part.

    `shared_tokens` of them other cached sequences begin with too.
    """

    tokens: int
    pages: NDArray[np.int32]
    shared_tokens: int


def held_prefix(tree: RadixTree, ids: NDArray[np.int32], namespace: Namespace) -> HeldPrefix:
    """What `tree` holds of `ids`. Changes nothing. O(tokens + depth)."""
    tokens, path = tree.peek_tokens(ids, namespace)
    shared = end = 0
    for node in path:
        end += node.num_tokens
        if len(node.children) > 1 or end > tokens:
            shared = min(end, tokens)
    num_pages = -(-tokens // tree.page_size)
    pages = np.concatenate([np.empty(0, np.int32), *(node.page_ids for node in path)])[:num_pages]
    return HeldPrefix(tokens, pages, shared)
