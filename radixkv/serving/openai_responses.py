"""`POST /v1/responses`, and what was stored of them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from radixkv.engine.outputs import Progress, RequestOutput, Usage
from radixkv.serving.errors import ApiError, bad_request
from radixkv.serving.history import Asked, BoundedStore, compare
from radixkv.serving.openai_chat import ChatCall
from radixkv.serving.openai_chat_body import ChatMessage, FunctionCall, ToolCall
from radixkv.serving.response_items import ItemStream, output_items
from radixkv.serving.responses_body import ResponsesBody
from radixkv.serving.service import Service, tenant_of
from radixkv.serving.streaming import event, unless_gone
from radixkv.serving.tool_calls import Parsed
from radixkv.serving.wire import JsonAnswer

_REASONS = {"tools": "tools_changed", "system": "input_changed", "messages": "input_changed"}


@dataclass(frozen=True, slots=True)
class Stored:
    """A response, the conversation up to its end, and what it asked."""

    tenant: str
    answer: dict[str, Any]
    messages: list[ChatMessage]
    asked: Asked

    @property
    def num_bytes(self) -> int:
        """About what it takes."""
        texts = sum(len(message.model_dump_json()) for message in self.messages)
        return self.asked.prompt.nbytes + texts + 2048


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["OpenAI"])
    store: BoundedStore[Stored] = BoundedStore()

    @routes.post("/v1/responses", response_model=None)
    async def create_response(body: ResponsesBody, request: Request) -> Response:
        """Answer a conversation, which may go on from a stored response."""
        service.check_fields(body)
        service.check_model(body.model)
        call = await unless_gone(request, _ResponseCall.of(service, body, request, store))
        if body.stream:
            return service.stream_answer(call.chat.generation, call.streamed(), body.radixkv_continue, call.error_event)
        (output,) = await unless_gone(request, call.chat.generation.outputs())
        return JsonAnswer(call.finish(output))

    @routes.get("/v1/responses/{response_id}", response_model=None)
    async def get_response(response_id: str, request: Request) -> Response:
        """A stored response."""
        return JsonAnswer(_stored(store, response_id, request).answer)

    @routes.delete("/v1/responses/{response_id}", response_model=None)
    async def delete_response(response_id: str, request: Request) -> Response:
        """Forget a stored response."""
        _stored(store, response_id, request)
        store.remove(response_id)
        return JsonAnswer({"id": response_id, "object": "response", "deleted": True})

    return routes


def _stored(store: BoundedStore[Stored], response_id: str, request: Request, param: str | None = None) -> Stored:
    """A response of the one who asks. Raises: ApiError."""
    found = store.get(response_id)
    if found is None or found.tenant != tenant_of(request).name:
        raise ApiError(404, "there is no such response here, or not any more", param=param, code="response_not_found")
    return found


@dataclass(slots=True)
class _Numbers:
    """Counts the events of a stream."""

    next: int = 0

    def event(self, kind: str, **fields: Any) -> bytes:
        """The next event."""
        number, self.next = self.next, self.next + 1
        return event({"type": kind, "sequence_number": number, **fields}, kind)


@dataclass(slots=True)
class _ResponseCall:
    """A response that is being made."""

    chat: ChatCall
    body: ResponsesBody
    messages: list[ChatMessage]  # without instructions
    asked: Asked
    store: BoundedStore[Stored]
    compared: Stored | None
    model: str
    id: str = field(default_factory=lambda: f"resp_{secrets.token_hex(12)}")
    message_id: str = field(default_factory=lambda: f"msg_{secrets.token_hex(12)}")
    created_at: int = field(default_factory=lambda: int(time.time()))
    numbers: _Numbers = field(default_factory=_Numbers)

    @classmethod
    async def of(
        cls, service: Service, body: ResponsesBody, request: Request, store: BoundedStore[Stored]
    ) -> _ResponseCall:
        """The call that `body` asks for. Raises: ApiError, RadixKVError."""
        past: list[ChatMessage] = []
        if body.previous_response_id is not None:
            past = _stored(store, body.previous_response_id, request, "previous_response_id").messages
        messages = [*past, *body.new_messages()]
        try:
            chat = await ChatCall.of(service, body.as_chat(messages), request)
        except ApiError as error:
            raise _renamed(error) from error
        tenant = tenant_of(request).name
        asked = Asked.of(tenant, chat.chat, chat.generation.prompts[0])
        compared_id = body.prompt_cache_options.comparison_response_id if body.prompt_cache_options else None
        compared = None if compared_id is None else store.get(compared_id)
        if compared is not None and compared.tenant != tenant:
            compared = None
        return cls(chat, body, messages, asked, store, compared, service.model_name)

    def finish(self, output: RequestOutput) -> dict[str, Any]:
        """The response as a whole, which is stored unless the request says otherwise."""
        parsed = self.chat.parsed(output)
        return self.finish_with(output, parsed, output_items(self.message_id, parsed))

    def finish_with(self, output: RequestOutput, parsed: Parsed, items: list[dict[str, Any]]) -> dict[str, Any]:
        """As `finish`, for an output that was taken apart."""
        usage = self.chat.generation.usage([output])
        answer = self._answer(items, "incomplete" if output.finish_reason == "length" else "completed", usage)
        if self.body.store is not False:
            tool_calls = [
                ToolCall(id=call.id, function=FunctionCall(name=call.name, arguments=call.arguments))
                for call in parsed.calls
            ]
            said = ChatMessage(role="assistant", content=parsed.content, tool_calls=tool_calls or None)
            stored = Stored(self.asked.tenant, answer, [*self.messages, said], self.asked)
            self.store.put(self.id, stored, stored.num_bytes)
        return answer

    def streamed(self) -> _ResponseEvents:
        """The response, piece by piece."""
        return _ResponseEvents(self)

    def begun(self) -> dict[str, Any]:
        """The response before its first item."""
        return self._answer([], "in_progress", None)

    def error_event(self, error: ApiError) -> bytes:
        """What ends a stream that fails."""
        return self.numbers.event("error", code=error.code, message=error.message, param=error.param)

    def _answer(self, items: list[dict[str, Any]], status: str, usage: Usage | None) -> dict[str, Any]:
        body = self.body
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created_at,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self.model,
            "output": items,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "prompt_cache_diagnostics": None if usage is None else self._diagnostics(usage),
            "store": body.store is not False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": {"type": "text"}} if body.text is None else _dumped(body.text),
            "tool_choice": body.tool_choice or "auto",
            "tools": [_dumped(tool) for tool in body.tools or ()],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "usage": None if usage is None else _usage_object(usage),
        }

    def _diagnostics(self, usage: Usage) -> dict[str, Any] | None:
        """Why less was cached than the request with which it is to be compared had."""
        options = self.body.prompt_cache_options
        if options is None or options.comparison_response_id is None:
            return None
        if self.compared is None:
            return {"type": "comparison_response_not_found"}
        found = compare(self.compared.asked, self.asked, usage.cached_tokens)
        if found.difference == "none":
            return {"type": "cache_hit"}
        if found.difference == "evicted":  # OpenAI has no word for it
            return {"type": "unavailable"}
        return {
            "type": "cache_miss",
            "reason": _REASONS[found.difference],
            "cache_missed_tokens": found.missed_tokens,
            "comparison_reusable_tokens": found.reusable_tokens,
        }


class _ResponseEvents:
    """Makes the events of a response."""

    def __init__(self, call: _ResponseCall) -> None:
        self._call = call
        self._reader = call.chat.reader()
        self._items = ItemStream(call.message_id, call.numbers.event)

    def events(self, index: int, progress: Progress) -> Iterator[bytes]:
        """The events that tell what the answer gained."""
        call, output = self._call, progress.output
        if call.numbers.next == 0:
            for kind in ("response.created", "response.in_progress"):
                yield call.numbers.event(kind, response=call.begun())
        found = self._reader.push(progress.text)
        if output is not None:
            found += self._reader.finish(output.token_ids)
        yield from chain.from_iterable(map(self._items.events, found))
        if output is not None:
            yield from self._items.end()
            parsed = Parsed(self._items.parts)
            answer = call.finish_with(output, parsed, output_items(call.message_id, parsed))
            yield call.numbers.event(f"response.{answer['status']}", response=answer)

    def last_events(self) -> Sequence[bytes]:
        """None: those of the last piece end the response."""
        return ()


def _renamed(error: ApiError) -> ApiError:
    """`error` of a chat completion, with the fields called as a request for a response calls them."""
    if error.param == "max_completion_tokens":
        return bad_request(error.message.replace(error.param, "max_output_tokens"), "max_output_tokens", error.code)
    if error.param is not None and error.param.startswith("messages"):
        return bad_request(error.message, "input", error.code)
    return error


def _usage_object(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": usage.cache_write_tokens,
            "cached_by": usage.cached_by,
        },
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.output_tokens,
    }


def _dumped(part: Any) -> dict[str, Any]:
    dumped: dict[str, Any] = part.model_dump(exclude_none=True, by_alias=True)
    return dumped
