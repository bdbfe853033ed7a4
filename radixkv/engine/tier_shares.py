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
    disk_bytes: dict[Names, int] = {
        namespace: quota.disk_bytes for namespace, quota in quotas.items() if quota.disk_bytes
    }
    host_bytes: dict[Names, int] = {
        namespace: quota.host_bytes for namespace, quota in quotas.items() if quota.host_bytes
    }
    disks = [store for store in stores if isinstance(store, DiskStore)]
    hosts = [store for store in stores if isinstance(store, HostStore)]
    if disk_bytes and not disks:
        raise ConfigError("quotas guarantee disk_bytes, and there is no disk_cache; set it, or leave them out")
    if host_bytes and not hosts:
        raise ConfigError("quotas guarantee host_bytes, and there is no host_cache_gb; set it, or leave them out")
    shares: list[tuple[DiskStore | HostStore, dict[Names, int]]] = []
    shares += [(disk, disk_bytes) for disk in disks]
    shares += [(host, host_bytes) for host in hosts]
    for store, guaranteed_bytes in shares:
        store.check_shares(guaranteed_bytes)
    return shares
