"""`GET /v1/models`, `POST /tokenize` and `POST /detokenize`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from radixkv.serving.bodies import Body
from radixkv.serving.prompt_body import PromptBody, ids_of
from radixkv.serving.service import Service, in_thread, owner_of
from radixkv.serving.wire import JsonAnswer


class TokenizeBody(PromptBody):
    """A text or a chat whose tokens are wanted."""

    add_special_tokens: bool = True


class DetokenizeBody(Body):
    """Tokens whose text is wanted."""

    model: str | None = None
    tokens: list[int]


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["OpenAI"])

    @routes.get("/v1/models", response_model=None)
    async def list_models() -> Response:
        """The model that is served."""
        return JsonAnswer({"object": "list", "data": [_model(service)]})

    @routes.get("/v1/models/{name:path}", response_model=None)
    async def get_model(name: str) -> Response:
        """The model, if it has that name."""
        service.check_model(name)
        return JsonAnswer(_model(service))

    @routes.post("/tokenize", response_model=None)
    async def tokenize(body: TokenizeBody, request: Request) -> Response:
        """The token ids of a text, or of a chat."""
        service.check_fields(body)
        service.check_model(body.model)
        owner = owner_of(request, None)
        ids = (await ids_of(service, body, owner, add_special_tokens=body.add_special_tokens)).tolist()
        limit = service.engine.max_context_tokens
        return JsonAnswer({"tokens": ids, "count": len(ids), "max_model_len": limit})

    @routes.post("/detokenize", response_model=None)
    async def detokenize(body: DetokenizeBody) -> Response:
        """The text of token ids."""
        service.check_fields(body)
        service.check_model(body.model)
        ids = service.engine.known_ids(body.tokens).tolist()
        text = await in_thread(service.engine.require_tokenizer("tokens").decode, ids)
        return JsonAnswer({"prompt": text})

    return routes


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.created_at,
        "owned_by": "radixkv",
        "max_model_len": service.engine.max_context_tokens,
    }
