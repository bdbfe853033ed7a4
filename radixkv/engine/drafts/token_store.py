"""Stores of tokens that are searched by their n-grams, over `radixkv.kernels.ngram_chains`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from radixkv.kernels import ngram_chains
from radixkv.kernels.ngram_chains import COUNT, DEPTH, NONE, PAGE_FIELDS, PARENT

MAX_MATCH = 32  # tokens that are compared
CANDIDATES = 12  # places that are compared
LEAST_TEXT = 1024  # tokens that a text has room for at first

Ids = NDArray[np.int32]


class Found(NamedTuple):
    """Where the end of a text stood before.

    Attributes:
        match_tokens: how many of its last tokens stood there; 0 if there is no such place.
        position: how many tokens stood before those that follow.
        token_ids: those that follow; int32.
    """

    match_tokens: int
    position: int
    token_ids: Ids


class _Arrays(NamedTuple):
    """As `ngram_chains` describes them."""

    tokens: Ids
    links: Ids
    pages: Ids
    heads: Ids

    @classmethod
    def empty(cls, num_pages: int, page_size: int) -> _Arrays:
        num_tokens = num_pages * page_size
        num_heads = 1 << max(4, (num_tokens - 1).bit_length())
        return cls(
            np.empty(num_tokens, np.int32),
            np.full((num_tokens, 2), NONE, np.int32),
            np.zeros((num_pages, PAGE_FIELDS), np.int32),
            np.full(3 * num_heads, NONE, np.int32),
        )


class PagedTokens:
    """Tokens in pages, by page id as the cache's pages have them; pages follow each other as in a tree.

    At most 36 bytes a token that there is room for, and 20 a page, from the start: nothing grows. O(1) a token to store
    and to forget, about a tenth of a microsecond.

    >>> tokens = PagedTokens(num_pages=4, page_size=2)
    >>> tokens.store(np.array([5, 6, 7, 8], np.int32), np.array([3, 1], np.int32))
    >>> tokens.find(np.array([9, 5, 6], np.int32), 4).token_ids.tolist()
    [7, 8]
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self._page_size = page_size
        self._arrays = _Arrays.empty(num_pages, page_size)

    @property
    def num_bytes(self) -> int:
        """Size of the arrays."""
        return sum(array.nbytes for array in self._arrays)

    @property
    def num_tokens(self) -> int:
        """Tokens that are stored. O(pages)."""
        return int(self._arrays.pages[:, COUNT].sum())

    def store(self, tokens: Ids, pages: Ids, *, page_before: int = NONE, space: int = 0, start: int = 0) -> None:
        """Store `tokens` in `pages`, after those of `page_before`. O(tokens).

        Args:
            space: texts find only what is stored in theirs.
            start: how many tokens of the sequence come before them.
        """
        depth = start // self._page_size
        ngram_chains.store(*self._arrays, self._page_size, tokens, pages, page_before, space, depth)

    def forget(self, num_tokens: int, pages: Ids) -> int:
        """Forget `pages`, which hold `num_tokens` tokens, unless they were stored anew meanwhile. O(tokens).

        Returns: how many pages were forgotten.
        """
        _, links, by_page, heads = self._arrays
        return int(ngram_chains.forget(links, by_page, heads, self._page_size, pages, num_tokens))

    def clear(self) -> None:
        """Forget everything. O(room)."""
        self._arrays.pages[:, COUNT] = 0
        self._arrays.links.fill(NONE)
        self._arrays.heads.fill(NONE)

    def find(self, text: Ids, most: int, space: int = 0) -> Found:
        """Where the longest end of `text` stood before in `space`, with `most` tokens after it at most.

        12 places are looked at, and 32 tokens compared at each: some microseconds, however much is stored.
        """
        out = np.empty(most, np.int32)
        match_tokens, place, num = ngram_chains.find(
            *self._arrays, self._page_size, text, space, MAX_MATCH, CANDIDATES, out
        )
        page, offset = divmod(place, self._page_size)
        return Found(match_tokens, int(self._arrays.pages[page, DEPTH]) * self._page_size + offset, out[:num])


class GrowingText:
    """The tokens of one request, which grow at the end; at most 48 bytes a token.

    >>> text = GrowingText()
    >>> text.find(np.array([1, 2, 3, 1, 2], np.int32), 6).token_ids.tolist()     # what comes round may do so once more
    [3, 1, 2, 3, 1, 2]
    """

    def __init__(self) -> None:
        self._make_room(0)

    def _make_room(self, num_tokens: int) -> None:
        self._arrays = _Arrays.empty(1, max(LEAST_TEXT, 1 << num_tokens.bit_length()))
        self._arrays.pages[0, PARENT] = NONE

    def find(self, text: Ids, most: int) -> Found:
        """Where the longest end of `text` stood before in it, with the `most` tokens after it.

        `text` begins with the text of the last call. As `PagedTokens.find`, and O(1) for each new token, amortised.
        What follows may reach the end of the text; it goes on then from where it began.
        """
        if len(text) > len(self._arrays.tokens):
            self._make_room(len(text))
        out = np.empty(most, np.int32)
        match_tokens, place = ngram_chains.extend_and_find(*self._arrays, text, MAX_MATCH, CANDIDATES, out)
        return Found(match_tokens, place, out if match_tokens else out[:0])
