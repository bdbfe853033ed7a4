"""Where Numba keeps what it compiled, and log messages when compilation is slow."""

from __future__ import annotations

import logging
import os
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

import numba as nb

NOTICE_AFTER_S = 1.0  # loading from disk takes less

logger = logging.getLogger(__name__)

inner = nb.njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""Decorator of functions that only compiled code calls: without wrappers for Python there is less to compile."""


@cache
def can_cache() -> bool:
    """Whether Numba can keep compiled code on disk. Logs a warning, once, if it cannot.

    Numba tries the folder NUMBA_CACHE_DIR, `__pycache__` beside the source, and the user's cache folder, and raises a
    RuntimeError where a function is declared with `cache=True` and it can write to none of them.
    """
    try:
        nb.njit(cache=True)(_nothing)
    except RuntimeError as error:
        logger.warning(
            "compiled kernels cannot be kept on disk, so each process compiles its own: "
            "set NUMBA_CACHE_DIR to a writable folder (%s)",
            error,
        )
        return False
    return True


def kept_folder() -> Path | None:
    """Where what was measured on this machine can be kept: where Numba keeps compiled code. None if nowhere."""
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    folders = [Path(chosen)] if chosen else [Path(__file__).parent / "__pycache__", Path.home() / ".cache" / "radixkv"]
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    return None


def cache_depends_on(*modules: ModuleType) -> int:
    """A number that changes with the source of any of `modules`.

    Numba's cache on disk looks at a function's own file and at the values it closes over, not at other modules that the
    function's code comes from. A cached function that closes over this number is compiled anew when they change.
    """
    checksum = 0
    for module in modules:
        assert module.__file__ is not None, module
        checksum = zlib.crc32(Path(module.__file__).read_bytes(), checksum)
    return checksum


@contextmanager
def log_if_slow(what: str) -> Iterator[None]:
    """Log that `what` is being prepared if the body takes long."""
    message = "preparing %s for this processor; compiling them takes some seconds"
    if can_cache():
        message += ", and later starts load them"
    timer = threading.Timer(NOTICE_AFTER_S, logger.warning, args=(message, what))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _nothing() -> None:
    """A function for `can_cache` to declare; it is never compiled or called."""
