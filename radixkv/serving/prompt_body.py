"""A request's body of which the prompt alone is wanted: a text, token ids, or a chat."""

from __future__ import annotations

from typing import Any

from radixkv.serving.bodies import Body
from radixkv.serving.chat_prompts import Chat, ChatPrompts, TextEncoder
from radixkv.serving.errors import bad_request
from radixkv.serving.generation import Ids
from radixkv.serving.kept_answers import Owner
from radixkv.serving.openai_chat_body import ChatBody, ChatMessage, Tool
from radixkv.serving.service import Service


class PromptBody(Body):
    """A text, token ids or a chat; a whole request for a completion has these fields, too."""

    model: str | None = None
    prompt: str | list[int] | None = None
    messages: list[ChatMessage] | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None

    def chat(self) -> Chat | None:
        """The chat; None if it is none. Raises: ApiError unless there is either a prompt or messages."""
        if (self.prompt is None) == (self.messages is None):
            raise bad_request("give either prompt or messages", "prompt")
        if self.messages is None:
            return None
        if not self.messages:
            raise bad_request("messages must not be empty", "messages")
        return ChatBody(
            messages=self.messages,
            tools=self.tools,
            tool_choice=self.tool_choice,
            chat_template_kwargs=self.chat_template_kwargs,
            continue_final_message=self.continue_final_message,
        ).chat()


async def ids_of(service: Service, body: PromptBody, owner: Owner, *, add_special_tokens: bool = True) -> Ids:
    """The token ids of `owner`'s prompt. Raises: ApiError, RadixKVError."""
    return await prompt_ids(service.engine, service.chat_prompts, body, owner, add_special_tokens=add_special_tokens)


async def prompt_ids(
    encoder: TextEncoder, chats: ChatPrompts, body: PromptBody, owner: Owner, *, add_special_tokens: bool = True
) -> Ids:
    """As `ids_of`, without a service."""
    chat = body.chat()
    if chat is not None:
        return (await chats.prompt(chat, owner)).ids
    if isinstance(body.prompt, str):
        return await encoder.encode(body.prompt, add_special_tokens=add_special_tokens)
    return encoder.known_ids(body.prompt or [])
