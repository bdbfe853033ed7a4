"""The token ids of the prompt in a request, as the replica that gets it will make them: by the same code.

The ids are exact, except where only the replica knows them: of answers whose ids it kept (`keep_answer_ids`), and of
responses that it stored (`previous_response_id`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from radixkv.cache.token_ids import TokenIds
from radixkv.engine.intake import ContextLimit, Intake
from radixkv.errors import RadixKVError
from radixkv.serving.anthropic_body import CountBody, MessagesBody
from radixkv.serving.cache_routes import CacheBody
from radixkv.serving.chat_prompts import Chat, ChatPrompts
from radixkv.serving.errors import ApiError
from radixkv.serving.generation import Ids
from radixkv.serving.openai_chat_body import ChatBody
from radixkv.serving.openai_completions import CompletionBody, encode_all
from radixkv.serving.prompt_body import prompt_ids
from radixkv.serving.responses_body import ResponsesBody

NOBODY = ("", None)
UNBOUNDED = ContextLimit(2**31 - 1, "", "")


@dataclass(frozen=True, slots=True)
class KnownPrompts:
    """What a request asks for, as far as its prompts are concerned.

    Attributes:
        prompts: the ids of each; None if they are not known.
        why_not: why they are not known.
        cache_salt: of the request.
        stored_response: the id of a stored response that the request goes on from.
        continues: whether the client wants a stream to go on at another replica if its own is lost.
    """

    prompts: list[Ids] | None = None
    why_not: str = ""
    cache_salt: str | None = None
    stored_response: str | None = None
    continues: bool = False

    @property
    def num_tokens(self) -> int:
        """Of all prompts; 0 if they are not known."""
        return sum(map(len, self.prompts or ()))


class PromptReader:
    """Reads the prompts of requests with a model's tokenizer and chat template. O(prompt), in a thread of its own."""

    def __init__(self, tokenizer: Any | None, vocab_size: int) -> None:
        self._encoder = _Encoder(tokenizer, vocab_size)
        self._chats = ChatPrompts(self._encoder)
        self._readers: dict[str, tuple[type[BaseModel], Callable[[Any], Awaitable[list[Ids]]]]] = {
            "/v1/chat/completions": (ChatBody, self._of_chat),
            "/v1/completions": (CompletionBody, self._of_completion),
            "/v1/responses": (ResponsesBody, self._of_response),
            "/v1/messages": (MessagesBody, self._of_message),
            "/v1/messages/count_tokens": (CountBody, self._of_message),
            "/v1/cache/prewarm": (CacheBody, self._of_cache),
            "/v1/cache/explain": (CacheBody, self._of_cache),
        }

    async def read(self, path: str, content: bytes) -> KnownPrompts:
        """The prompts in the body of a request for `path`."""
        kind, ids_of = self._readers[path]
        try:
            body = await asyncio.to_thread(kind.model_validate_json, content)
        except ValidationError:
            return KnownPrompts(None, "the body is not as this path takes it")
        salt, stored = getattr(body, "cache_salt", None), getattr(body, "previous_response_id", None)
        continues = bool(getattr(body, "radixkv_continue", None))
        if stored is not None:
            return KnownPrompts(None, "it goes on from a stored response", salt, stored, continues)
        try:
            return KnownPrompts(await ids_of(body), "", salt, None, continues)
        except (ApiError, RadixKVError) as error:  # the replica will say it, too
            return KnownPrompts(None, f"its prompt cannot be made: {error}", salt, None, continues)

    async def _of_chat(self, body: ChatBody) -> list[Ids]:
        return [await self._of(body.chat())]

    async def _of_completion(self, body: CompletionBody) -> list[Ids]:
        return await encode_all(self._encoder, body.prompt)

    async def _of_response(self, body: ResponsesBody) -> list[Ids]:
        return [await self._of(body.as_chat(body.new_messages()).chat())]

    async def _of_message(self, body: CountBody) -> list[Ids]:
        return [await self._of(body.chat())]

    async def _of_cache(self, body: CacheBody) -> list[Ids]:
        return [await prompt_ids(self._encoder, self._chats, body, NOBODY)]

    async def _of(self, chat: Chat) -> Ids:
        return (await self._chats.prompt(chat, NOBODY)).ids


class _Encoder:
    """An engine's way from texts to ids, without an engine."""

    def __init__(self, tokenizer: Any | None, vocab_size: int) -> None:
        self._intake = Intake(tokenizer, vocab_size=vocab_size, eos_ids=frozenset(), limit=UNBOUNDED, seed=0)

    def require_tokenizer(self, what_for: str) -> Any:
        return self._intake.require_tokenizer(what_for)

    def known_ids(self, ids: TokenIds) -> NDArray[Any]:
        return self._intake.known_ids(ids)

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> Ids:
        return await asyncio.to_thread(self._intake.encode, text, add_special_tokens=add_special_tokens)
