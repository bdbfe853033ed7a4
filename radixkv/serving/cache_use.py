"""How a request uses the cache: what its body asks for, within what its tenant may."""

from __future__ import annotations

from radixkv.cache.keeping import MAX_PRIORITY, MIN_PRIORITY
from radixkv.serving.bodies import GenerationBody
from radixkv.serving.generation import CacheUse
from radixkv.serving.tenants import Tenant

TTL_S = {"5m": 300.0, "30m": 1800.0, "1h": 3600.0, "12h": 43200.0}


def cache_use(body: GenerationBody, tenant: Tenant) -> CacheUse:
    """The namespace is the tenant's; a salt divides it further. The priority is what both ask for together."""
    options = body.prompt_cache_options
    return CacheUse(
        extra_key=tenant.namespace,
        cache_salt=body.cache_salt,
        priority=max(MIN_PRIORITY, min(MAX_PRIORITY, tenant.priority + (body.priority or 0))),
        keep_for_s=None if options is None or options.ttl is None else TTL_S[options.ttl],
    )
