"""What goes down to the tiers: pages of a cache, and beside them states of recurrent layers, or window pages."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

from radixkv.cache.lease import Lease
from radixkv.cache.prefix_cache import PrefixCache
from radixkv.engine.kv_memory import Pool
from radixkv.memory.blank_pages import BlankPages
from radixkv.memory.page_bytes import PageBytes
from radixkv.memory.split_pool import SplitKVPool
from radixkv.memory.state_bytes import StateBytes
from radixkv.memory.state_pool import StatePool
from radixkv.memory.window_bytes import WindowBytes
from radixkv.tiers.prefix_load import LoadChooser, PrefixLoad
from radixkv.tiers.state_load import StateLoadChooser
from radixkv.tiers.state_parts import StateParts
from radixkv.tiers.window_load import WindowLoadChooser

BesidePages: TypeAlias = "StateBytes | WindowBytes"
"""Bytes of what a hit needs besides pages, in parts of a page's size."""


PoolBytes: TypeAlias = "PageBytes | BlankPages"
"""Bytes of what a pool keeps of every page."""


def pool_bytes(pool: Pool) -> PoolBytes:
    """How the pages of a pool go to stores, but for what is beside them."""
    if isinstance(pool, SplitKVPool):
        return BlankPages(pool) if pool.full is None else PageBytes(pool.full)
    return PageBytes(pool)


def beside_pages(pool: Pool, cache: PrefixCache, states: StatePool | None, part_bytes: int) -> BesidePages | None:
    """What hits of a cache need besides pages; None if they need nothing."""
    if states is not None:
        return StateBytes(states, part_bytes)
    if isinstance(pool, SplitKVPool):
        return WindowBytes(pool, part_bytes, cache.sight_tokens)
    return None


def load_chooser(
    beside: BesidePages | None, page_size: int, clock: Callable[[], float] = time.monotonic
) -> LoadChooser:
    """Finds where hits can end that are loaded."""
    if beside is None:
        return LoadChooser(page_size, clock)
    parts = StateParts(page_size, beside.num_parts)
    if isinstance(beside, StateBytes):
        return StateLoadChooser(parts, clock)
    return WindowLoadChooser(parts, beside.window_tokens, clock)


def fill_beside(
    beside: BesidePages, lease: Lease, load: PrefixLoad, number: int, parts: Sequence[bytes], page_size: int
) -> None:
    """Put parts that were loaded where `lease` needs them, from part `number` of the load on. O(bytes)."""
    if isinstance(beside, StateBytes):
        _, slot = lease.state_slots()
        beside.write(slot, number, parts)
        return
    held = load.held_parts
    first = (number - len(held)) // beside.num_parts  # of the pages whose parts are loaded
    held += parts
    num_pages = len(held) // beside.num_parts
    first += -(-load.last_token // page_size) - load.num_parts // beside.num_parts
    beside.write(lease.pages[first : first + num_pages], held[: num_pages * beside.num_parts])
    del held[: num_pages * beside.num_parts]
