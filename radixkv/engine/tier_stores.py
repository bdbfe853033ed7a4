"""Opens the stores that an engine's settings ask for."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from transformers import PreTrainedModel

from radixkv.config import GB, EngineConfig
from radixkv.engine.beside_pages import pool_bytes
from radixkv.engine.kv_memory import Pool
from radixkv.errors import ConfigError
from radixkv.memory.kv_identity import kv_identity, weight_tensors
from radixkv.memory.kv_pool import KVPool
from radixkv.memory.page_bytes import PageBytes
from radixkv.memory.split_pool import SplitKVPool
from radixkv.memory.state_bytes import StateBytes
from radixkv.memory.state_pool import StatePool
from radixkv.publish.wire import TIERS
from radixkv.tiers.disk_store import DiskStore
from radixkv.tiers.fingerprint import Fingerprint, hash_files, hash_tensors
from radixkv.tiers.memory_store import HostStore
from radixkv.tiers.page_store import PageStore
from radixkv.tiers.page_watch import PageWatch
from radixkv.tiers.shared_store import SharedStore
from radixkv.tiers.store_folder import weights_cache


def asks_for_tiers(config: EngineConfig) -> bool:
    """Whether there is to be anything below the pool."""
    return config.disk_cache is not None or config.host_cache_gb is not None or config.shared_cache is not None


def hash_weights(model: PreTrainedModel, weight_files: Sequence[Path], config: EngineConfig) -> str:
    """The content of the files that a model was loaded from, or of all its tensors if there are none. O(bytes).

    Hashes of files are remembered in the folder `disk_cache`, so that each is read once. Raises: TierError.
    """
    if not weight_files:
        return hash_tensors(weight_tensors(model))
    return hash_files(weight_files, cache=None if config.disk_cache is None else weights_cache(config.disk_cache))


def make_stores(
    config: EngineConfig, model: PreTrainedModel, pool: Pool, weights: str, states: StatePool | None = None
) -> tuple[PageStore, ...]:
    """The stores that `config` asks for, the fastest first.

    Args:
        weights: as `hash_weights` gives them.
        states: those of recurrent layers, which go down with the pages.

    Raises: ConfigError if a setting is for other devices; TierError if a store
        cannot be opened.
    """
    if not asks_for_tiers(config):
        return ()
    if isinstance(pool, SplitKVPool) and config.tier_writes == "back":
        raise ConfigError(
            'tier_writes must be "through" or "selective" for models with layers that see a window, not "back": window '
            "pages are given up before the pages that they belong to"
        )
    kept = pool if isinstance(pool, KVPool) else pool.full or pool.window  # of all of which kind and page size are one
    page_bytes = pool_bytes(pool)
    payload_bytes = page_bytes.payload_bytes
    identity = kv_identity(model, kept)
    if states is not None:
        identity = identity._replace(layout=f"{identity.layout}; states {StateBytes(states, payload_bytes).layout}")
    if isinstance(pool, SplitKVPool):
        identity = identity._replace(layout=f"{page_bytes.layout}; windows {PageBytes(pool.window).layout}")
    fingerprint = Fingerprint(weights=weights, **identity._asdict())
    with ExitStack() as undo:
        stores: list[PageStore] = []
        if config.host_cache_gb is not None:
            if kept.device.type == "cpu":
                raise ConfigError(
                    f"host_cache_gb={config.host_cache_gb} is for engines on a GPU; on the CPU the pool is host memory "
                    "itself, so raise kv_cache_tokens"
                )
            host = HostStore(kept.page_size, payload_bytes, int(config.host_cache_gb * GB))
            stores.append(host)
        if config.disk_cache is not None:
            disk = DiskStore(config.disk_cache, fingerprint, payload_bytes, int(config.disk_cache_gb * GB))
            undo.callback(disk.close)
            stores.append(disk)
        if config.shared_cache is not None:
            shared = SharedStore(config.shared_cache, fingerprint, payload_bytes)
            undo.callback(shared.close)
            stores.append(shared)
        undo.pop_all()
    return tuple(stores)


def watches(stores: Sequence[PageStore]) -> dict[str, PageWatch]:
    """How to follow what is below the pool and this engine's own, by the medium that events call it."""
    return {TIERS[store.name]: store.watch for store in stores if isinstance(store, HostStore | DiskStore)}
