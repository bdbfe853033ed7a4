"""Prompts of chats: what the model's chat template makes of messages."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from radixkv.cache.token_ids import TokenIds, common_tokens
from radixkv.engine.chat_template import placeholders
from radixkv.engine.outputs import RequestOutput
from radixkv.serving.errors import ApiError, bad_request
from radixkv.serving.generation import Ids, Keep
from radixkv.serving.kept_answers import KeptAnswers, Owner, text_after

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


class ChatPrompt(NamedTuple):
    """A chat as text and as ids, and whose it is."""

    text: str
    ids: Ids
    owner: Owner


class TextEncoder(Protocol):
    """What makes ids of texts: an engine, or a tokenizer without one."""

    def require_tokenizer(self, what_for: str) -> Any:
        """The tokenizer. Raises: MissingTokenizerError."""
        ...

    def known_ids(self, ids: TokenIds) -> Ids:
        """`ids` of the model's vocabulary. Raises: InvalidTokenIdsError, TokenIdsTypeError."""
        ...

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> Ids:
        """The ids of `text`. Raises: InvalidRequestError, InvalidTokenIdsError, MissingTokenizerError."""
        ...


class ChatPrompts:
    """Renders chats with the chat template of an engine's tokenizer, and encodes them. Any thread may call it."""

    def __init__(self, engine: TextEncoder, kept: KeptAnswers | None = None) -> None:
        """kept: answers whose own ids are used where their text comes back."""
        self._engine = engine
        self._kept = kept

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

    async def prompt(self, chat: Chat, owner: Owner) -> ChatPrompt:
        """The prompt of `chat`, which is `owner`'s. Raises: as `render`; InvalidRequestError, InvalidTokenIdsError."""
        text = await asyncio.to_thread(self.render, chat)
        return ChatPrompt(text, await self._encode(text, owner), owner)

    def remember(self, prompt: ChatPrompt, output: RequestOutput) -> None:
        """Keep the ids of an answer to `prompt`, if they are kept at all."""
        if self._kept is not None and output.text and output.finish_reason in ("stop", "length"):
            self._kept.add(prompt.owner, prompt.text, prompt.ids, output.text, output.token_ids)

    async def _encode(self, text: str, owner: Owner) -> Ids:
        """The ids of `text`: those that were kept of its beginning, as far as there are some, and of the rest."""
        kept = None if self._kept is None else self._kept.find(owner, text)
        if kept is not None:
            rest = text[kept.characters :]
            ids = await self._engine.encode(rest, add_special_tokens=False) if rest else kept.ids[:0]
            tokenizer = self._engine.require_tokenizer("a chat")
            if await asyncio.to_thread(text_after, tokenizer, kept.ids, ids.tolist()) == rest:
                return np.concatenate([kept.ids, ids])
        return await self._engine.encode(text, add_special_tokens=False)

    async def keeps(self, chat: Chat, prompt: ChatPrompt) -> list[Keep]:
        """The prefixes of `prompt`, which is that of `chat`, that its breakpoints end: to the token."""
        return [await self._keep(chat, prompt, point) for point in chat.breakpoints]

    async def _keep(self, chat: Chat, prompt: ChatPrompt, point: Breakpoint) -> Keep:
        text, ids = await asyncio.to_thread(self._text_before, chat, point), prompt.ids
        prefix = await self._encode(text, prompt.owner) if text else ids[:0]
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
