"""Prompts of chats: what the model's chat template makes of messages."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

from radixkv.cache.token_ids import common_tokens
from radixkv.engine.async_engine import AsyncEngine
from radixkv.engine.chat_template import placeholders
from radixkv.serving.errors import ApiError, bad_request
from radixkv.serving.generation import Ids, Keep

Message: TypeAlias = "dict[str, Any]"


class Breakpoint(NamedTuple):
    """The end of a prefix that is to be kept: after the first `characters` of the content of a message.

    `message` is its number; None is the end of what comes before all messages, as descriptions of tools do.
    """

    message: int | None
    characters: int
    keep_for_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """A conversation as a chat template takes it.

    Attributes:
        messages: each with a role and a content, which is text, or None beside tool calls.
        tools: what the model may call, as OpenAI writes it.
        kwargs: what the template is given besides.
        breakpoints: ends of prefixes that are to be kept.
        continues: whether the last message is to be continued, rather than answered.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    breakpoints: Sequence[Breakpoint] = ()
    continues: bool = False


class ChatPrompts:
    """Renders chats with the chat template of an engine's tokenizer, and encodes them. Any thread may call it."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    def render(self, chat: Chat) -> str:
        """The text of `chat`, up to the point where the answer begins. Raises: ApiError, MissingTokenizerError."""
        tokenizer = self._engine.require_tokenizer("a chat")
        if not getattr(tokenizer, "chat_template", None):
            raise ApiError(400, "the model has no chat template; use /v1/completions", param="messages")
        try:
            text: str = tokenizer.apply_chat_template(
                [dict(message) for message in chat.messages],
                tools=[dict(tool) for tool in chat.tools] or None,
                tokenize=False,
                add_generation_prompt=not chat.continues,
                continue_final_message=chat.continues,
                **chat.kwargs,
            )
        except Exception as error:  # templates raise what they like, of jinja2 and of Python
            raise bad_request(f"the chat template refuses these messages: {error}", "messages") from error
        return text

    async def encode(self, chat: Chat) -> Ids:
        """The token ids of `chat`. Raises: as `render`; InvalidRequestError, InvalidTokenIdsError."""
        text = await asyncio.to_thread(self.render, chat)
        return await self._engine.encode(text, add_special_tokens=False)

    async def keeps(self, chat: Chat, ids: Ids) -> list[Keep]:
        """The prefixes of `ids`, the prompt of `chat`, that its breakpoints end: to the token."""
        return [await self._keep(chat, ids, point) for point in chat.breakpoints]

    async def _keep(self, chat: Chat, ids: Ids, point: Breakpoint) -> Keep:
        text = await asyncio.to_thread(self._text_before, chat, point)
        prefix = await self._engine.encode(text, add_special_tokens=False) if text else ids[:0]
        return Keep(ids[: common_tokens(ids, prefix)], point.keep_for_s)

    def _text_before(self, chat: Chat, point: Breakpoint) -> str:
        """What the template writes before a breakpoint."""
        (mark,) = placeholders(1, chat.messages)
        messages = [dict(message) for message in chat.messages]
        for number, message in enumerate(messages):
            if point.message is None:
                message["content"] = mark
            elif number == point.message:
                content = message["content"]
                message["content"] = content[: point.characters] + mark + content[point.characters :]
        marked, text = self.render(replace(chat, messages=messages)).partition(mark)[0], self.render(chat)
        return marked[: _common_length(marked, text)]


def _common_length(a: str, b: str) -> int:
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)
