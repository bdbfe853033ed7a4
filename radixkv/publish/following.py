"""Follows a cache and the tiers below it: takes what they tell, and makes the events of it. Without I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack

from radixkv.cache.events import PageRun
from radixkv.cache.prefix_cache import PrefixCache
from radixkv.publish.event_queue import EventQueue
from radixkv.publish.mirror import HeldMirror
from radixkv.publish.tier_feed import TierFeed, TierWatch
from radixkv.publish.wire import WireEvent

BATCH_EVENTS = 256


class Following:
    """One queue for the pool, which the cache's thread fills, and one for each tier, which the threads of its store do.

    So no two threads ever put into the same queue at once, and none waits. All methods belong to the reader's thread,
    but for `__init__` and `stop`, which belong to that of the cache.

    Attributes:
        queue: of the pool.
        mirror: what the events that were taken say is held.
        is_lost: whether events of the pool were dropped, and what is cached did not come since.
    """

    def __init__(
        self,
        cache: PrefixCache,
        tiers: Mapping[str, TierWatch],
        *,
        epoch: int,
        max_queued: int,
        wake: Callable[[], object],
    ) -> None:
        """Begin with all that is cached. O(nodes).

        Args:
            tiers: by medium; what they hold is listed later, in the reader's thread.

        Raises: ConfigError if a tier is followed already; nothing is followed then.
        """
        self._cache = cache
        self.mirror = HeldMirror(cache.page_size, epoch, tiers)
        self.is_lost = False
        self._feeds: dict[str, TierFeed] = {}
        with ExitStack() as undo:
            for medium, watch in tiers.items():
                self._feeds[medium] = TierFeed(watch, max_queued, wake)
                undo.callback(self._feeds[medium].close)
            undo.pop_all()
        self.queue = EventQueue(self._cached_runs, max_queued, wake)
        self.queue.put_everything()
        cache.add_observer(self.queue)

    def _cached_runs(self) -> Iterator[PageRun]:
        return (run for _, run in self._cache.cached_runs())

    @property
    def is_behind(self) -> bool:
        """Whether something waits to be taken."""
        return len(self.queue) > 0 or any(map(len, self._feeds.values()))

    @property
    def is_stale(self) -> bool:
        """Whether a tier is to be listed that was busy: take again in a moment."""
        return any(feed.is_stale for feed in self._feeds.values())

    def fall_asleep(self) -> None:
        """Have `wake` called for whatever comes from now on; look at `is_behind` after this, then sleep."""
        self._set_sleeping(True)

    def wake_up(self) -> None:
        """Have it called no more."""
        self._set_sleeping(False)

    def _set_sleeping(self, is_sleeping: bool) -> None:
        self.queue.is_sleeping = is_sleeping
        for feed in self._feeds.values():
            feed.is_sleeping = is_sleeping

    def take(self) -> Iterator[Sequence[WireEvent]]:
        """The events of all that waits, some at a time; `mirror` follows. Send each before the next is taken."""
        while items := self.queue.take(BATCH_EVENTS):
            yield [event for item in items for event in self.mirror.apply(item)]
            self.is_lost = False
        if self.queue.num_dropped and not self.is_lost and not len(self.queue):
            self.is_lost = True
            yield self.mirror.lose(self.queue.num_dropped)
        for medium, feed in self._feeds.items():
            while changes := feed.take(BATCH_EVENTS):
                yield self.mirror.follow(medium, changes)

    def list_stale(self) -> Iterator[Sequence[WireEvent]]:
        """The events that bring what is told of tiers in line with what they hold, where changes were lost."""
        for medium, feed in self._feeds.items():
            if feed.is_stale and (pages := feed.list_anew()) is not None:
                yield self.mirror.replace(medium, pages)

    def stop(self) -> None:
        """Follow no more; what has come can still be taken. Waits for nothing. Idempotent."""
        self._cache.remove_observer(self.queue)
        self.abandon()

    def abandon(self) -> None:
        """The reader ends: let nothing gather any more."""
        self.queue.is_closed = True
        for feed in self._feeds.values():
            feed.close()
