"""The shares of namespaces in the tiers that are an engine's own: the disk's and host memory's.

A server that engines share has none: an engine sees only what it writes there itself, and what gives way is decided by
the server.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from radixkv.cache.namespace import Namespace
from radixkv.config import CacheQuota
from radixkv.errors import ConfigError
from radixkv.tiers.disk_store import DiskStore
from radixkv.tiers.memory_store import HostStore
from radixkv.tiers.page_lines import Names
from radixkv.tiers.page_store import PageStore

_KINDS: tuple[tuple[type[DiskStore | HostStore], str, str], ...] = (  # with the field of a quota, and what sets it up
    (DiskStore, "disk_bytes", "disk_cache"),
    (HostStore, "host_bytes", "host_cache_gb"),
)


def check_tier_shares(stores: Sequence[PageStore], quotas: Mapping[Namespace, CacheQuota]) -> None:
    """Raises: ConfigError if `set_tier_shares` would."""
    _shares(stores, quotas)


def set_tier_shares(stores: Sequence[PageStore], quotas: Mapping[Namespace, CacheQuota]) -> None:
    """Guarantee namespaces their bytes of each store, in place of what was guaranteed before; all or none.

    O(pages × log pages) for each store.

    Raises: ConfigError if a store is not there, or if more of it is guaranteed than it holds.
    """
    for store, guaranteed_bytes in _shares(stores, quotas):
        store.set_shares(guaranteed_bytes)


def _shares(
    stores: Sequence[PageStore], quotas: Mapping[Namespace, CacheQuota]
) -> list[tuple[DiskStore | HostStore, dict[Names, int]]]:
    """What is guaranteed of each store, checked."""
    shares: list[tuple[DiskStore | HostStore, dict[Names, int]]] = []
    for kind, field, setting in _KINDS:
        guaranteed_bytes: dict[Names, int] = {
            name: size for name, quota in quotas.items() if (size := getattr(quota, field))
        }
        own = [store for store in stores if isinstance(store, kind)]
        if guaranteed_bytes and not own:
            raise ConfigError(f"quotas guarantee {field}, and there is no {setting}; set it, or leave them out")
        shares += [(store, guaranteed_bytes) for store in own]
    for store, guaranteed_bytes in shares:
        store.check_shares(guaranteed_bytes)
    return shares
