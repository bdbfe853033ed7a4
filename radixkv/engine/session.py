"""Conversations: exact token ids, kept from turn to turn."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.token_ids import TokenIds
from radixkv.engine.arguments import CacheOptions
from radixkv.engine.request import RequestOutput
from radixkv.engine.sampling import SamplingParams
from radixkv.errors import ClosedError, InvalidRequestError, MissingChatTemplateError

if TYPE_CHECKING:
    from radixkv.engine.engine import Engine
    from radixkv.engine.results import StreamChunk

PLACEHOLDER = "\u241fanswer\u241f"  # stands for an answer while a template is rendered around it
Message = dict[str, str]


class KVUsage(NamedTuple):
    """What a conversation's context holds in the pool.

    `context_tokens` are in the conversation; the KV of the first `tokens` of them lies in `pages` pages of
    `num_bytes` in all; the rest was evicted or not computed yet, and will be when it is needed. `shared_tokens` of
    them another cached branch or another open session uses too; `own_tokens` are this one's alone.
    """

    context_tokens: int
    tokens: int
    pages: int
    num_bytes: int
    shared_tokens: int
    own_tokens: int


class Session:
    """A conversation with an engine. It keeps token ids, not pages: its KV stays in the cache while there is room,
    and is computed again if it was evicted, so an idle session never blocks anybody.

    Past turns are never tokenised again: their exact ids are the prefix of the next prompt, and hit the cache.
    A turn that fails or is broken off leaves the conversation as it was before.

    >>> import radixkv
    >>> engine = radixkv.Engine.from_pretrained("demo", kv_cache_tokens=4096)
    >>> with engine.session(system="You are a citizen of Rome.") as chat:
    ...     first = chat.send("Who are you?", radixkv.SamplingParams(max_tokens=16))
    ...     again = chat.send("And where do you live?", radixkv.SamplingParams(max_tokens=16))
    >>> first.cached_tokens, again.cached_tokens >= first.prompt_tokens // 16 * 16
    (0, True)
    """

    def __init__(self, engine: Engine, options: CacheOptions, *, system: str | None = None) -> None:
        self._engine = engine
        self._options = options
        self._ids: NDArray[np.int32] = np.empty(0, np.int32)
        self._messages: list[Message] = [{"role": "system", "content": system}] if system is not None else []
        self._closed = False
        engine.register_session(self)

    @property
    def namespace(self) -> tuple[str | None, str | None]:
        """(`extra_key`, `cache_salt`)."""
        return self._options.namespace

    @property
    def token_ids(self) -> list[int]:
        """The conversation so far, to the token."""
        return list(map(int, self._ids))

    @property
    def messages(self) -> list[Message]:
        """The chat turns so far."""
        return [dict(message) for message in self._messages]

    def send(self, text: str, params: SamplingParams | None = None) -> RequestOutput:
        """Add a user turn through the chat template, and generate the answer.

        Raises: MissingChatTemplateError, MissingTokenizerError, PromptTooLongError, ClosedError, and whatever went
            wrong with the request.
        """
        *_, last = self.stream(text, params)
        assert last.output is not None, "the last chunk carries the output"
        return last.output

    def stream(self, text: str, params: SamplingParams | None = None) -> Generator[StreamChunk]:
        """As `send`, piece by piece; the turn counts once the iterator is exhausted."""
        self._check_open()
        prompt = np.concatenate([self._ids, self._turn_ids(text)])
        return self._run(prompt, params, [*self._messages, {"role": "user", "content": text}])

    def append(self, content: str | TokenIds) -> None:
        """Add text (encoded as it stands, without special tokens) or token ids to the context; nothing is computed.

        Raises: TokenIdsTypeError, InvalidTokenIdsError, MissingTokenizerError, ClosedError.
        """
        self._check_open()
        if isinstance(content, str):
            content = self._encode(content)
        self._ids = np.concatenate([self._ids, self._engine.known_ids(content)])

    def generate(self, params: SamplingParams | None = None) -> RequestOutput:
        """Continue the context as it stands, and add what was generated to it.

        Raises: InvalidRequestError if the context is empty, PromptTooLongError, ClosedError.
        """
        self._check_open()
        *_, last = self._run(self._ids, params, None)
        assert last.output is not None, "the last chunk carries the output"
        return last.output

    def fork(self) -> Session:
        """A second conversation with the same past, which shares all its pages. O(tokens) of ids, no KV is copied."""
        self._check_open()
        branch = Session(self._engine, self._options)
        branch._ids, branch._messages = self._ids.copy(), self.messages
        return branch

    def kv_usage(self) -> KVUsage:
        """What the context holds in the pool now. O(tokens × open sessions)."""
        self._check_open()
        with self._engine.exclusive():
            return self._kv_usage()

    def _kv_usage(self) -> KVUsage:
        cache = self._engine.cache
        extra_key, cache_salt = self.namespace
        tokens, path = cache.tree.peek_path(self._ids, extra_key=extra_key, cache_salt=cache_salt)
        shared = branching = 0
        for node in path:
            branching += node.num_tokens
            if len(node.children) > 1 or (branching > tokens):
                shared = min(branching, tokens)
        others = [s._ids for s in self._engine.open_sessions(self.namespace) if s is not self]
        in_common = max((_common_tokens(self._ids, ids) for ids in others), default=0)
        shared = max(shared, min(tokens, in_common))
        pages = np.concatenate([np.empty(0, np.int32), *(node.page_ids for node in path)])[: cache.pages_for(tokens)]
        num_bytes = self._engine.pool.bytes_of(pages, tokens)
        return KVUsage(len(self._ids), tokens, len(pages), num_bytes, shared, tokens - shared)

    def close(self) -> None:
        """End the conversation. Its KV stays in the cache until it is evicted. Idempotent."""
        self._closed = True

    @property
    def closed(self) -> bool:
        """Whether the conversation was ended."""
        return self._closed

    # -- inside ------------------------------------------------------------------------------------------------------

    def _run(
        self, prompt: NDArray[np.int32], params: SamplingParams | None, messages: list[Message] | None
    ) -> Generator[StreamChunk]:
        chunks = self._engine.stream(prompt, params, **self._options._asdict())
        return self._record(prompt, messages, chunks)

    def _record(
        self, prompt: NDArray[np.int32], messages: list[Message] | None, chunks: Generator[StreamChunk]
    ) -> Generator[StreamChunk]:
        with closing(chunks):
            yield from self._recorded(prompt, messages, chunks)

    def _recorded(
        self, prompt: NDArray[np.int32], messages: list[Message] | None, chunks: Iterator[StreamChunk]
    ) -> Generator[StreamChunk]:
        for chunk in chunks:
            if chunk.output is not None and chunk.output.finish_reason in ("stop", "length"):
                self._ids = np.concatenate([prompt, np.array(chunk.output.token_ids, np.int32)])
                if messages is not None:
                    self._messages = [*messages, {"role": "assistant", "content": chunk.output.text or ""}]
            yield chunk

    def _turn_ids(self, text: str) -> NDArray[np.int32]:
        """What the chat template puts between the conversation so far and the answer to `text`.

        What was appended or generated since the last answer counts as part of it.
        """
        user = {"role": "user", "content": text}
        if not any(message["role"] == "user" for message in self._messages):
            return self._encode(self._render([*self._messages, user]))
        placeholder = PLACEHOLDER
        while placeholder in text:
            placeholder += PLACEHOLDER
        asked = [*self._messages[:-1], {"role": "assistant", "content": placeholder}, user]
        ids = self._encode(self._render(asked).rpartition(placeholder)[2])
        # the answer may have ended with the very token that the template closes a turn with
        if len(ids) and len(self._ids) and ids[0] == self._ids[-1]:
            ids = ids[1:]
        return ids

    def _render(self, messages: list[Message]) -> str:
        tokenizer = self._engine.require_tokenizer(messages[-1]["content"])
        if not getattr(tokenizer, "chat_template", None):
            raise MissingChatTemplateError(
                "the tokenizer has no chat template; use session.append(text) and session.generate() instead"
            )
        try:
            rendered: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise what they like, of jinja2 and of Python
            raise InvalidRequestError(f"the chat template refuses this turn: {error}") from error
        return rendered

    def _encode(self, text: str) -> NDArray[np.int32]:
        return self._engine.encode(text, add_special_tokens=False)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the session was closed; open a new one with engine.session()")

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Session({len(self._ids)} tokens, {len(self._messages)} messages{', closed' if self._closed else ''})"


def _common_tokens(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    size = min(len(a), len(b))
    differs = np.flatnonzero(a[:size] != b[:size])
    return int(differs[0]) if len(differs) else size
