"""How a request uses the cache: what its body asks for, within what its tenant may."""

from __future__ import annotations

from radixkv.cache.keeping import MAX_PRIORITY, MIN_PRIORITY
from radixkv.serving.bodies import GenerationBody
from radixkv.serving.generation import CacheUse
from radixkv.serving.tenants import Tenant


def cache_use(body: GenerationBody, tenant: Tenant) -> CacheUse:
    """The namespace is the tenant's; a salt divides it further. The priority is what both ask for together."""
    return CacheUse(
        extra_key=tenant.namespace,
        cache_salt=body.cache_salt,
        priority=max(MIN_PRIORITY, min(MAX_PRIORITY, tenant.priority + (body.priority or 0))),
    )
