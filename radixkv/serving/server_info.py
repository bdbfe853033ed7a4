"""What a server says of itself: its model, its pages, and where its events come from."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from radixkv.publish.publisher import EventSources
from radixkv.serving.service import Service
from radixkv.serving.wire import JsonAnswer


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["Cache"])

    @routes.get("/server_info", response_model=None)
    async def get_server_info() -> Response:
        """What routers ask before they send requests here."""
        config = service.engine.config
        return JsonAnswer(
            {
                "version": version("radixkv"),
                "model": service.model_name,
                "page_size": config.page_size,
                "kv_cache_tokens": config.kv_cache_tokens,
                "max_context_tokens": config.max_context_tokens,
                "kv_events": _sources(service.engine.event_sources),
            }
        )

    return routes


def _sources(sources: EventSources | None) -> dict[str, Any] | None:
    """Addresses as they were bound: of one that is on all of a host's, 0.0.0.0, the host is to be put in."""
    return None if sources is None else {"publisher": "zmq", **sources._asdict()}
