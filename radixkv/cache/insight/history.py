"""What was evicted, when and why: a bounded memory that explains misses."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import deque
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.namespace import Namespace
from radixkv.config.checks import checked_int

_PAGES_A_NODE = 8  # as many as must have been evicted at a time, for the history to remember all it has room for
_SLOTS_A_PAGE = 4  # at least: the more, the fewer pages that were never evicted share a slot with one that was
_GAPS_AN_AGE = 64  # how many times the distance between two remembered ticks fits into their age


class Eviction(NamedTuple):
    """What became of a page that is not cached any more, and of those that followed it.

    Attributes:
        num_pages: leading pages of those asked about that were all evicted, by this eviction or others.
        policy: the eviction policy that chose them.
        evicted_at_s: on the clock of whoever recorded it; as `last_used_at_s`, which is None where it was not known.
        evicted_tick: in uses of the cache; as `last_use_tick`.
    """

    num_pages: int
    policy: str
    evicted_at_s: float
    last_used_at_s: float | None
    evicted_tick: int
    last_use_tick: int

    @property
    def unused_s(self) -> float | None:
        """Seconds between the last use and the eviction; None if the last use was not timed."""
        return None if self.last_used_at_s is None else self.evicted_at_s - self.last_used_at_s

    @property
    def unused_ticks(self) -> int:
        """Uses of the cache between the last use and the eviction."""
        return self.evicted_tick - self.last_use_tick


class _Node(NamedTuple):
    """One eviction: the place of its first page among all pages ever recorded, whose pages they were, and what
    `Eviction` tells of it.
    """

    first_page: int
    namespace: Namespace
    policy: str
    evicted_at_s: float
    last_used_at_s: float | None
    evicted_tick: int
    last_use_tick: int


class EvictionHistory:
    """The prefix hashes of the pages evicted last ("ghosts"), and what evicted them.

    Remembers the last `capacity_pages` pages, or fewer if they were evicted less than 8 at a time: the last
    `capacity_pages / 8` evictions. Memory: 8 bytes a page, 16 to 32 to find it by, and some 340 an eviction, so at most
    82 bytes for each page of `capacity_pages`. A ghost is a 64-bit `prefix_hashes`: one of a million is mistaken for
    another page with a probability of about 5e-14 a question. Users can make prompts whose hashes collide, so each
    ghost also remembers its namespace, and `find` answers from one namespace alone.

    >>> history = EvictionHistory(capacity_pages=1000)
    >>> page_hashes, tenant = np.array([11, 12, 13], np.uint64), ("tenant", None)           # by `prefix_hashes`
    >>> history.record(
    ...     page_hashes, tenant, policy="lru", evicted_at_s=9.0, last_used_at_s=4.0, evicted_tick=7, last_use_tick=2
    ... )
    >>> found = history.find(np.array([12, 13, 99], np.uint64), tenant)
    >>> found.num_pages, found.policy, found.unused_s, found.unused_ticks
    (2, 'lru', 5.0, 5)
    """

    def __init__(self, capacity_pages: int) -> None:
        """Raises: ConfigError unless `capacity_pages` is an integer of at least 1."""
        self.capacity_pages = capacity_pages = checked_int("capacity_pages", capacity_pages, 1)
        self._hashes = np.zeros(capacity_pages, np.uint64)  # page i of all pages ever recorded lies in i % capacity
        num_slots = 1 << (_SLOTS_A_PAGE * capacity_pages - 1).bit_length()
        self._slots = np.full(num_slots, -1, np.int32)  # by a hash's last bits: where the newest page of these lies
        self._num_recorded = 0
        self._nodes: deque[_Node] = deque(maxlen=-(-capacity_pages // _PAGES_A_NODE))

    def __len__(self) -> int:
        """How many pages it remembers."""
        return self._num_recorded - self._oldest_page

    @property
    def num_nodes(self) -> int:
        """How many evicted nodes the pages that it remembers were in."""
        return len(self._nodes)

    def record(
        self,
        hashes: NDArray[np.uint64],
        namespace: Namespace,
        *,
        policy: str,
        evicted_at_s: float,
        last_used_at_s: float | None,
        evicted_tick: int,
        last_use_tick: int,
    ) -> None:
        """The pages of one node were evicted. O(pages).

        `hashes`: the prefix hashes of its pages, shape (pages,), in order.
        """
        self._nodes.append(
            _Node(self._num_recorded, namespace, policy, evicted_at_s, last_used_at_s, evicted_tick, last_use_tick)
        )
        self._num_recorded += len(hashes)
        kept = hashes[-self.capacity_pages :]
        start = (self._num_recorded - len(kept)) % self.capacity_pages
        before_wrap = min(len(kept), self.capacity_pages - start)
        self._hashes[start : start + before_wrap] = kept[:before_wrap]
        self._hashes[: len(kept) - before_wrap] = kept[before_wrap:]
        places = np.arange(start, start + len(kept)) % self.capacity_pages
        self._slots[(kept & np.uint64(len(self._slots) - 1)).astype(np.int64)] = places
        while len(self._nodes) > 1 and self._nodes[1].first_page <= self._num_recorded - self.capacity_pages:
            self._nodes.popleft()

    def find(self, hashes: NDArray[np.uint64], namespace: Namespace) -> Eviction | None:
        """The last eviction of the page `hashes[0]`, and how many of the pages after it are gone too.

        `hashes`: the prefix hashes of a prompt's pages from where its match ended. None if the first of them was never
        evicted, or so long ago that it is forgotten. O(1) for each eviction that took some of them, and in about one of
        four questions, in which hashes share a slot, O(capacity_pages).
        """
        page = self._last_page(hashes[0], namespace) if len(hashes) else None
        if page is None:
            return None
        node = self._nodes[self._index_of_node(page)]
        return Eviction(self._count_leading(hashes, namespace), *node[2:])

    def clear(self) -> None:
        """Forget everything."""
        self._num_recorded = 0
        self._slots.fill(-1)
        self._nodes.clear()

    def _last_page(self, page_hash: np.uint64, namespace: Namespace) -> int | None:
        """The newest of the namespace's remembered pages of that hash."""
        slot = int(page_hash) & len(self._slots) - 1
        place = int(self._slots[slot])
        if place < 0 or int(self._hashes[place]) & len(self._slots) - 1 != slot:
            return None  # none of the slot, or its newest page was overwritten, and so were all before it
        newest = self._num_recorded - 1 - (self._num_recorded - 1 - place) % self.capacity_pages
        if newest < self._oldest_page:
            return None
        if self._hashes[place] == page_hash and self._nodes[self._index_of_node(newest)].namespace == namespace:
            return newest
        places = np.flatnonzero(self._hashes == page_hash)
        pages = self._num_recorded - 1 - (self._num_recorded - 1 - places) % self.capacity_pages
        for page in np.sort(pages[pages >= self._oldest_page])[::-1].tolist():
            if self._nodes[self._index_of_node(page)].namespace == namespace:
                return int(page)
        return None

    def _index_of_node(self, page: int) -> int:
        """Which of `_nodes` the remembered `page` was in. O(log evictions)."""
        return bisect_right(self._nodes, page, key=lambda node: node.first_page) - 1

    def _count_leading(self, hashes: NDArray[np.uint64], namespace: Namespace) -> int:
        """How many of `hashes` come before the first that is not remembered."""
        count = 0
        while count < len(hashes):
            page = self._last_page(hashes[count], namespace)
            if page is None:
                break
            following = self._index_of_node(page) + 1
            node_end = self._nodes[following].first_page if following < len(self._nodes) else self._num_recorded
            rest = hashes[count : count + node_end - page]  # what one eviction took lies in one piece
            differs = self._hashes[np.arange(page, page + len(rest)) % self.capacity_pages] != rest
            count += int(differs.argmax()) if differs.any() else len(rest)
        return count

    @property
    def _oldest_page(self) -> int:
        """The first page that is remembered: neither overwritten nor of a node that was let go."""
        oldest_node = self._nodes[0].first_page if self._nodes else self._num_recorded
        return max(oldest_node, self._num_recorded - self.capacity_pages)


class Timeline:
    """When each tick of the cache was, in clock seconds, the better remembered the more recent.

    Between two ticks it remembers, time is taken to run evenly. They lie no further apart than 1/64 of their age in
    ticks, or than they were added. Memory: 16 bytes a remembered tick, about 256 * ln(ticks) of them at most: 60 kB
    after a million.

    >>> timeline = Timeline()
    >>> for tick, now_s in [(10, 100.0), (20, 101.0), (30, 105.0)]:
    ...     timeline.add(tick, now_s)
    >>> timeline.seconds_at(15), timeline.seconds_at(30), timeline.seconds_at(9)
    (100.5, 105.0, None)
    """

    def __init__(self) -> None:
        self._ticks = array("q")
        self._seconds = array("d")
        self._thin_at = _GAPS_AN_AGE

    def __len__(self) -> int:
        """How many ticks it remembers."""
        return len(self._ticks)

    def copy(self) -> Timeline:
        """What it remembers now, for another thread. O(remembered), and quick."""
        copied = Timeline()
        copied._ticks, copied._seconds, copied._thin_at = self._ticks[:], self._seconds[:], self._thin_at
        return copied

    def add(self, tick: int, now_s: float) -> None:
        """`tick`, later than all before, is `now_s`. O(1), amortised."""
        assert not self._ticks or tick > self._ticks[-1], (tick, self._ticks[-1])
        self._ticks.append(tick)
        self._seconds.append(now_s)
        if len(self) > self._thin_at:
            self._thin()
            self._thin_at = max(2 * len(self), _GAPS_AN_AGE)

    def seconds_at(self, tick: int) -> float | None:
        """When `tick` was; None before the first tick added, the time of the last one after it. O(log remembered)."""
        after = bisect_right(self._ticks, tick)
        if after == 0:
            return None
        if after == len(self):
            return self._seconds[-1]
        (tick_0, tick_1), (then_0, then_1) = self._ticks[after - 1 : after + 1], self._seconds[after - 1 : after + 1]
        return then_0 + (then_1 - then_0) * (tick - tick_0) / (tick_1 - tick_0)

    def _thin(self) -> None:
        """Drop each tick between whose neighbours no more than 1/64 of their age lies; keep the first and the last."""
        ticks, now = self._ticks, self._ticks[-1]
        kept = [0]
        for i in range(1, len(ticks) - 1):
            gap, age = ticks[i + 1] - ticks[kept[-1]], now - ticks[i + 1]
            if gap * _GAPS_AN_AGE > age:
                kept.append(i)
        kept.append(len(ticks) - 1)
        self._ticks = array("q", [ticks[i] for i in kept])
        self._seconds = array("d", [self._seconds[i] for i in kept])
