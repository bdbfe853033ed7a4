"""The bodies of requests for Anthropic's messages, and what a chat template takes for them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from radixkv.serving.answer_form import ToolUse
from radixkv.serving.bodies import SALT_CHARACTERS, Body
from radixkv.serving.cache_use import MAX_BREAKPOINTS, TTL_S
from radixkv.serving.chat_prompts import Breakpoint, Chat, Message
from radixkv.serving.errors import bad_request
from radixkv.serving.openai_chat_body import template_kwargs


class CacheControl(Body):
    """The end of a prefix that is to be kept."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None

    @property
    def keep_for_s(self) -> float:
        """For how long."""
        return TTL_S[self.ttl or "5m"]


class Block(Body):
    """A part of a message: a text, a call of a tool, or its result. Others are refused."""

    type: str
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[Block] | None = None
    is_error: bool | None = None
    thinking: str | None = None
    signature: str | None = None
    citations: Any | None = None
    cache_control: CacheControl | None = None


class MessageTurn(Body):
    """A turn."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class ToolDefinition(Body):
    """A tool that the model may call."""

    name: str = Field(min_length=1, max_length=256)
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None


class ToolChoice(Body):
    """Whether tools are called, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputFormat(Body):
    """A schema that the answer must fit."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    """How the answer is to be written."""

    effort: str | None = None
    format: OutputFormat | None = None


class DiagnosticsAsked(Body):
    """Asks why the cache was missed."""

    previous_message_id: str | None = None


class CountBody(Body):
    """A request whose prompt's tokens are to be counted."""

    model: str | None = None
    messages: list[MessageTurn] = Field(min_length=1)
    system: str | list[Block] | None = None
    tools: list[ToolDefinition] | None = None
    tool_choice: ToolChoice | None = None
    cache_control: CacheControl | None = None
    output_config: OutputConfig | None = None
    thinking: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def tool_use(self) -> ToolUse:
        """Which tools may be called, and which must. Raises: ApiError."""
        schemas = {tool.name: tool.input_schema or {} for tool in self.tools or ()}
        choice = self.tool_choice
        if choice is None:
            return ToolUse(schemas)
        parallel = not choice.disable_parallel_tool_use
        if choice.type == "none":
            return ToolUse({}, (), parallel)
        if choice.type == "auto":
            return ToolUse(schemas, (), parallel)
        forced = tuple(schemas) if choice.type == "any" else (choice.name or "",)
        if not forced or not set(forced) <= set(schemas):
            raise bad_request("tool_choice must name one of the tools", "tool_choice")
        return ToolUse(schemas, forced, parallel)

    def chat(self) -> Chat:
        """The conversation, as a chat template takes it. Raises: ApiError."""
        builder = _ChatBuilder()
        if self.system:
            builder.add_system(self.system)
        for number, turn in enumerate(self.messages):
            builder.add_turn(turn, f"messages[{number}]")
        points = [Breakpoint(None, 0, t.cache_control.keep_for_s) for t in self.tools or () if t.cache_control]
        points += builder.breakpoints
        if self.cache_control is not None:
            last = len(builder.messages) - 1
            points.append(Breakpoint(last, len(builder.messages[last]["content"]), self.cache_control.keep_for_s))
        if len(points) > MAX_BREAKPOINTS:
            raise bad_request(f"at most {MAX_BREAKPOINTS} blocks may have a cache_control; got {len(points)}")
        offered = [] if self.tool_choice is not None and self.tool_choice.type == "none" else self.tools or []
        return Chat(
            messages=builder.messages,
            tools=[_as_function(tool) for tool in offered],
            kwargs=template_kwargs(self.chat_template_kwargs or {}),
            breakpoints=points,
            continues=self.messages[-1].role == "assistant",
        )


class MessagesBody(CountBody):
    """A request for a message."""

    max_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    diagnostics: DiagnosticsAsked | None = None
    cache_salt: str | None = Field(default=None, min_length=1, max_length=SALT_CHARACTERS)
    priority: int | None = None
    radixkv_continue: bool | None = None
    radixkv_output_ids: list[int] | None = None
    # accepted, and without meaning here
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None


class _ChatBuilder:
    """Makes messages for a chat template, and notes where blocks with a `cache_control` end."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.breakpoints: list[Breakpoint] = []

    def add_system(self, content: str | list[Block]) -> None:
        self.messages.append({"role": "system", "content": ""})
        self._add_texts(content, "system")

    def add_turn(self, turn: MessageTurn, place: str) -> None:
        if turn.role == "system":
            self.add_system(turn.content)
        elif isinstance(turn.content, str):
            self.messages.append({"role": turn.role, "content": turn.content})
        else:
            self._add_blocks(turn.role, turn.content, f"{place}.content")

    def _add_blocks(self, role: str, blocks: list[Block], place: str) -> None:
        """Results of tools become messages of their own, before the text beside them."""
        results = [(number, block) for number, block in enumerate(blocks) if block.type == "tool_result"]
        for number, block in results:
            if role != "user" or block.tool_use_id is None:
                raise bad_request(f"{place}[{number}]: a tool_result is the user's, with a tool_use_id", f"{place}")
            self.messages.append({"role": "tool", "content": "", "tool_call_id": block.tool_use_id})
            self._add_texts(block.content or "", f"{place}[{number}].content")
            self._note(block.cache_control)
        others = [block for block in blocks if block.type != "tool_result"]
        if others or not blocks:
            self.messages.append({"role": role, "content": ""})
            self._add_texts(others, place)

    def _add_texts(self, content: str | list[Block], place: str) -> None:
        """Add blocks to the last message, texts as lines of their own."""
        message = self.messages[-1]
        if isinstance(content, str):
            message["content"] += content
            return
        for block in content:
            if block.type == "tool_use" and message["role"] == "assistant" and block.name is not None:
                call = {"name": block.name, "arguments": block.input or {}}
                message.setdefault("tool_calls", []).append({"id": block.id, "type": "function", "function": call})
            elif block.type == "text" and block.text is not None:
                message["content"] += f"\n{block.text}" if message["content"] else block.text
            elif block.type not in ("thinking", "redacted_thinking"):
                raise bad_request(
                    f"{place}: blocks must be texts, calls of tools or their results; got type {block.type[:40]!r}",
                    place,
                )
            self._note(block.cache_control)

    def _note(self, control: CacheControl | None) -> None:
        if control is not None:
            last = len(self.messages) - 1
            self.breakpoints.append(Breakpoint(last, len(self.messages[last]["content"]), control.keep_for_s))


def _as_function(tool: ToolDefinition) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema or {}}
    if tool.description is not None:
        function["description"] = tool.description
    return {"type": "function", "function": function}
