"""What a server says of itself: its model, its pages, and where its events come from."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from radixkv.publish.publisher import EventSources
from radixkv.serving.service import Service, tenant_of
from radixkv.serving.wire import JsonAnswer


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["Cache"])

    @routes.get("/server_info", response_model=None)
    async def get_server_info(request: Request) -> Response:
        """What routers ask before they send requests here; and whose requests share prefixes with the caller's."""
        config = service.engine.config
        return JsonAnswer(
            {
                "version": version("radixkv"),
                "model": service.model_name,
                "model_path": service.model_source,
                "started_at": service.created_at,
                "vocab_size": service.engine.vocab_size,
                "page_size": config.page_size,
                "kv_cache_tokens": config.kv_cache_tokens,
                **({} if config.state_slots is None else {"state_slots": config.state_slots}),
                "max_context_tokens": config.max_context_tokens,
                "keep_answer_ids": service.config.keep_answer_ids,
                "has_tenants": service.keys.has_tenants,
                "kv_events": _sources(service.engine.event_sources),
                "caller": _caller(request),
            }
        )

    return routes


def _caller(request: Request) -> dict[str, Any]:
    tenant = tenant_of(request)
    return {"tenant": tenant.name, "namespace": tenant.namespace, "admin": tenant.admin}


def _sources(sources: EventSources | None) -> dict[str, Any] | None:
    """Addresses as they were bound: of one that is on all of a host's, 0.0.0.0, the host is to be put in."""
    return None if sources is None else {"publisher": "zmq", **sources._asdict()}
