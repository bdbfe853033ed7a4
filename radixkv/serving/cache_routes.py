"""The cache on the wire: what it holds, why a prompt misses it, emptying it and filling it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from radixkv.cache.insight.explanation import Explanation
from radixkv.cache.keeping import MAX_KEEP_FOR_S
from radixkv.cache.quotas.accounts import NamespaceUse
from radixkv.config import SamplingParams
from radixkv.engine.results import EngineStats
from radixkv.serving.bodies import SALT_CHARACTERS, GenerationBody
from radixkv.serving.generation import Ids, Keep
from radixkv.serving.live_view import states_row, tier_row
from radixkv.serving.prompt_body import PromptBody, ids_of
from radixkv.serving.service import Service, owner_of, require_admin, tenant_of
from radixkv.serving.streaming import unless_gone
from radixkv.serving.wire import JsonAnswer

SAME_TOKENS = 32  # of those before a difference that are shown


class CacheBody(PromptBody):
    """A prompt, and the namespace in which it is wanted. Other fields of a request may be there, and mean nothing."""

    cache_salt: str | None = Field(default=None, min_length=1, max_length=SALT_CHARACTERS)


class PrewarmBody(CacheBody):
    """A prompt that is to be computed, so that later requests find it."""

    priority: int | None = None
    keep_for_s: float | None = Field(default=None, ge=0, le=MAX_KEEP_FOR_S)


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["Cache"])

    @routes.get("/v1/cache/stats", response_model=None)
    async def get_stats(request: Request) -> Response:
        """What the cache holds, and what it did."""
        require_admin(request)
        return JsonAnswer(_stats(await service.engine.stats()))

    @routes.post("/v1/cache/flush", response_model=None)
    async def flush(request: Request) -> Response:
        """Forget every prefix that no running request reads."""
        require_admin(request)
        return JsonAnswer((await service.engine.reset_cache())._asdict())

    @routes.post("/v1/cache/explain", response_model=None)
    async def explain(body: CacheBody, request: Request) -> Response:
        """How far a prompt is cached now, and why not further. Nothing is computed, and nothing changes."""
        service.check_model(body.model)
        ids = await ids_of(service, body, owner_of(request, body.cache_salt))
        namespace = tenant_of(request).namespace
        found = await service.engine.explain(ids, extra_key=namespace, cache_salt=body.cache_salt)
        return JsonAnswer(_explanation(found, ids, service.engine.tokenizer))

    @routes.post("/v1/cache/prewarm", response_model=None)
    async def prewarm(body: PrewarmBody, request: Request) -> Response:
        """Compute a prompt and generate nothing, so that later requests find it cached."""
        service.check_model(body.model)
        ids = await unless_gone(request, ids_of(service, body, owner_of(request, body.cache_salt)))
        use = GenerationBody(cache_salt=body.cache_salt, priority=body.priority)
        keeps = [] if body.keep_for_s is None else [Keep(ids, body.keep_for_s)]
        generation = service.generation([ids], SamplingParams(max_tokens=0), use, tenant_of(request), keeps)
        usage = generation.usage(await unless_gone(request, generation.outputs()))
        return JsonAnswer(
            {
                "prompt_tokens": usage.prompt_tokens,
                "cached_tokens": usage.cached_tokens,
                "cached_by": usage.cached_by,
                "cache_write_tokens": usage.cache_write_tokens,
                "keep_for_s": body.keep_for_s,
            }
        )

    return routes


def _stats(stats: EngineStats) -> dict[str, Any]:
    cache = stats.cache
    return {
        "pool": {
            "pages": cache.num_pages,
            "page_size": cache.page_size,
            "free_pages": cache.free_pages,
            "leased_pages": cache.leased_pages,
            "bytes": stats.pool_bytes,
        },
        **({} if (states := states_row(stats)) is None else {"states": states}),
        "cached_tokens": {"evictable": cache.evictable_tokens, "protected": cache.protected_tokens},
        "query_tokens": cache.query_tokens,
        "hit_tokens": cache.hit_tokens,
        "hit_rate": cache.hit_rate,
        "evicted_tokens": cache.evicted_tokens,
        "tiers": [tier_row(tier) for tier in stats.tiers],
        "estimated_hit_rates": [estimate._asdict() for estimate in cache.estimated_hit_rates],
        "namespaces": [_use(use) for use in cache.namespaces],
        "requests": {"running": stats.running, "waiting": stats.waiting},
        "retractions": stats.retractions,
    }


def _use(use: NamespaceUse) -> dict[str, Any]:
    """What a namespace with a quota holds; its name is null for all others together."""
    return {**use._asdict(), "namespace": None if use.namespace is None else use.namespace.extra_key}


def _explanation(found: Explanation, ids: Ids, tokenizer: Any | None) -> dict[str, Any]:
    def text(token_ids: Any) -> str | None:
        return None if tokenizer is None else str(tokenizer.decode([int(i) for i in token_ids]))

    evicted, divergence = None, None
    if found.eviction is not None:
        evicted = {
            "tokens": found.evicted_tokens,
            "ago_s": found.evicted_ago_s,
            "unused_s": found.eviction.unused_s,
            "policy": found.eviction.policy,
        }
    if found.near_miss is not None:
        position, cached_ids, asked_ids = found.near_miss
        divergence = {
            "position": position,
            "text_before": text(ids[max(0, position - SAME_TOKENS) : position]),
            "asked_text": text(asked_ids),
            "cached_text": text(cached_ids),
            "asked_token_ids": asked_ids,
            "cached_token_ids": cached_ids,
        }
    return {
        "prompt_tokens": found.num_tokens,
        "cached_tokens": found.cached_tokens,
        "reason": found.reason,
        "message": str(found),
        "evicted": evicted,
        "divergence": divergence,
    }
