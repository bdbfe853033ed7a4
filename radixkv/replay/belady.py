"""The clairvoyant optimum: no cache of that size could have hit more, whatever it evicts.

What is bounded. Time is the sequence of requests, and the unit is what a tree shares: the page, known by itself and
all pages before it. A request finds the longest prefix of its pages that is in the cache, and while it runs *all* that
it looks up and stores is in there, as in an engine, whose attention reads it. So a cache of C tokens that runs a
request of n tokens has room for C - n tokens of other pages, and none if n is larger; when the request has ended, C
tokens of any pages may be left. A cache may drop any page at any time. Every policy of `RadixTree` is such a cache.

Why this is a bound. A page that is used by request p and looked up next by request q is a hit at q only if it stays
during p+1 … q-1: an interval, which takes one page of room at each of these requests. Hits are thus a set of
intervals of which no more cover a request than it leaves room for. The largest such set is found by going through
time and dropping, wherever too many cover a point, those that end last: the farthest next use (Belady, A Study of
Replacement Algorithms for a Virtual-Storage Computer, IBM Systems Journal 5(2), 1966; Mattson et al., Evaluation
Techniques for Storage Hierarchies, ibid. 9(2), 1970; as a question of intervals, Faigle and Nawijn, Note on
Scheduling Intervals On-Line, Discrete Applied Mathematics 58, 1995). Hits on a prefix are a subset of hits on pages,
so no cache has more.

Why it is reached. Whoever uses a page uses all before it, so the next use of a page is never later than that of the
pages after it; if ties are broken toward the deeper page, a page leaves only when those after it are gone. What is
kept is then always closed under prefixes, and each page that is kept until its next use is a hit on a prefix.

Hence the figure is exact over all caches of whole pages, not only trees or those that evict whole leaves. Two
things make it a mere bound: block keys whose last block is partial count as their own tokens here but take a whole
block in a tree; and of a request larger than the cache any part may be kept.

Which pages were kept is not needed for that. Kept pages of equal next use are interchangeable, so for each request it
suffices to count the tokens that are being kept for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.tree.radix_tree import RadixTree
from radixkv.replay.traces import Request


class Reuse(NamedTuple):
    """Which request uses again what another has used: all that the optimum of any capacity follows from.

    Attributes:
        num_tokens: tokens of all prompts.
        stored_tokens: for each request the tokens in the whole pages that it looks up or stores.
        next_uses: for each request (q, tokens) pairs: `tokens` tokens of its pages are looked up next by request q.
    """

    num_tokens: int
    stored_tokens: list[int]
    next_uses: list[list[tuple[int, int]]]

    @property
    def reused_tokens(self) -> int:
        """Tokens that a cache without limit finds."""
        return sum(tokens for uses in self.next_uses for _, tokens in uses)

    @property
    def ceiling(self) -> float:
        """The hit rate of a cache without limit."""
        return self.reused_tokens / self.num_tokens if self.num_tokens else 0.0


def measure_reuse(
    requests: Iterable[Request],
    page_size: int = 1,
    *,
    key_tokens: int = 1,
    on_progress: Callable[[int], object] = lambda _: None,
) -> Reuse:
    """Run `requests` through a tree without limit, and note who used each page last. O(tokens).

    Needs 4 bytes for each distinct token and 8 to 12 for each distinct page.

    Args:
        page_size: keys a page.
        key_tokens: tokens that a key stands for.
        on_progress: is called with a number of requests that were just done.

    >>> reuse = measure_reuse([Request.of_tokens(ids) for ids in ([1, 2], [1, 3], [1, 2])])
    >>> reuse.next_uses         # [1] goes from the first request to the second and on to the third, [1, 2] to the third
    [[(1, 1), (2, 1)], [(2, 1)], []]
    >>> reuse.ceiling           # 3 of 6 tokens
    0.5
    """
    tree = RadixTree(page_size)
    page_tokens = page_size * key_tokens
    last_user = np.empty(1024, np.int32)  # by page id; ids are given in order of appearance
    num_tokens, stored_tokens = 0, list[int]()
    next_uses: list[list[tuple[int, int]]] = []
    for now, request in enumerate(requests):
        known = tree.match_prefix(request.stored).pages
        looked_up = known[: len(request.keys) // page_size]
        for user, tokens in _tokens_by_user(last_user[looked_up], page_tokens, request.num_tokens):
            next_uses[user].append((now, tokens))
        num_pages = len(request.stored) // page_size
        first_new = tree.num_pages
        pages = np.concatenate((known, np.arange(first_new, first_new + num_pages - len(known), dtype=np.int32)))
        tree.insert(request.stored, pages)
        if tree.num_pages > len(last_user):
            last_user.resize(tree.num_pages * 3 // 2, refcheck=False)
        last_user[pages] = now
        next_uses.append([])
        stored_tokens.append(num_pages * page_tokens)
        num_tokens += request.num_tokens
        on_progress(1)
    return Reuse(num_tokens, stored_tokens, next_uses)


def _tokens_by_user(users: NDArray[np.int32], page_tokens: int, num_tokens: int) -> list[tuple[int, int]]:
    """How many tokens of a prompt each of its pages' last users brings; the deeper, the longer ago."""
    ends = np.flatnonzero(np.diff(users, append=-1)) + 1
    ends_tokens = np.minimum(ends * page_tokens, num_tokens)  # the last block may be partial
    return list(zip(users[ends - 1].tolist(), np.diff(ends_tokens, prepend=0).tolist(), strict=True))


def optimal_hit_tokens(reuse: Reuse, capacity_tokens: int) -> int:
    """The most prompt tokens that a cache of `capacity_tokens` can hit; see the module. O(requests log requests).

    >>> reuse = measure_reuse([Request.of_tokens(ids) for ids in ([1], [2], [1], [2])])
    >>> [optimal_hit_tokens(reuse, capacity) for capacity in (1, 2)]        # with room for one, each drops the other
    [0, 2]
    """
    kept = _Kept(len(reuse.stored_tokens))
    hit_tokens = 0
    for now, (stored_tokens, next_uses) in enumerate(zip(reuse.stored_tokens, reuse.next_uses, strict=True)):
        hit_tokens += kept.take(now)
        kept.shrink(max(0, capacity_tokens - stored_tokens))  # what the request uses itself is not in there yet
        for next_user, tokens in next_uses:
            kept.add(next_user, tokens)
        kept.shrink(capacity_tokens)
    return hit_tokens


class _Kept:
    """How many tokens are being kept for each future request."""

    def __init__(self, num_requests: int) -> None:
        self._tokens = [0] * num_requests
        self._latest: list[int] = []  # a heap of -request, for all with tokens, and for some that are over
        self._total = 0

    def add(self, user: int, tokens: int) -> None:
        if not self._tokens[user]:
            heappush(self._latest, -user)
        self._tokens[user] += tokens
        self._total += tokens

    def take(self, user: int) -> int:
        """The tokens kept for the next request; they are kept no longer. Its entry, the last of the heap, stays."""
        tokens, self._tokens[user] = self._tokens[user], 0
        self._total -= tokens
        return tokens

    def shrink(self, room: int) -> None:
        """Drop tokens, those of the latest request first, until no more than `room` are left."""
        while self._total > room:
            user = -self._latest[0]
            dropped = min(self._tokens[user], self._total - room)
            self._tokens[user] -= dropped
            self._total -= dropped
            if not self._tokens[user]:
                heappop(self._latest)
