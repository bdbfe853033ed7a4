"""`POST /v1/messages` and `POST /v1/messages/count_tokens`, as Anthropic's clients send them."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

from fastapi import APIRouter, Request
from starlette.responses import Response

from radixkv.engine.outputs import Progress, RequestOutput, Usage
from radixkv.serving.answer_form import ToolUse, grammar_of
from radixkv.serving.answer_reader import AnswerReader
from radixkv.serving.anthropic_body import CountBody, MessagesBody
from radixkv.serving.bodies import GenerationBody
from radixkv.serving.cache_use import TTL_S
from radixkv.serving.errors import MESSAGES_PATH
from radixkv.serving.generation import Generation, Keep
from radixkv.serving.grammars import of_json_schema
from radixkv.serving.history import Asked, BoundedStore, compare
from radixkv.serving.sampling_fields import sampling_params
from radixkv.serving.service import Service, in_thread, owner_of, tenant_of
from radixkv.serving.streaming import event, unless_gone
from radixkv.serving.tool_calls import Arguments, Call, CallBegun, Piece, Text, whole_members
from radixkv.serving.wire import JsonAnswer


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["Anthropic"])
    history: BoundedStore[Asked] = BoundedStore()

    @routes.post(MESSAGES_PATH, response_model=None)
    async def create_message(body: MessagesBody, request: Request) -> Response:
        """Answer a conversation."""
        service.check_fields(body)
        service.check_model(body.model)
        call = await unless_gone(request, _MessageCall.of(service, body, request, history))
        if body.stream:
            return service.stream_answer(
                call.generation,
                call.streamed(),
                body.radixkv_continue,
                lambda error: event(error.body(MESSAGES_PATH), "error"),
            )
        (output,) = await unless_gone(request, call.generation.outputs())
        return JsonAnswer(call.answer(output))

    @routes.post(f"{MESSAGES_PATH}/count_tokens", response_model=None)
    async def count_tokens(body: CountBody, request: Request) -> Response:
        """How many tokens a conversation has."""
        service.check_fields(body)
        service.check_model(body.model)
        body.tool_use()
        prompt = await unless_gone(request, service.chat_prompts.prompt(body.chat(), owner_of(request, None)))
        return JsonAnswer({"input_tokens": len(prompt.ids)})

    return routes


class _Diagnosis(NamedTuple):
    """Answers why a message's prompt missed the cache, compared with that of an earlier message."""

    asked: Asked
    previous_message_id: str | None
    history: BoundedStore[Asked]

    def of_message(self, message_id: str, cached_tokens: int) -> dict[str, Any] | None:
        """`diagnostics`, as Anthropic writes it: None if nothing was missed. Later messages can be compared with it."""
        self.history.put(message_id, self.asked, self.asked.prompt.nbytes + 512)
        if self.previous_message_id is None:
            return None
        before = self.history.get(self.previous_message_id)
        if before is None or before.tenant != self.asked.tenant:
            return {"cache_miss_reason": {"type": "previous_message_not_found"}}
        found = compare(before, self.asked, cached_tokens)
        if found.difference == "none":
            return None
        if found.difference == "evicted":  # Anthropic has no word for it
            return {"cache_miss_reason": {"type": "unavailable"}}
        reason = {"type": f"{found.difference}_changed", "cache_missed_input_tokens": found.missed_tokens}
        return {"cache_miss_reason": reason}


class _MessageCall:
    """A message that is being made."""

    def __init__(
        self,
        service: Service,
        body: MessagesBody,
        tools: ToolUse,
        generation: Generation,
        keeps: list[Keep],
        diagnosis: _Diagnosis | None,
    ) -> None:
        self.generation = generation
        self._diagnosis = diagnosis
        self._service = service
        self._body = body
        self._tools = tools
        self._keeps = keeps
        self._id = f"msg_{secrets.token_hex(12)}"

    @classmethod
    async def of(
        cls, service: Service, body: MessagesBody, request: Request, history: BoundedStore[Asked]
    ) -> _MessageCall:
        """The call that `body` asks for. Raises: ApiError, RadixKVError."""
        tools = body.tool_use()
        use = _as_generation(body)
        params = sampling_params(use, max_tokens=body.max_tokens)
        grammar = grammar_of(use, None, tools)
        if grammar is None and body.output_config is not None and body.output_config.format is not None:
            grammar = await in_thread(of_json_schema, body.output_config.format.schema_, "output_config")
        params = await service.fitting(params, grammar)
        chat = body.chat()
        prompt = await service.chat_prompts.prompt(chat, owner_of(request, body.cache_salt))
        keeps = await service.chat_prompts.keeps(chat, prompt)
        diagnosis = None
        if body.diagnostics is not None:
            asked = Asked.of(tenant_of(request).name, chat, prompt.ids)
            diagnosis = _Diagnosis(asked, body.diagnostics.previous_message_id, history)
        generation = service.generation([prompt.ids], params, use, tenant_of(request), keeps, prompt)
        return cls(service, body, tools, generation, keeps, diagnosis)

    def answer(self, output: RequestOutput) -> dict[str, Any]:
        """The message as a whole."""
        parsed = self._tools.parsed(self._service.engine.tokenizer, output)
        blocks = [_whole_block(part) for part in parsed.parts or [""]]
        message = {**self._message(blocks, self._usage(output)), **_stop(output, len(parsed.calls))}
        if self._diagnosis is not None:
            message["diagnostics"] = self._diagnosis.of_message(self._id, output.cached_tokens)
        return message

    def streamed(self) -> _MessageEvents:
        """The message, piece by piece."""
        return _MessageEvents(self, self._tools.reader(self._service.engine.tokenizer))

    def start(self, progress: Progress) -> dict[str, Any]:
        """The message before its first block. What was cached is final; more of the prompt may be stored yet."""
        usage = progress.usage
        assert usage is not None, progress
        message = self._message([], usage_object(usage, self._keeps))
        if self._diagnosis is not None:
            message["diagnostics"] = self._diagnosis.of_message(self._id, usage.cached_tokens)
        return {**message, "stop_reason": None, "stop_sequence": None}

    def end(self, output: RequestOutput, num_calls: int) -> Iterator[bytes]:
        """The last events, after those of the blocks."""
        stop = {"type": "message_delta", "delta": _stop(output, num_calls), "usage": self._usage(output)}
        yield event(stop, "message_delta")
        yield event({"type": "message_stop"}, "message_stop")

    def _message(self, blocks: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._service.model_name,
            "content": blocks,
            "usage": usage,
        }

    def _usage(self, output: RequestOutput) -> dict[str, Any]:
        return usage_object(self.generation.usage([output]), self._keeps)


class _MessageEvents:
    """Makes the events of a message."""

    def __init__(self, call: _MessageCall, reader: AnswerReader) -> None:
        self._call = call
        self._reader = reader
        self._blocks = BlockStream()
        self._has_begun = False

    def events(self, index: int, progress: Progress) -> Iterator[bytes]:
        """The events that tell what the answer gained."""
        if not self._has_begun:
            self._has_begun = True
            yield event({"type": "message_start", "message": self._call.start(progress)}, "message_start")
        output = progress.output
        found = self._reader.push(progress.text)
        if output is not None:
            found += self._reader.finish(output.token_ids)
        yield from chain.from_iterable(map(self._blocks.events, found))
        if output is not None:
            yield from self._blocks.end()
            yield from self._call.end(output, self._reader.num_calls)

    def last_events(self) -> Sequence[bytes]:
        """None: those of the last piece end the message."""
        return ()


class BlockStream:
    """Makes the events of a message's blocks from the pieces of its answer."""

    def __init__(self) -> None:
        self._index = 0  # of the block that is open, or else of the next one
        self._is_text_open = False

    def events(self, piece: Piece) -> Iterator[bytes]:
        """The events that tell of `piece`."""
        if isinstance(piece, Text):
            if not self._is_text_open:
                yield from self._open_text()
            yield _block_delta(self._index, {"type": "text_delta", "text": piece.text})
            return
        yield from self._close_text()
        if isinstance(piece, CallBegun):
            yield _block_start(self._index, _tool_use(piece.id, piece.name, {}))
        elif isinstance(piece, Arguments):
            yield _block_delta(self._index, {"type": "input_json_delta", "partial_json": piece.text})
        else:
            yield self._stop()

    def end(self) -> Iterator[bytes]:
        """The last events; an empty answer is an empty text."""
        if self._index == 0 and not self._is_text_open:
            yield from self._open_text()
        yield from self._close_text()

    def _open_text(self) -> Iterator[bytes]:
        self._is_text_open = True
        yield _block_start(self._index, {"type": "text", "text": ""})

    def _close_text(self) -> Iterator[bytes]:
        if self._is_text_open:
            self._is_text_open = False
            yield self._stop()

    def _stop(self) -> bytes:
        index, self._index = self._index, self._index + 1
        return event({"type": "content_block_stop", "index": index}, "content_block_stop")


def usage_object(usage: Usage, keeps: Sequence[Keep]) -> dict[str, Any]:
    """`usage`, as Anthropic writes it: the three kinds of input tokens add up to the prompt.

    `cache_creation` tells what was written before the breakpoints, by their ttl; what is written after the last one is
    in the cache, too, but nobody promised to keep it.
    """
    written = {TTL_S["5m"]: 0, TTL_S["1h"]: 0}
    done = usage.cached_tokens
    for prefix, keep_for_s in sorted(keeps, key=_prefix_length):
        written[keep_for_s] += max(0, len(prefix) - done)
        done = max(done, len(prefix))
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens - usage.cache_write_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_read_by": usage.cached_by,
        "cache_creation_input_tokens": usage.cache_write_tokens,
        "cache_creation": {
            "ephemeral_5m_input_tokens": written[TTL_S["5m"]],
            "ephemeral_1h_input_tokens": written[TTL_S["1h"]],
        },
        "output_tokens": usage.output_tokens,
    }


def _prefix_length(keep: Keep) -> int:
    return len(keep.prefix)


def _as_generation(body: MessagesBody) -> GenerationBody:
    """The fields that all interfaces share, under the names of OpenAI's."""
    return GenerationBody(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        stop=body.stop_sequences,
        cache_salt=body.cache_salt,
        priority=body.priority,
        radixkv_continue=body.radixkv_continue,
        radixkv_output_ids=body.radixkv_output_ids,
    )


def _stop(output: RequestOutput, num_calls: int) -> dict[str, Any]:
    sequence = output.stopped_by if isinstance(output.stopped_by, str) else None
    if output.finish_reason == "length":
        reason = "max_tokens"
    elif num_calls:
        reason = "tool_use"
    else:
        reason = "end_turn" if sequence is None else "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": sequence}


def _whole_block(part: str | Call) -> dict[str, Any]:
    """The block of a text or a call. Of arguments that were cut off it has the members that are whole."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return _tool_use(part.id, part.name, whole_members(part.arguments))


def _tool_use(call_id: str, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id.replace("call_", "toolu_", 1), "name": name, "input": arguments}


def _block_start(index: int, block: dict[str, Any]) -> bytes:
    return event({"type": "content_block_start", "index": index, "content_block": block}, "content_block_start")


def _block_delta(index: int, delta: dict[str, Any]) -> bytes:
    return event({"type": "content_block_delta", "index": index, "delta": delta}, "content_block_delta")
