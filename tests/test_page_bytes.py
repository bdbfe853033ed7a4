"""Pages become bytes and come back the same, in every kind of pool."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from page_pools import NUM_PAGES, PAGE_SIZE, POOLS, fill, read
from radixkv.memory.page_bytes import PageBytes


@pytest.mark.parametrize("kind", POOLS)
def test_the_bytes_of_pages_fill_pages_of_another_pool(kind: str) -> None:
    source, target = POOLS[kind](), POOLS[kind]()
    for page in range(NUM_PAGES):
        fill(source, page, seed=page)
        fill(target, page, seed=10 + page)
    untouched = read(target, 1)
    payloads = PageBytes(source).read(np.array([2, 0], np.int32))
    assert payloads.shape == (2, PageBytes(source).payload_bytes)
    assert payloads.size * NUM_PAGES == 2 * source.num_bytes
    PageBytes(target).write(np.array([0, 2], np.int32), [payload.tobytes() for payload in payloads])
    for page, came_from in ((0, 2), (2, 0)):
        assert all(map(torch.equal, read(target, page), read(source, came_from)))
    assert all(map(torch.equal, read(target, 1), untouched))


@pytest.mark.parametrize("kind", POOLS)
@pytest.mark.parametrize("num_tokens", [1, 3, 4, 7, PAGE_SIZE])
def test_what_lies_after_the_tokens_of_a_last_page_is_zero(kind: str, num_tokens: int) -> None:
    """It may be another request's: nothing of it leaves the pool."""
    pool, emptied = POOLS[kind](), POOLS[kind]()
    for page in range(NUM_PAGES):
        fill(pool, page, seed=page)
        emptied.clear_page(page)
    payloads = PageBytes(pool).read(np.array([0, 1], np.int32), last_tokens=num_tokens)
    PageBytes(emptied).write(np.array([0, 1], np.int32), [payload.tobytes() for payload in payloads])
    for found, whole in zip(emptied.page_tensors(1), pool.page_tensors(1), strict=True):
        flat, expected = found.flatten(0, 1), whole.flatten(0, 1)
        assert torch.equal(flat[:num_tokens], expected[:num_tokens])
        assert not flat[num_tokens:].any()
    assert all(map(torch.equal, read(emptied, 0), read(pool, 0)))


@pytest.mark.parametrize("kind", POOLS)
def test_the_way_of_other_devices_gives_the_same_bytes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There pages are gathered and scattered by tensors, not copied through memory views."""
    source, target = POOLS[kind](), POOLS[kind]()
    for page in range(NUM_PAGES):
        fill(source, page, seed=page)
        fill(target, page, seed=10 + page)
    untouched = read(target, 1)
    pages = np.array([2, 0], np.int32)
    reading, writing = PageBytes(source), PageBytes(target)
    expected = [reading.read(pages), reading.read(pages, last_tokens=3)]
    for page_bytes in (reading, writing):
        monkeypatch.setattr(page_bytes, "_views", None)
    assert np.array_equal(reading.read(pages), expected[0])
    assert np.array_equal(reading.read(pages, last_tokens=3), expected[1])
    assert reading.read(pages[:0]).shape == (0, reading.payload_bytes)
    writing.write(np.array([0, 2], np.int32), [payload.tobytes() for payload in expected[0]])
    for page, came_from in ((0, 2), (2, 0)):
        assert all(map(torch.equal, read(target, page), read(source, came_from)))
    assert all(map(torch.equal, read(target, 1), untouched))
