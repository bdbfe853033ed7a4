"""The application: its routes, and what every request passes."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from radixkv.serving import (
    anthropic_messages,
    cache_routes,
    live_page,
    live_routes,
    openai_chat,
    openai_completions,
    openai_responses,
    openai_tokens,
    server_info,
)
from radixkv.serving.errors import as_api_error
from radixkv.serving.gatekeeper import Gatekeeper
from radixkv.serving.metrics import CONTENT_TYPE
from radixkv.serving.service import Service, require_admin
from radixkv.serving.streaming import BODY_SEND
from radixkv.serving.wire import JsonAnswer


def make_app(service: Service) -> FastAPI:
    """The ASGI application of a server."""
    app = _App(
        title="radixkv",
        version=version("radixkv"),
        description="Language models from a radix-tree KV cache.",
        docs_url=None,  # its page loads scripts from another host
        redoc_url=None,
    )
    app.add_middleware(Gatekeeper, service=service)
    for error in (RequestValidationError, HTTPException):
        app.add_exception_handler(error, _answer_error)
    for module in (
        openai_chat,
        openai_completions,
        openai_responses,
        openai_tokens,
        anthropic_messages,
        cache_routes,
        live_routes,
        server_info,
    ):
        app.include_router(module.router(service))
    app.include_router(live_page.router())
    _add_probes(app, service)
    return app


class _App(FastAPI):
    """Tells those who answer the short way for bodies, past all middleware."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[BODY_SEND] = send
        await super().__call__(scope, receive, send)


async def _answer_error(request: Request, error: Exception) -> Response:
    return as_api_error(error).response(request.url.path)


def _add_probes(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        """Whether the engine lives and steps."""
        await service.check_health()
        return JsonAnswer({"status": "ok"})

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        """What Prometheus collects."""
        require_admin(request)
        content = service.metrics.render(await service.engine.stats())
        return Response(content, media_type=CONTENT_TYPE)

    @app.get("/ready")
    async def ready() -> Response:
        """Whether requests are taken now."""
        await service.check_health()
        if service.admission.is_draining:
            return JsonAnswer({"status": "draining"}, 503)
        return JsonAnswer({"status": "ready"})
