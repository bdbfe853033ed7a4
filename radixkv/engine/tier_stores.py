"""Opens the stores that an engine's settings ask for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from transformers import PreTrainedModel

from radixkv.config import EngineConfig
from radixkv.errors import ConfigError
from radixkv.memory.kv_pool import KVPool
from radixkv.memory.page_bytes import PageBytes
from radixkv.memory.page_pool import PagePool
from radixkv.tiers.disk_store import DiskStore
from radixkv.tiers.fingerprint import Fingerprint, hash_files, hash_tensors
from radixkv.tiers.memory_store import HostStore
from radixkv.tiers.page_store import PageStore
from radixkv.tiers.shared_store import SharedStore
from radixkv.tiers.store_folder import weights_cache

GB = 1_000_000_000
NOT_OF_KV = {"_name_or_path", "architectures", "transformers_version", "torch_dtype", "dtype", "use_cache", "id2label"}
"""Fields of a model's config that change no KV; all others are part of the fingerprint."""


def asks_for_tiers(config: EngineConfig) -> bool:
    """Whether there is to be anything below the pool."""
    return config.disk_cache is not None or config.host_cache_gb is not None or config.shared_cache is not None


def hash_weights(model: PreTrainedModel, weight_files: Sequence[Path], config: EngineConfig) -> str:
    """The content of the files that a model was loaded from, or of all its tensors if there are none. O(bytes).

    Hashes of files are remembered in the folder `disk_cache`, so that each is read once. Raises: TierError.
    """
    if not weight_files:
        return hash_tensors(_tensors(model))
    return hash_files(weight_files, cache=None if config.disk_cache is None else weights_cache(config.disk_cache))


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, str, Sequence[int], memoryview]]:
    for name, tensor in model.state_dict().items():
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        yield name, str(tensor.dtype), tuple(tensor.shape), memoryview(content)


def make_stores(config: EngineConfig, model: PreTrainedModel, pool: PagePool, weights: str) -> tuple[PageStore, ...]:
    """The stores that `config` asks for, the fastest first.

    Args:
        weights: as `hash_weights` gives them.

    Raises: ConfigError if the pool's pages cannot be stored, or a setting is for other devices; TierError if a store
        cannot be opened.
    """
    if not asks_for_tiers(config):
        return ()
    kept = storable(pool)
    _check_no_adapters(model)
    page_bytes = PageBytes(kept)
    with ExitStack() as undo:
        stores: list[PageStore] = []
        if config.host_cache_gb is not None:
            if kept.device.type == "cpu":
                raise ConfigError(
                    f"host_cache_gb={config.host_cache_gb} is for engines on a GPU; on the CPU the pool is host memory "
                    "itself, so raise kv_cache_tokens"
                )
            host = HostStore(kept.page_size, page_bytes.payload_bytes, int(config.host_cache_gb * GB))
            stores.append(host)
        fingerprint = _fingerprint(model, kept, page_bytes, weights)
        if config.disk_cache is not None:
            disk = DiskStore(config.disk_cache, fingerprint, page_bytes.payload_bytes, int(config.disk_cache_gb * GB))
            undo.callback(disk.close)
            stores.append(disk)
        if config.shared_cache is not None:
            shared = SharedStore(config.shared_cache, fingerprint, page_bytes.payload_bytes)
            undo.callback(shared.close)
            stores.append(shared)
        undo.pop_all()
    return tuple(stores)


def storable(pool: PagePool) -> KVPool:
    """`pool`, if its pages can be kept in a store. Raises: ConfigError."""
    if not isinstance(pool, KVPool):
        raise ConfigError(
            "disk_cache, host_cache_gb and shared_cache are for models whose layers keep every token; this one has "
            "layers that see a window. Set window_cache_tokens to the value of kv_cache_tokens to let them keep all"
        )
    return pool


def _check_no_adapters(model: PreTrainedModel) -> None:
    """Adapters have numbers that are no tensors, and can be switched: the fingerprint would not tell them apart."""
    if any(type(module).__module__.partition(".")[0] == "peft" for module in model.modules()):
        raise ConfigError(
            "disk_cache, host_cache_gb and shared_cache are for models without adapters; merge these into the weights"
        )


def _fingerprint(model: PreTrainedModel, pool: KVPool, page_bytes: PageBytes, weights: str) -> Fingerprint:
    config = model.config.get_text_config().to_dict()
    computing = {name: value for name, value in config.items() if name not in NOT_OF_KV}
    return Fingerprint(
        weights=weights,
        dtype=str(model.dtype).removeprefix("torch."),
        kv_dtype=pool.kv_dtype,
        layout=page_bytes.layout,
        page_size=pool.page_size,
        model=json.dumps(computing, sort_keys=True, default=str),
    )
