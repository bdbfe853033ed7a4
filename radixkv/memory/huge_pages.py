"""Memory of the CPU in huge pages, where the system gives them to who asks."""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from typing import Any

from torch import Tensor

HUGE_PAGE_BYTES = 2 << 20  # on x86-64, and on aarch64 with pages of 4 KiB


def prefer_huge_pages(tensor: Tensor) -> None:
    """Ask the system to keep `tensor`, contiguous and of the CPU, in huge pages as far as it spans whole ones.

    Fresh memory then comes in pieces of 2 MiB instead of 4 KiB, each of which would stop the first write to it, and
    reading pages in any order misses fewer addresses. Linux does so where `transparent_hugepage/enabled` is "madvise",
    its default in most distributions, or "always"; elsewhere nothing happens, and memory is committed as it is used
    either way.
    """
    advise = _madvise()
    start = -(-tensor.data_ptr() // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    end = (tensor.data_ptr() + tensor.nbytes) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    if advise is not None and tensor.device.type == "cpu" and end > start:
        advise(start, end - start, mmap.MADV_HUGEPAGE)  # only advice: where it is not taken, the result says why


@cache
def _madvise() -> Any:
    """The system's function; None where there is none."""
    if not sys.platform.startswith("linux") or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
