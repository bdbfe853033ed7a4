"""The body of a request for a chat completion, and its messages as a chat template takes them."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field

from radixkv.serving.answer_form import ToolUse
from radixkv.serving.bodies import Body, GenerationBody
from radixkv.serving.cache_use import MAX_BREAKPOINTS, TTL_S, default_ttl_s
from radixkv.serving.chat_prompts import Breakpoint, Chat, Message
from radixkv.serving.errors import bad_request

TEXT_TYPES = ("text", "input_text", "output_text", "refusal")


class CacheBreakpoint(Body):
    """The end of a prefix that is to be kept."""

    mode: Literal["explicit"] = "explicit"
    ttl: Literal["30m", "12h"] | None = None


class ContentPart(Body):
    """A part of a message. Parts other than texts are refused."""

    type: str
    text: str | None = None
    refusal: str | None = None
    prompt_cache_breakpoint: CacheBreakpoint | None = None


class FunctionCall(Body):
    """What a model called a function with."""

    name: str
    arguments: str


class ToolCall(Body):
    """A call of a tool."""

    id: str | None = None
    type: str = "function"
    function: FunctionCall


class ChatMessage(Body):
    """A turn."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None


class FunctionDefinition(Body):
    """A function that the model may call."""

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool that the model may call."""

    type: Literal["function"]
    function: FunctionDefinition


class JsonSchema(Body):
    """A schema that the answer must fit."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """What form the answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatBody(GenerationBody):
    """A request for a chat completion."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    # accepted, and without meaning here
    metadata: dict[str, str] | None = None
    modalities: list[str] | None = None
    prompt_cache_key: str | None = None
    reasoning_effort: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    verbosity: str | None = None

    @property
    def asked_tokens(self) -> int | None:
        """New tokens at most, under either name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def asked_tokens_field(self) -> str:
        """Under which name."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    def chat(self) -> Chat:
        """The conversation, as a chat template takes it. Raises: ApiError."""
        offered = [] if self.tool_choice == "none" else self.tools or []
        return Chat(
            messages=[_message(message, f"messages[{i}]") for i, message in enumerate(self.messages)],
            tools=[tool.model_dump(exclude_none=True) for tool in offered],
            breakpoints=self._breakpoints()[-MAX_BREAKPOINTS:],
            kwargs=template_kwargs(self.chat_template_kwargs or {}),
            continues=bool(self.continue_final_message),
        )

    def tool_use(self) -> ToolUse:
        """Which tools may be called, and which must. Raises: ApiError."""
        schemas = {tool.function.name: tool.function.parameters or {} for tool in self.tools or ()}
        parallel = self.parallel_tool_calls is not False
        choice = self.tool_choice
        if isinstance(choice, dict):
            function = choice.get("function")
            name = function.get("name") if isinstance(function, dict) else None
            if choice.get("type") != "function" or name not in schemas:
                raise bad_request("tool_choice must name one of the functions in tools", "tool_choice")
            return ToolUse(schemas, (str(name),), parallel)
        if choice not in (None, "none", "auto", "required"):
            raise bad_request(
                f"tool_choice must be none, auto, required or a function; got {choice[:40]!r}", "tool_choice"
            )
        if choice == "required" and not schemas:
            raise bad_request("tool_choice is required, but there are no tools", "tool_choice")
        return ToolUse({} if choice == "none" else schemas, tuple(schemas) if choice == "required" else (), parallel)

    def _breakpoints(self) -> list[Breakpoint]:
        """Where parts end that are marked so."""
        found = []
        for number, message in enumerate(self.messages):
            for count, part in enumerate(message.content if isinstance(message.content, list) else (), start=1):
                if (mark := part.prompt_cache_breakpoint) is not None:
                    ttl_s = default_ttl_s(self.prompt_cache_options) if mark.ttl is None else TTL_S[mark.ttl]
                    before = content_text(list(message.content or ())[:count], f"messages[{number}].content")  # type: ignore[arg-type]
                    found.append(Breakpoint(number, len(before), ttl_s))
        return found


_OURS = ("tokenize", "add_generation_prompt", "continue_final_message", "messages", "conversation", "tools")


def template_kwargs(given: dict[str, Any]) -> dict[str, Any]:
    """`given`, which is for the chat template alone. Raises: ApiError if it would change how the template is used."""
    for name in given:
        if name in _OURS or name.startswith("return_"):
            raise bad_request(f"chat_template_kwargs must not set {name[:100]!r}", "chat_template_kwargs")
    return given


def _message(message: ChatMessage, place: str) -> Message:
    turn: Message = {"role": "system" if message.role == "developer" else message.role}
    turn["content"] = content_text(message.content, f"{place}.content")
    if message.tool_calls:
        turn["tool_calls"] = [_tool_call(call, f"{place}.tool_calls[{i}]") for i, call in enumerate(message.tool_calls)]
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            turn[name] = value
    return turn


def content_text(content: str | list[ContentPart] | None, place: str) -> str:
    """The text of a message. Raises: ApiError if a part is no text."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for number, part in enumerate(content):
        text = part.refusal if part.type == "refusal" else part.text
        if part.type not in TEXT_TYPES or text is None:
            raise bad_request(
                f"{place}[{number}]: parts must be texts, {{'type': 'text', 'text': …}}; got type {part.type[:40]!r}",
                f"{place}[{number}]",
            )
        texts.append(text)
    return "\n".join(texts)


def _tool_call(call: ToolCall, place: str) -> Message:
    """A call as templates take it: with its arguments as an object."""
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except ValueError as error:
        raise bad_request(f"{place}.function.arguments must be JSON", f"{place}.function.arguments") from error
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.function.name, "arguments": arguments},
    }
