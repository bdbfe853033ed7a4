"""`POST /v1/chat/completions`."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from radixkv.engine.request import RequestOutput
from radixkv.serving.cache_use import MAX_BREAKPOINTS, implicit_keep
from radixkv.serving.generation import Generation
from radixkv.serving.openai_chat_body import ChatBody
from radixkv.serving.openai_usage import usage_object
from radixkv.serving.sampling_fields import sampling_params
from radixkv.serving.service import Service, tenant_of
from radixkv.serving.streaming import DONE, event, unless_gone


def router(service: Service) -> APIRouter:
    """The route."""
    routes = APIRouter(tags=["OpenAI"])

    @routes.post("/v1/chat/completions", response_model=None)
    async def create_chat_completion(body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        service.check_fields(body)
        service.check_model(body.model)
        call = await unless_gone(request, _ChatCall.of(service, body, request))
        if body.stream:
            return service.stream(call.events())
        return JSONResponse(call.answer(await unless_gone(request, call.generation.outputs())))

    return routes


class _ChatCall:
    """A chat completion that is being made."""

    def __init__(self, service: Service, body: ChatBody, generation: Generation) -> None:
        self.generation = generation
        self._body = body
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": service.model_name,
        }

    @classmethod
    async def of(cls, service: Service, body: ChatBody, request: Request) -> _ChatCall:
        """The call that `body` asks for. Raises: ApiError, RadixKVError."""
        params = sampling_params(
            body,
            max_tokens=service.engine.max_context_tokens if body.asked_tokens is None else body.asked_tokens,
            max_tokens_field=body.asked_tokens_field,
        )
        chat = body.chat()
        prompt = await service.chat_prompts.encode(chat)
        keeps = await service.chat_prompts.keeps(chat, prompt)
        keeps = [*keeps, *implicit_keep(body.prompt_cache_options, prompt)][-MAX_BREAKPOINTS:]
        return cls(service, body, service.generation([prompt], params, body, tenant_of(request), keeps))

    def answer(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        """The completion as a whole."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": output.text or "", "refusal": None},
                "logprobs": None,
                "finish_reason": output.finish_reason,
            }
            for index, output in enumerate(outputs)
        ]
        usage = usage_object(self.generation.usage(outputs))
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage}

    async def events(self) -> AsyncGenerator[bytes]:
        """The completion, piece by piece."""
        outputs: dict[int, RequestOutput] = {}
        begun: set[int] = set()
        async with aclosing(self.generation.pieces()) as pieces:
            async for index, progress in pieces:
                if index not in begun:
                    begun.add(index)
                    yield self._chunk(index, {"role": "assistant", "content": "", "refusal": None})
                if progress.text:
                    yield self._chunk(index, {"content": progress.text})
                if progress.output is not None:
                    outputs[index] = progress.output
                    yield self._chunk(index, {}, progress.output.finish_reason)
        if self._body.stream_options is not None and self._body.stream_options.include_usage:
            usage = usage_object(self.generation.usage([outputs[index] for index in sorted(outputs)]))
            yield event({**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage})
        yield DONE

    def _chunk(self, index: int, delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return event({**self._head, "object": "chat.completion.chunk", "choices": [choice]})
