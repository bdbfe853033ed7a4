"""`POST /v1/chat/completions`."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from radixkv.engine.outputs import Progress, RequestOutput
from radixkv.engine.sampling import TokenLogprobs
from radixkv.serving.answer_form import ToolUse, grammar_of
from radixkv.serving.answer_reader import AnswerReader
from radixkv.serving.cache_use import MAX_BREAKPOINTS, implicit_keep
from radixkv.serving.chat_prompts import Chat
from radixkv.serving.errors import bad_request
from radixkv.serving.generation import Generation
from radixkv.serving.openai_chat_body import ChatBody
from radixkv.serving.openai_logprobs import of_chat
from radixkv.serving.openai_usage import StreamEnd, usage_object
from radixkv.serving.sampling_fields import sampling_params
from radixkv.serving.service import Service, owner_of, tenant_of
from radixkv.serving.streaming import EventForm, event
from radixkv.serving.tool_calls import Arguments, Call, CallBegun, Parsed, Piece, Text


def router(service: Service) -> APIRouter:
    """The route."""
    routes = APIRouter(tags=["OpenAI"])

    @routes.post("/v1/chat/completions", response_model=None)
    async def create_chat_completion(body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        return await service.completed(body, request, ChatCall.of)

    return routes


class ChatCall:
    """A chat completion that is being made: of `chat`, whose answers may call `tools`."""

    def __init__(self, service: Service, body: ChatBody, chat: Chat, tools: ToolUse, generation: Generation) -> None:
        self.chat = chat
        self.generation = generation
        self._service = service
        self._body = body
        self.tools = tools
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": service.model_name,
        }

    @classmethod
    async def of(cls, service: Service, body: ChatBody, request: Request) -> ChatCall:
        """The call that `body` asks for. Raises: ApiError, RadixKVError."""
        if body.top_logprobs is not None and not body.logprobs:
            raise bad_request("top_logprobs needs logprobs to be true", "top_logprobs")
        params = sampling_params(
            body,
            max_tokens=service.engine.max_context_tokens if body.asked_tokens is None else body.asked_tokens,
            max_tokens_field=body.asked_tokens_field,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        tools = body.tool_use()
        params = await service.fitting(params, grammar_of(body, body.response_format, tools))
        chat = body.chat()
        prompt = await service.chat_prompts.prompt(chat, owner_of(request, body.cache_salt))
        keeps = await service.chat_prompts.keeps(chat, prompt)
        keeps = [*keeps, *implicit_keep(body.prompt_cache_options, prompt.ids)][-MAX_BREAKPOINTS:]
        generation = service.generation([prompt.ids], params, body, tenant_of(request), keeps, prompt)
        return cls(service, body, chat, tools, generation)

    def answer(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        """The completion as a whole."""
        choices = [self._choice(index, output) for index, output in enumerate(outputs)]
        usage = usage_object(self.generation.usage(outputs))
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage}

    def stream_end(self) -> StreamEnd:
        """The end of its stream."""
        return StreamEnd(self.generation, self._body, self._head | {"object": "chat.completion.chunk"})

    def streamed(self) -> _ChatEvents:
        """The completion, piece by piece."""
        return _ChatEvents(self)

    def _choice(self, index: int, output: RequestOutput) -> dict[str, Any]:
        parsed = self.parsed(output)
        content, calls = parsed.content, parsed.calls
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message["content"] = content or None
            message["tool_calls"] = [_call_object(call) for call in calls]
        logprobs = None if output.logprobs is None else self.logprobs(output.logprobs)
        reason = _finish_reason(output, len(calls))
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def logprobs(self, of_output: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """Those of tokens, as OpenAI writes them."""
        return of_chat(of_output, self._service.token_texts)

    def parsed(self, output: RequestOutput) -> Parsed:
        """An answer, taken apart into text and calls of tools."""
        return self.tools.parsed(self._service.engine.tokenizer, output)

    def reader(self) -> AnswerReader:
        """Reads an answer as it comes."""
        return self.tools.reader(self._service.engine.tokenizer)

    def chunk(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        """An event's data: what a choice gained."""
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}


class _ChatEvents:
    """Makes the events of a chat completion."""

    def __init__(self, call: ChatCall) -> None:
        self._call = call
        self._end = call.stream_end()
        self._readers: dict[int, AnswerReader] = {}
        self._forms: dict[int, EventForm] = {}  # of chunks that bring text alone

    def events(self, index: int, progress: Progress) -> Iterator[bytes]:
        """The events that tell what a choice gained."""
        if index not in self._readers:
            self._readers[index] = self._call.reader()
            self._forms[index] = EventForm(partial(self._content, index))
            yield event(self._call.chunk(index, {"role": "assistant", "content": "", "refusal": None}))
        found = self._readers[index].push(progress.text)
        if progress.output is not None:
            found += self._readers[index].finish(progress.output.token_ids)
        if progress.logprobs:
            text = ""
            if found and isinstance(found[0], Text):
                text, found = found[0].text, found[1:]
            logprobs = self._call.logprobs(progress.logprobs)
            yield event(self._call.chunk(index, {"content": text}, logprobs=logprobs))
        for part in found:
            if isinstance(part, Text):
                yield self._forms[index].event(part.text)
            elif (delta := _call_delta(part)) is not None:
                yield event(self._call.chunk(index, delta))
        if progress.output is not None:
            self._end.outputs[index] = progress.output
            reason = _finish_reason(progress.output, self._readers[index].num_calls)
            yield event(self._call.chunk(index, {}, finish_reason=reason))

    def last_events(self) -> Sequence[bytes]:
        """The usage, if it was asked for, and the end."""
        return self._end.events()

    def _content(self, index: int, text: str) -> dict[str, Any]:
        return self._call.chunk(index, {"content": text})


def _finish_reason(output: RequestOutput, num_calls: int) -> str:
    return "tool_calls" if num_calls and output.finish_reason == "stop" else output.finish_reason


def _call_object(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _call_delta(piece: Piece) -> dict[str, Any] | None:
    """What a piece of a call adds to a message, if anything."""
    if isinstance(piece, CallBegun):
        head = {"id": piece.id, "type": "function", "function": {"name": piece.name, "arguments": ""}}
        return {"tool_calls": [{"index": piece.number, **head}]}
    if isinstance(piece, Arguments):
        return {"tool_calls": [{"index": piece.number, "function": {"arguments": piece.text}}]}
    return None
