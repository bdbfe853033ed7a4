"""Prompts of chats: what the model's chat template makes of messages."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from radixkv.engine.async_engine import AsyncEngine
from radixkv.serving.errors import ApiError, bad_request
from radixkv.serving.generation import Ids

Message: TypeAlias = "dict[str, Any]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """A conversation as a chat template takes it.

    Attributes:
        messages: each with a role and a content, which is text, or None beside tool calls.
        tools: what the model may call, as OpenAI writes it.
        kwargs: what the template is given besides.
        continues: whether the last message is to be continued, rather than answered.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
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
