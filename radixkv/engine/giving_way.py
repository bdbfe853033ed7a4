"""Which request gives its pages back when there are too few, and who may ask for it."""

from __future__ import annotations

from collections.abc import Callable

from radixkv.cache.namespace import Namespace
from radixkv.cache.prefix_cache import PrefixCache
from radixkv.engine.request import Request


class GivingWay:
    """Chooses among the requests that hold pages: `running` and `loading`, which the scheduler keeps up to date.

    Of those that run the oldest never gives way to others, so there is always progress. With quotas a request takes
    pages from its own namespace and from those whose requests hold more than their namespace is guaranteed. That
    suffices: no request is accepted that needs more than the pool has beside what others are guaranteed.
    """

    def __init__(self, cache: PrefixCache, running: list[Request], loading: list[Request]) -> None:
        self._cache, self._running, self._loading = cache, running, loading

    def cheapest(self) -> Request:
        """One that loads; else of all running requests but the oldest, the one with the fewest tokens of its own."""
        found = self._cheapest(lambda request: True)
        if found is None:  # pages are leased by somebody outside: end it rather than wait for what may never come
            return self._oldest()
        return found

    def cheapest_for(self, asker: Request) -> Request:
        """As `cheapest`, of those from which `asker`, which runs and needs a page, may take one; perhaps itself."""
        shares = self._cache.shares
        if shares is None:
            return self.cheapest()
        own = _namespace(asker)
        found = self._cheapest(
            lambda request: shares.would_pin_too_much(
                _namespace(request), int(shares.are_one(own, _namespace(request)))
            )
        )
        if found is not None:
            return found
        own_only = self._cheapest(lambda request: shares.are_one(own, _namespace(request)))
        return self._oldest() if own_only is None else own_only

    def cheapest_beyond_quota(self) -> Request | None:
        """As `cheapest`, of those whose namespace's requests hold more than it is guaranteed; None if there is none."""
        shares = self._cache.shares
        assert shares is not None, "a cache without quotas"
        return self._cheapest(lambda request: shares.would_pin_too_much(_namespace(request)))

    def can_claim(self, request: Request, cached_tokens: int) -> bool:
        """Whether a waiting request runs within what its namespace is guaranteed, so that others must make room."""
        shares = self._cache.shares
        if shares is None:
            return False
        namespace = _namespace(request)
        if shares.would_pin_too_much(namespace, 1):  # as of most that wait where it matters
            return False
        num_pages = self._cache.pages_for(request.num_tokens)
        return shares.can_claim(namespace, request.findable_ids, cached_tokens, num_pages)

    def spare_pages(self, request: Request) -> int:
        """A page for each request that holds pages and could take its next one from `request` if that started, too."""
        holders = [*self._running, *self._loading]
        shares = self._cache.shares
        if shares is None:
            return len(holders)
        own = _namespace(request)
        names = [_namespace(holder) for holder in holders]
        return sum(shares.are_one(own, name) or shares.would_pin_too_much(name) for name in names)

    def _oldest(self) -> Request:
        return min(self._running, key=lambda request: request.id)

    def _cheapest(self, may: Callable[[Request], bool]) -> Request | None:
        loading = [request for request in self._loading if may(request)]
        if loading:
            return loading[-1]
        oldest = self._oldest() if self._running else None
        running = [request for request in self._running if request is not oldest and may(request)]
        return min(running, key=lambda request: (_own_tokens(request), -request.id), default=None)


def _namespace(request: Request) -> Namespace:
    return request.cache_options.namespace


def _own_tokens(request: Request) -> int:
    """Tokens that it computed itself."""
    assert request.lease is not None, request
    return request.num_computed - request.lease.cached_tokens
