"""How a request uses the cache: what its body asks for, within what its tenant may."""

from __future__ import annotations

from collections.abc import Sequence

from radixkv.cache.keeping import MAX_PRIORITY, MIN_PRIORITY
from radixkv.serving.bodies import GenerationBody, PromptCacheOptions
from radixkv.serving.generation import CacheUse, Ids, Keep
from radixkv.serving.tenants import Tenant

TTL_S = {"5m": 300.0, "30m": 1800.0, "1h": 3600.0, "12h": 43200.0}
DEFAULT_TTL = "30m"
MAX_BREAKPOINTS = 4


def default_ttl_s(options: PromptCacheOptions | None) -> float:
    """How long a breakpoint without a ttl is kept."""
    return TTL_S[(options.ttl if options is not None else None) or DEFAULT_TTL]


def implicit_keep(options: PromptCacheOptions | None, prompt: Ids) -> list[Keep]:
    """The whole prompt, if the options ask for its keeping and not for that of breakpoints alone."""
    if options is None or options.mode == "explicit":
        return []
    return [Keep(prompt, default_ttl_s(options))]


def cache_use(body: GenerationBody, tenant: Tenant, keeps: Sequence[Keep]) -> CacheUse:
    """The namespace is the tenant's; a salt divides it further. The priority is what both ask for together.

    Who asks for breakpoints alone, and sets none, wants no caching.
    """
    options = body.prompt_cache_options
    return CacheUse(
        prefix_cache=options is None or options.mode != "explicit" or bool(keeps),
        extra_key=tenant.namespace,
        cache_salt=body.cache_salt,
        priority=max(MIN_PRIORITY, min(MAX_PRIORITY, tenant.priority + (body.priority or 0))),
    )
