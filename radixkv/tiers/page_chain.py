"""The names of the pages of one sequence, and what a store has of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.namespace import Namespace
from radixkv.cache.page_keys import page_keys, root_key
from radixkv.cache.token_ids import TOKEN_BYTES
from radixkv.tiers.page_store import FoundPage


class PageChain:
    """The keys of a sequence's whole pages, digested once each as the sequence grows.

    >>> chain = PageChain(Namespace(), page_size=2)
    >>> chain.grow(np.array([5, 6, 7], np.int32)), len(chain.keys)
    (None, 1)
    >>> chain.parent_key(0) == root_key(None, None), chain.parent_key(1) == chain.keys[0]
    (True, True)
    """

    def __init__(self, namespace: Namespace, page_size: int) -> None:
        self.page_size = page_size
        self.keys: list[bytes] = []
        self._root_key = root_key(*namespace)

    def grow(self, tokens: NDArray[np.int32]) -> None:
        """Know the keys of all whole pages of `tokens`, which begin with those of before. O(new tokens)."""
        num_pages = len(tokens) // self.page_size
        if num_pages > len(self.keys):
            new = tokens[len(self.keys) * self.page_size : num_pages * self.page_size]
            self.keys += page_keys(self.parent_key(len(self.keys)), as_bytes(new), self.page_size)

    def parent_key(self, page: int) -> bytes:
        """The key that page number `page` follows, which it need not have itself."""
        return self.keys[page - 1] if page else self._root_key


def as_bytes(tokens: NDArray[np.int32]) -> bytes:
    """Tokens as stores keep them: little-endian int32."""
    return tokens.astype("<i4", copy=False).tobytes()


def fitting_pages(found: Sequence[FoundPage], parent_key: bytes, tokens: bytes, page_size: int) -> list[FoundPage]:
    """The first pages of `found` that continue each other, and begin with `tokens`; all of them, unless a store lies.

    Every page but the last is whole and shared whole.
    """
    page_bytes = page_size * TOKEN_BYTES
    fitting: list[FoundPage] = []
    for number, page in enumerate(found):
        wanted = tokens[number * page_bytes :][: page.num_tokens * TOKEN_BYTES]
        fits = (
            page.parent_key == parent_key
            and 0 < len(wanted) == page.num_tokens * TOKEN_BYTES
            and len(page.tokens) <= page_bytes
            and page.tokens.startswith(wanted)
        )
        if not fits:
            break
        fitting.append(page)
        if len(wanted) < page_bytes:
            break
        (parent_key,) = page_keys(parent_key, wanted, page_size)
    return fitting
