"""How tiers end, whatever becomes of what they belong to: closed, dropped, or alive at the end of the process."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Sequence
from typing import Protocol

from radixkv.tiers.tier import Tier
from radixkv.tiers.warm_start import WarmStart

CLOSE_TIMEOUT_S = 10.0  # what is not written by then is lost


class Closes(Protocol):
    """What tiers belong to."""

    def close(self) -> None:
        """Write what is left, and close the stores."""
        ...


class Ending:
    """Closes `owner` at the end of the process; if it is dropped before, its tiers end by themselves.

    Nothing here holds `owner`; `tiers` and `warm_starts` may still change.
    """

    def __init__(self, owner: Closes, tiers: Sequence[Tier], warm_starts: Sequence[WarmStart] = ()) -> None:
        self._owner = weakref.ref(owner)
        self._finalizer = weakref.finalize(owner, _leave, tiers, warm_starts)
        self._finalizer.atexit = False  # `close_at_exit` waits for the writers then
        _OPEN.add(owner)

    def is_done(self) -> None:
        """The owner was closed. Idempotent."""
        self._finalizer.detach()
        owner = self._owner()
        if owner is not None:
            _OPEN.discard(owner)


_OPEN: weakref.WeakSet[Closes] = weakref.WeakSet()
_LEFT: weakref.WeakSet[Tier] = weakref.WeakSet()  # of owners that were dropped without `close`; they end by themselves


def _leave(tiers: Sequence[Tier], warm_starts: Sequence[WarmStart]) -> None:
    """An owner was dropped: let its tiers end. Waits for nothing, as finalisers run anywhere."""
    for start in warm_starts:
        start.stop()
    for tier in tiers:
        tier.leave()
        _LEFT.add(tier)


@atexit.register
def close_at_exit() -> None:
    """At the end of the process write what was handed down, also of owners that nobody closed."""
    for owner in list(_OPEN):
        owner.close()
    for tier in list(_LEFT):
        tier.wait(CLOSE_TIMEOUT_S)
