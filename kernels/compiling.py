"""A word to whoever waits while kernels are compiled."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

NOTICE_AFTER_S = 1.0  # loading from disk takes less

logger = logging.getLogger(__name__)


@contextmanager
def told_if_slow(what: str) -> Iterator[None]:
    """Say that `what` is being compiled, if what happens inside takes long."""
    message = "compiling %s for this processor: some seconds, once; later starts load them"
    timer = threading.Timer(NOTICE_AFTER_S, logger.warning, args=(message, what))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
