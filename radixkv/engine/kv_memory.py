"""The engine's KV: how many pages of which pools, the cache that lends them, and the backend that reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch

from radixkv.attention.backend import AttentionBackend, AttentionNeeds, BackendClass
from radixkv.attention.sharing_backend import make_sharing_backend, owning
from radixkv.attention.split_backend import make_split_backend, sees_window, split_needs
from radixkv.cache.prefix_cache import PrefixCache
from radixkv.cache.residency.window_pages import WindowPages
from radixkv.config import EngineConfig
from radixkv.engine.state_memory import make_state_memory
from radixkv.errors import ConfigError
from radixkv.memory.kv_pool import KVPool, kv_budget_of, num_pages_that_fit
from radixkv.memory.quantized_pool import kv_bytes_per_token, make_kv_pool
from radixkv.memory.split_pool import SplitKVPool
from radixkv.memory.state_pool import StatePool, StateShape

Pool: TypeAlias = "KVPool | SplitKVPool"

WINDOW_SHARE = 2  # one window page for so many pages, where nothing else is asked for
REMEMBERED = 16  # pages for each window page, where no layer sees everything: pages alone take no memory for KV


class PoolSizes(NamedTuple):
    """How many pages the cache has; and of window pages, or None if every layer keeps every page."""

    num_pages: int
    num_window_pages: int | None


class KVMemory(NamedTuple):
    """What belongs together."""

    pool: Pool
    cache: PrefixCache
    backend: AttentionBackend
    bytes_per_token: int  # of a token that every layer keeps
    sizes: PoolSizes
    states: StatePool | None = None  # where layers keep a state


class Sight(NamedTuple):
    """What the layers that see a window see: the last `window_tokens` tokens, and the first `sink_tokens`."""

    window_tokens: int
    sink_tokens: int

    @classmethod
    def of(cls, needs: AttentionNeeds) -> Sight | None:
        """The widest of all layers'; None if every layer sees everything."""
        params = [layer.params for layer in needs.layers if sees_window(layer.params)]
        if not params:
            return None
        windows = [min(size for size in (p.sliding_window, p.chunk_size) if size is not None) for p in params]
        return cls(max(windows), max(p.sink_tokens for p in params))


def make_kv_memory(
    backend_class: BackendClass,
    needs: AttentionNeeds,
    config: EngineConfig,
    *,
    context_tokens: int | None,
    scratch_pages: int,
    state_shapes: Sequence[StateShape] = (),
) -> KVMemory:
    """Pools of the sizes that `config` asks for, a cache and a backend over them.

    Layers that read the KV of another take no room.

    Args:
        context_tokens: prompt and output of one request at most, as far as the model says.
        scratch_pages: pages that the cache does not know.
        state_shapes: what layers keep of a sequence in place of KV. Layers that see a window keep all KV then.

    Raises: ConfigError.
    """
    if state_shapes:
        memory = _with_states(backend_class, owning(needs), config, state_shapes, scratch_pages)
    elif config.state_slots is not None:
        raise ConfigError("state_slots is for models with recurrent layers, and this one has none")
    else:
        memory = _of_owners(backend_class, owning(needs), config, context_tokens, scratch_pages)
    return memory._replace(backend=make_sharing_backend(needs.layers, memory.backend))


def _of_owners(
    backend_class: BackendClass,
    needs: AttentionNeeds,
    config: EngineConfig,
    context_tokens: int | None,
    scratch_pages: int,
) -> KVMemory:
    """The same where every layer keeps KV of its own."""
    sight = Sight.of(needs)
    sizes = pool_sizes(needs, sight, config, context_tokens)
    kept = [layer.kv for layer in needs.layers]
    bytes_per_token = kv_bytes_per_token(kept, needs.kv_dtype, needs.dtype)
    if sight is None or sizes.num_window_pages is None:
        pool = _pool(backend_class, needs, sizes.num_pages + scratch_pages)
        cache = PrefixCache(sizes.num_pages, config.page_size, config.eviction_policy, copy_page=pool.copy_page)
        return KVMemory(pool, cache, backend_class(pool, needs), bytes_per_token, sizes)
    windows = WindowPages(
        sizes.num_pages,
        num_window_pages=sizes.num_window_pages,
        page_size=config.page_size,
        window_tokens=sight.window_tokens,
        sink_tokens=sight.sink_tokens,
    )
    full_needs, window_needs = split_needs(needs)
    full = _pool(backend_class, full_needs, sizes.num_pages + scratch_pages) if full_needs.layers else None
    split = SplitKVPool(full, _pool(backend_class, window_needs, sizes.num_window_pages + 1), windows.window_page_of)
    cache = PrefixCache(
        sizes.num_pages, config.page_size, config.eviction_policy, copy_page=split.copy_page, residency=windows
    )
    backend = make_split_backend(
        needs,
        None if full is None else backend_class(full, full_needs),
        backend_class(split.window, window_needs),
        windows.window_page_of,
    )
    return KVMemory(split, cache, backend, bytes_per_token, sizes)


def _with_states(
    backend_class: BackendClass,
    needs: AttentionNeeds,
    config: EngineConfig,
    state_shapes: Sequence[StateShape],
    scratch_pages: int,
) -> KVMemory:
    if config.window_cache_tokens is not None:
        raise ConfigError(
            "window_cache_tokens is not for models with recurrent layers: their layers with a window keep all tokens"
        )
    kept = [layer.kv for layer in needs.layers]
    bytes_per_token = kv_bytes_per_token(kept, needs.kv_dtype, needs.dtype)
    states, slots = make_state_memory(state_shapes, config, bytes_per_token, needs.device)
    num_pages = _pages(config.kv_cache_tokens, config.page_size)
    if num_pages is None:
        num_pages = num_pages_that_fit(
            bytes_per_token,
            config.page_size,
            device=needs.device,
            mem_fraction=config.mem_fraction,
            taken_bytes=states.num_bytes,
        )
    pool = _pool(backend_class, needs, num_pages + scratch_pages)
    cache = PrefixCache(num_pages, config.page_size, config.eviction_policy, copy_page=pool.copy_page, residency=slots)
    return KVMemory(pool, cache, backend_class(pool, needs), bytes_per_token, PoolSizes(num_pages, None), states)


def pool_sizes(
    needs: AttentionNeeds, sight: Sight | None, config: EngineConfig, context_tokens: int | None
) -> PoolSizes:
    """How many pages and window pages there will be.

    Where some layers see everything, the cache has `kv_cache_tokens` of them, or what fits, and half as many window
    pages. Where none does, KV lies in window pages alone, and there are more pages, which remember what was cached.
    Without room for a request beside its window, window pages would bring nothing, and every layer keeps every page.

    Raises: ConfigError.
    """
    if sight is None and config.window_cache_tokens is not None:
        raise ConfigError("window_cache_tokens is for models with layers that see a window, and this one has none")
    full_needs, window_needs = split_needs(needs)
    full_bytes, window_bytes = (
        kv_bytes_per_token([layer.kv for layer in part.layers], needs.kv_dtype, needs.dtype) * config.page_size
        for part in (full_needs, window_needs)
    )
    asked = _pages(config.kv_cache_tokens, config.page_size)
    if sight is None:
        return PoolSizes(asked or _fitting(full_bytes, config, needs.device), None)
    least = WindowPages.least(config.page_size, sight.window_tokens, sight.sink_tokens)
    asked_window = _pages(config.window_cache_tokens, config.page_size)
    if asked_window is not None and asked_window < least:
        raise ConfigError(
            f"window_cache_tokens={config.window_cache_tokens} is too small: one request needs "
            f"{least * config.page_size} tokens for its window of {sight.window_tokens}"
        )
    if not full_needs.layers:
        num_window_pages = asked_window or asked or _fitting(window_bytes, config, needs.device)
        if num_window_pages < least:
            return PoolSizes(num_window_pages, None)
        return PoolSizes(_remembered(num_window_pages, config, context_tokens), num_window_pages)
    if asked is None:
        asked = _fitting_with_windows(
            full_bytes, window_bytes, asked_window or least, asked_window, config, needs.device
        )
    num_window_pages = asked_window or max(least, -(-asked // WINDOW_SHARE))
    return PoolSizes(asked, num_window_pages if num_window_pages < asked else None)


def _fitting_with_windows(
    full_bytes: int,
    window_bytes: int,
    least: int,
    asked_window: int | None,
    config: EngineConfig,
    device: torch.device,
) -> int:
    """Pages that fit beside their share of window pages, which is `asked_window`, or a half and `least` at least."""
    in_proportion = _fitting(full_bytes + -(-window_bytes // WINDOW_SHARE), config, device)
    if asked_window is None and in_proportion >= WINDOW_SHARE * least:
        return in_proportion
    left = kv_budget_of(device, config.mem_fraction) - least * window_bytes
    beside = max(0, left) // full_bytes
    return beside if beside > least else _fitting(full_bytes + window_bytes, config, device)


def _remembered(num_window_pages: int, config: EngineConfig, context_tokens: int | None) -> int:
    """Pages where none of them takes memory but for its number: enough for the longest context, too."""
    limits = [limit for limit in (context_tokens, config.max_context_tokens) if limit is not None]
    longest = _pages(min(limits), config.page_size) if limits else None
    return min(max(REMEMBERED * num_window_pages, longest or 0), (2**31 - 1) // config.page_size)


def _fitting(page_bytes: int, config: EngineConfig, device: torch.device) -> int:
    return num_pages_that_fit(
        -(-page_bytes // config.page_size), config.page_size, device=device, mem_fraction=config.mem_fraction
    )


def _pages(num_tokens: int | None, page_size: int) -> int | None:
    return None if num_tokens is None else -(-num_tokens // page_size)


def _pool(backend_class: BackendClass, needs: AttentionNeeds, num_pages: int) -> KVPool:
    return make_kv_pool(
        backend_class.layout(needs),
        [layer.kv for layer in needs.layers],
        kv_dtype=needs.kv_dtype,
        num_pages=num_pages,
        page_size=needs.page_size,
        dtype=needs.dtype,
        device=needs.device,
    )
