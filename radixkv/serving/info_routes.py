"""`GET /server_info`: what a router, or whoever looks after many servers, has to know of one."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from radixkv.serving.service import Service, tenant_of
from radixkv.serving.wire import JsonAnswer


def router(service: Service) -> APIRouter:
    """The route."""
    routes = APIRouter(tags=["Operation"])

    @routes.get("/server_info", response_model=None)
    async def server_info(request: Request) -> Response:
        """What is served and how, and who asks: the tenant, and the namespace that its requests share prefixes in."""
        return JsonAnswer({**_facts(service), "caller": _caller(request)})

    return routes


def _facts(service: Service) -> dict[str, Any]:
    config = service.engine.config
    return {
        "version": version("radixkv"),
        "model": service.model_source,
        "served_model_name": service.model_name,
        "started_at": service.created_at,
        "page_size": config.page_size,
        "kv_cache_tokens": config.kv_cache_tokens,
        "max_context_tokens": service.engine.max_context_tokens,
        "vocab_size": service.engine.vocab_size,
        "keep_answer_ids": service.config.keep_answer_ids,
        "has_tenants": service.keys.has_tenants,
    }


def _caller(request: Request) -> dict[str, Any]:
    tenant = tenant_of(request)
    return {"tenant": tenant.name, "namespace": tenant.namespace, "admin": tenant.admin}
