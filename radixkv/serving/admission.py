"""Which requests may come in, and how many are inside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from radixkv.serving.errors import RETRY_AFTER_S, ApiError, shutting_down
from radixkv.serving.tenants import Tenant


class Admission:
    """Counts the requests that use the engine, and refuses what is too much. Belongs to the event loop's thread.

    >>> from radixkv.serving.tenants import ANYBODY
    >>> admission = Admission()
    >>> with admission.enter(ANYBODY):
    ...     admission.num_inside
    1
    >>> admission.num_inside
    0
    """

    def __init__(self) -> None:
        self._inside: Counter[str] = Counter()
        self._draining = False

    @property
    def num_inside(self) -> int:
        """Requests that have come in and not gone out."""
        return self._inside.total()

    @property
    def is_draining(self) -> bool:
        """Whether nothing more comes in."""
        return self._draining

    def drain(self) -> None:
        """Let nothing more come in."""
        self._draining = True

    @contextmanager
    def enter(self, tenant: Tenant) -> Iterator[None]:
        """Be inside. Raises: ApiError if the server drains, or the tenant has too many requests inside."""
        if self._draining:
            raise shutting_down()
        if tenant.max_requests is not None and self._inside[tenant.name] >= tenant.max_requests:
            raise ApiError(
                429,
                f"this key may have {tenant.max_requests} requests at once, and has them",
                code="too_many_requests",
                retry_after_s=RETRY_AFTER_S,
            )
        self._inside[tenant.name] += 1
        try:
            yield
        finally:
            self._inside[tenant.name] -= 1
