"""Requests as numbers of pages: a page is known by itself and all pages before it, as a tree shares it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.tree.radix_tree import RadixTree
from radixkv.replay.traces import Request


class PagedRequest(NamedTuple):
    """A request by its pages.

    Attributes:
        pages: int32, of what is stored when it ends; each stands for its tokens and all before them.
        num_looked_up: how many of `pages` hold tokens of the prompt alone.
        num_tokens: tokens of the prompt.
        time_s: when it arrives.
        affinity: the first of its pages that not all requests share, as text.
    """

    pages: NDArray[np.int32]
    num_looked_up: int
    num_tokens: int
    time_s: float
    affinity: str


@dataclass(frozen=True, slots=True)
class PagedTrace:
    """Requests in order of arrival, of pages numbered from 0 up to `num_pages`, of `page_tokens` tokens each."""

    requests: list[PagedRequest]
    num_pages: int
    page_tokens: int

    @property
    def num_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(request.num_tokens for request in self.requests)


def number_pages(
    requests: Iterable[Request],
    page_size: int = 1,
    *,
    key_tokens: int = 1,
    on_progress: Callable[[int], object] = lambda _: None,
) -> PagedTrace:
    """Number the pages of `requests` in order of appearance. O(tokens); 4 bytes for each page of each request.

    Args: as `measure_reuse`.

    >>> trace = number_pages([Request.of_tokens(ids) for ids in ([1, 2, 3, 4], [1, 2, 5, 6], [3, 4])], page_size=2)
    >>> [request.pages.tolist() for request in trace.requests]
    [[0, 1], [0, 2], [3]]
    """
    tree = RadixTree(page_size)
    numbered: list[tuple[NDArray[np.int32], Request]] = []
    for request in requests:
        known = tree.match_prefix(request.stored).pages
        num_pages = len(request.stored) // page_size
        first_new = tree.num_pages
        new = np.arange(first_new, first_new + num_pages - len(known), dtype=np.int32)
        pages = np.concatenate((known, new))
        tree.insert(request.stored, pages)
        numbered.append((pages, request))
        on_progress(1)
    numbered.sort(key=lambda pair: pair[1].time_s)  # stable
    shared = _pages_of_all([pages for pages, _ in numbered])
    return PagedTrace(
        [
            PagedRequest(
                pages,
                len(request.keys) // page_size,
                request.num_tokens,
                request.time_s,
                str(pages[min(shared, len(pages) - 1)]) if len(pages) else "",
            )
            for pages, request in numbered
        ],
        tree.num_pages,
        page_size * key_tokens,
    )


def _pages_of_all(pages: list[NDArray[np.int32]]) -> int:
    """How many leading pages all requests share; requests without a page do not count."""
    some = [row for row in pages if len(row)]
    if not some:
        return 0
    shared = len(some[0])
    for row in some:
        differs = np.flatnonzero(row[:shared] != some[0][: len(row)][:shared])
        shared = min(shared, len(row), int(differs[0]) if len(differs) else shared)
    return shared
