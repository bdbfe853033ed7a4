"""Compiled loops on the threads that torch has already.

A second pool of threads next to torch's makes both slow: waiting threads spin, and on few cores they keep the other
pool's from theirs. Torch's products run on OpenMP, so our loops ask the very same OpenMP library for its threads.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_info


def run(worker: Any, data: int, num_threads: int) -> None:
    """Call `worker`, a Numba cfunc of one pointer, with `data` on `num_threads` threads at once, this one among them.

    Returns when all have returned. The workers share the work out among themselves.
    """
    if num_threads == 1:
        _call(worker, data)
    else:
        _parallel()(worker, data, num_threads)


@cache
def _parallel() -> Callable[[Any, int, int], None]:
    library = torchs_openmp()
    if library is None:
        return on_plain_threads
    start = library.GOMP_parallel
    start.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    start.restype = None

    def on_openmp(worker: Any, data: int, num_threads: int) -> None:
        start(worker.address, data, num_threads, 0)

    return on_openmp


def torchs_openmp() -> ctypes.CDLL | None:
    """The OpenMP library in this process that torch uses; None if it has no entry that we can call."""
    found = [Path(pool["filepath"]) for pool in threadpool_info() if pool["user_api"] == "openmp"]
    beside_torch = [path for path in found if Path(torch.__file__).parent.parent in path.parents]
    for path in beside_torch or found:
        library = ctypes.CDLL(str(path))
        if hasattr(library, "GOMP_parallel"):
            return library
    return None


def on_plain_threads(worker: Any, data: int, num_threads: int) -> None:
    """Call `worker` as `run` does, on threads of Python's own; slower, since these are started anew each time."""
    threads = [threading.Thread(target=_call, args=(worker, data)) for _ in range(num_threads - 1)]
    for thread in threads:
        thread.start()
    _call(worker, data)
    for thread in threads:
        thread.join()


def _call(worker: Any, data: int) -> None:
    function = worker.ctypes
    function(ctypes.cast(data, function.argtypes[0]))
