"""Who asks: the tenants, and the keys by which they are known."""

from __future__ import annotations

import hmac
import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from radixkv.cache.keeping import checked_priority
from radixkv.cache.quotas.accounts import QuotaKey
from radixkv.config import CacheQuota
from radixkv.config.checks import Bounds, checked_flag, checked_int, checked_number, checked_text, shown
from radixkv.config.toml_file import read_toml
from radixkv.errors import ConfigError, RadixKVError

_FIELDS = (
    "sha256",
    "name",
    "priority",
    "max_requests",
    "pool_share",
    "disk_share",
    "host_share",
    "shares_with",
    "admin",
)
_SHARE = Bounds(minimum=0, maximum=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """One who asks.

    Attributes:
        name: as metrics and logs say it.
        namespace: tenants with the same one share cached prefixes; None is that of a server without tenants.
        priority: of each of its requests, added to what a request asks for.
        max_requests: of its requests at once; None for no limit.
        pool_share, disk_share, host_share: the parts of the KV pool, of `disk_cache` and of `host_cache_gb` that its
            namespace is guaranteed for it.
        admin: whether it may see and change what belongs to others: statistics, metrics, the whole cache.
    """

    name: str
    namespace: str | None
    priority: int = 0
    max_requests: int | None = None
    pool_share: float = 0.0
    disk_share: float = 0.0
    host_share: float = 0.0
    admin: bool = False


ANYBODY = Tenant(name="default", namespace=None, admin=True)
"""Who asks a server that knows no tenants."""


@dataclass(frozen=True, slots=True)
class KeyRing:
    """The keys that open the server, as SHA-256 hashes; without any, everybody may come in.

    >>> ring = KeyRing.of_one_key("secret")
    >>> ring.tenant_of("secret").name, ring.tenant_of("guess"), ring.tenant_of(None)
    ('default', None, None)
    """

    keys: Sequence[tuple[bytes, Tenant]] = ()

    @classmethod
    def of_one_key(cls, key: str) -> KeyRing:
        """A ring for one key, whose owner may do everything."""
        return cls([(_hash(key), ANYBODY)])

    @classmethod
    def from_file(cls, path: Path) -> KeyRing:
        """The ring in a TOML file: a table `[[key]]` for each key. Raises: ConfigError."""
        content = read_toml(path)
        tables = content.get("key")
        if set(content) != {"key"} or not isinstance(tables, list) or not tables:
            raise ConfigError(f"{path} must hold tables [[key]] and nothing else")
        keys = [_key(f"{path}, key {number}", table) for number, table in enumerate(tables, start=1)]
        for what, values in (("sha256", [key for key, _ in keys]), ("name", [tenant.name for _, tenant in keys])):
            if len(set(values)) < len(values):
                raise ConfigError(f"{path}: two keys have the same {what}")
        for what in ("pool_share", "disk_share", "host_share"):
            if (total := math.fsum(getattr(tenant, what) for _, tenant in keys)) > 1:
                raise ConfigError(f"{path}: the {what} of all keys must add up to at most 1; they add up to {total:g}")
        return cls(keys)

    @property
    def is_open(self) -> bool:
        """Whether no key is needed."""
        return not self.keys

    @property
    def has_tenants(self) -> bool:
        """Whether there are tenants to be kept apart."""
        return any(tenant.namespace is not None for _, tenant in self.keys)

    def quotas(self, pool_tokens: int, disk_bytes: int, host_bytes: int) -> dict[QuotaKey, CacheQuota]:
        """What each namespace is guaranteed of a pool, a disk and host memory of that size: its keys' shares, added up.

        >>> tenants = [Tenant(name=name, namespace="blue", pool_share=0.25) for name in ("blue", "azure")]
        >>> KeyRing([(b"", tenant) for tenant in tenants]).quotas(4000, 0, 0)
        {'blue': CacheQuota(pool_tokens=2000, disk_bytes=0, host_bytes=0)}
        """
        members: dict[str, list[Tenant]] = {}
        for _, tenant in self.keys:
            if tenant.namespace is not None and (tenant.pool_share or tenant.disk_share or tenant.host_share):
                members.setdefault(tenant.namespace, []).append(tenant)
        return {
            namespace: CacheQuota(
                pool_tokens=int(math.fsum(tenant.pool_share for tenant in tenants) * pool_tokens),
                disk_bytes=int(math.fsum(tenant.disk_share for tenant in tenants) * disk_bytes),
                host_bytes=int(math.fsum(tenant.host_share for tenant in tenants) * host_bytes),
            )
            for namespace, tenants in members.items()
        }

    def tenant_of(self, key: str | None) -> Tenant | None:
        """Whose key it is; None if it is nobody's. The time it takes does not depend on the key."""
        if self.is_open:
            return ANYBODY
        given = _hash(key or "")
        found = None
        for known, tenant in self.keys:
            if hmac.compare_digest(known, given):
                found = tenant
        return found


def _hash(key: str) -> bytes:
    return sha256(key.encode("utf-8", "surrogateescape")).digest()


def _key(place: str, table: Any) -> tuple[bytes, Tenant]:
    """The hash of a key, and whose key it is."""
    try:
        return _checked_key(table)
    except RadixKVError as error:
        raise ConfigError(f"{place}: {error}") from error


def _checked_key(table: Any) -> tuple[bytes, Tenant]:
    if not isinstance(table, dict):
        raise ConfigError(f"a key must be a table, not {shown(table)}")
    for name in table:
        if name not in _FIELDS:
            raise ConfigError(f"unknown field {name!r}; the fields are {', '.join(_FIELDS)}")
    for name in ("sha256", "name"):
        if not checked_text(name, table.get(name)):
            raise ConfigError(f"{name} must not be empty")
    try:
        hashed = bytes.fromhex(table["sha256"])
    except ValueError:
        hashed = b""
    if len(hashed) != sha256().digest_size:
        raise ConfigError("sha256 must be the 64 hex digits of the key's SHA-256 hash")
    limit = table.get("max_requests")
    tenant = Tenant(
        name=table["name"],
        namespace=checked_text("shares_with", table.get("shares_with", table["name"])),
        priority=checked_priority(table.get("priority", 0)),
        max_requests=None if limit is None else checked_int("max_requests", limit, 1),
        pool_share=checked_number("pool_share", table.get("pool_share", 0), _SHARE),
        disk_share=checked_number("disk_share", table.get("disk_share", 0), _SHARE),
        host_share=checked_number("host_share", table.get("host_share", 0), _SHARE),
        admin=checked_flag("admin", table.get("admin", False)),
    )
    return hashed, tenant
