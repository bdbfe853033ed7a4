"""A page is copied and cleared through its tensors, whatever kind of pool holds it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from page_pools import NUM_PAGES, PAGE_SIZE, POOLS, fill, read
from radixkv.memory.page_pool import copy_tokens
from radixkv.memory.split_pool import SplitKVPool


@pytest.mark.parametrize("kind", POOLS)
@pytest.mark.parametrize("num_tokens", [0, 3, 4, 7, PAGE_SIZE])
def test_the_first_tokens_of_a_page_go_to_a_page_of_another_pool(kind: str, num_tokens: int) -> None:
    source, target = POOLS[kind](), POOLS[kind]()
    fill(source, 1, seed=1)
    fill(target, 2, seed=2)
    before = read(target, 2)
    copy_tokens(source.page_tensors(1), target.page_tensors(2), num_tokens)
    for copied, old, found in zip(read(source, 1), before, read(target, 2), strict=True):
        assert torch.equal(found, torch.cat([copied[:num_tokens], old[num_tokens:]]))


@pytest.mark.parametrize("kind", POOLS)
def test_the_tensors_of_a_page_hold_all_its_bytes_and_every_token_once(kind: str) -> None:
    pool = POOLS[kind]()
    tensors = pool.page_tensors(0)
    assert all(tensor.shape[0] * tensor.shape[1] == PAGE_SIZE for tensor in tensors)
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) * NUM_PAGES == pool.num_bytes


@pytest.mark.parametrize("kind", POOLS)
def test_a_cleared_page_is_zero_and_the_others_are_as_they_were(kind: str) -> None:
    pool = POOLS[kind]()
    fill(pool, 0, seed=1)
    fill(pool, 1, seed=2)
    before = read(pool, 1)
    pool.clear_page(0)
    assert all(not found.any() for found in read(pool, 0))
    assert all(torch.equal(found, old) for found, old in zip(read(pool, 1), before, strict=True))


def test_a_page_of_two_pools_is_copied_in_both_of_them() -> None:
    full, window = POOLS["values"](), POOLS["lanes"]()
    split = SplitKVPool(full, window, np.array([1, 0, 2, 2], np.int32))
    fill(full, 0, seed=1)
    fill(window, 1, seed=2)
    split.copy_page(0, 1, 5)
    for pool, source, target in ((full, 0, 1), (window, 1, 0)):
        for copied, found in zip(read(pool, source), read(pool, target), strict=True):
            assert torch.equal(found[:5], copied[:5])
    with pytest.raises(AssertionError, match="page 2 has no window page"):
        split.copy_page(0, 2, 5)
