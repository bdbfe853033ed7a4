"""The memory of pools on the CPU asks for huge pages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from radixkv.memory.huge_pages import HUGE_PAGE_BYTES, prefer_huge_pages
from radixkv.memory.kv_pool import KVPool
from radixkv.memory.kv_shape import LayerKV

SMAPS = Path("/proc/self/smaps")
needs_huge_pages = pytest.mark.skipif(
    not SMAPS.exists() or not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="this system tells of no huge pages",
)


def flags_at(address: int) -> set[str]:
    """What the system says of the memory at `address`."""
    inside = False
    for line in SMAPS.read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and first == "VmFlags:":
            return set(rest.split())
    raise AssertionError("nothing is there")


@needs_huge_pages
def test_the_pages_of_a_pool_ask_for_huge_ones() -> None:
    pool = KVPool([LayerKV(2, 64, 64)], num_pages=2048, page_size=16, dtype=torch.float32)
    for pages in (*pool.k, *pool.v):
        assert pages.nbytes == 8 * HUGE_PAGE_BYTES
        assert "hg" in flags_at(pages.data_ptr() + pages.nbytes // 2)


@pytest.mark.parametrize("size", [0, 1, HUGE_PAGE_BYTES - 1])
def test_what_spans_no_huge_page_is_left_alone(size: int) -> None:
    tensor = torch.zeros(size, dtype=torch.uint8)
    prefer_huge_pages(tensor)
    assert not tensor.any()
