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
    library = _torchs_openmp()
    if library is None:
        return _on_plain_threads
    start = library.GOMP_parallel
    start.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    start.restype = None

    def on_openmp(worker: Any, data: int, num_threads: int) -> None:
        start(worker.address, data, num_threads, 0)

    return on_openmp


def _torchs_openmp() -> ctypes.CDLL | None:
    """The OpenMP library in this process that torch uses; None if it is not of a kind that we can call."""
    torch.get_num_threads()  # torch is loaded for certain
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    loaded = {line.split(maxsplit=5)[5] for line in maps.read_text().splitlines() if line.count("/") > 1}
    names = ("libgomp", "libiomp5", "libomp")
    found = [path for path in sorted(loaded) if Path(path).name.startswith(names)]
    torchs = [path for path in found if Path(torch.__file__).parent.parent in Path(path).parents] or found
    for path in torchs:
        library = ctypes.CDLL(path)
        if hasattr(library, "GOMP_parallel"):
            return library
    return None


def _on_plain_threads(worker: Any, data: int, num_threads: int) -> None:
    threads = [threading.Thread(target=_call, args=(worker, data)) for _ in range(num_threads - 1)]
    for thread in threads:
        thread.start()
    _call(worker, data)
    for thread in threads:
        thread.join()


def _call(worker: Any, data: int) -> None:
    function = worker.ctypes
    function(ctypes.cast(data, function.argtypes[0]))
