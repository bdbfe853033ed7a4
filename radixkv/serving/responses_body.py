"""The body of a request for OpenAI's responses, and the chat completion that it stands for."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from radixkv.serving.bodies import Body, PromptCacheOptions
from radixkv.serving.errors import bad_request
from radixkv.serving.openai_chat_body import (
    ChatBody,
    ChatMessage,
    ContentPart,
    FunctionCall,
    FunctionDefinition,
    JsonSchema,
    ResponseFormat,
    Tool,
    ToolCall,
    content_text,
)


class ResponsesCacheOptions(PromptCacheOptions):
    """How long what a request leaves in the cache should stay there, and with what it is to be compared."""

    comparison_response_id: str | None = None


class InputItem(Body):
    """A message, a call of a function, or its result. Others are refused."""

    type: str = "message"
    id: str | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[ContentPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[ContentPart] | None = None
    status: str | None = None


class FunctionTool(Body):
    """A function that the model may call."""

    type: Literal["function"]
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class TextFormat(Body):
    """What form the answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextConfig(Body):
    """How the answer is to be written."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ResponsesBody(Body):
    """A request for a response."""

    model: str | None = None
    input: str | list[InputItem]
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    text: TextConfig | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_options: ResponsesCacheOptions | None = None
    cache_salt: str | None = None
    priority: int | None = None
    stream: bool | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    radixkv_continue: bool | None = None
    radixkv_output_ids: list[int] | None = None
    # accepted, and without meaning here
    include: list[str] | None = None
    prompt_cache_key: str | None = None
    reasoning: dict[str, Any] | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    truncation: str | None = None
    user: str | None = None

    def new_messages(self) -> list[ChatMessage]:
        """The messages that `input` adds to the conversation. Raises: ApiError."""
        if isinstance(self.input, str):
            return [ChatMessage(role="user", content=self.input)]
        messages: list[ChatMessage] = []
        for number, item in enumerate(self.input):
            _add(messages, item, f"input[{number}]")
        return messages

    def as_chat(self, messages: list[ChatMessage]) -> ChatBody:
        """The chat completion for `messages`, to which the instructions come first. Raises: ApiError."""
        system = [] if self.instructions is None else [ChatMessage(role="system", content=self.instructions)]
        if not system + messages:
            raise bad_request("input must not be empty", "input")
        return ChatBody(
            messages=system + messages,
            max_completion_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            tools=[_tool(tool) for tool in self.tools or ()],
            tool_choice=_choice(self.tool_choice),
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=_format(self.text),
            prompt_cache_options=self.prompt_cache_options,
            cache_salt=self.cache_salt,
            priority=self.priority,
            chat_template_kwargs=self.chat_template_kwargs,
            radixkv_continue=self.radixkv_continue,
            radixkv_output_ids=self.radixkv_output_ids,
        )


def _add(messages: list[ChatMessage], item: InputItem, place: str) -> None:
    match item:
        case InputItem(type="message", role=str(role)):
            messages.append(ChatMessage(role=role, content=item.content or ""))
        case InputItem(type="function_call", name=str(name)):
            call = ToolCall(id=item.call_id, function=FunctionCall(name=name, arguments=item.arguments or "{}"))
            if messages and messages[-1].role == "assistant":
                messages[-1] = messages[-1].model_copy(update={"tool_calls": [*(messages[-1].tool_calls or ()), call]})
            else:
                messages.append(ChatMessage(role="assistant", tool_calls=[call]))
        case InputItem(type="function_call_output", call_id=str(call_id)):
            text = content_text(item.output, f"{place}.output")
            messages.append(ChatMessage(role="tool", content=text, tool_call_id=call_id))
        case InputItem(type="reasoning"):
            pass
        case _:
            raise bad_request(
                f"{place}: items must be messages with a role, calls of functions or their outputs; "
                f"got type {item.type[:40]!r}",
                place,
            )


def _tool(tool: FunctionTool) -> Tool:
    function = FunctionDefinition(
        name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict
    )
    return Tool(type="function", function=function)


def _choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    if isinstance(choice, dict):
        return {"type": choice.get("type"), "function": {"name": choice.get("name")}}
    return choice


def _format(text: TextConfig | None) -> ResponseFormat | None:
    if text is None or text.format is None:
        return None
    schema = None
    if text.format.schema_ is not None:
        schema = JsonSchema.model_validate({"schema": text.format.schema_})
    return ResponseFormat(type=text.format.type, json_schema=schema)
