"""Conversations: the chat template's tokens with the answers' own ids in them, kept from turn to turn."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np

from radixkv.cache.namespace import Namespace
from radixkv.cache.token_ids import TokenIds, common_tokens
from radixkv.engine.arguments import CacheOptions
from radixkv.engine.chat_template import Message
from radixkv.engine.conversation import Composer, Conversation, Prompt, SessionExplanation
from radixkv.engine.outputs import RequestOutput
from radixkv.engine.sampling import SamplingParams
from radixkv.engine.session_file import SavedSession, UserSpecialTokens, read_session, write_session
from radixkv.engine.turn_queue import TurnQueue
from radixkv.errors import ClosedError, InvalidRequestError

if TYPE_CHECKING:
    from radixkv.engine.engine import Engine
    from radixkv.engine.outputs import Progress

logger = logging.getLogger(__name__)


class KVUsage(NamedTuple):
    """What a conversation's context holds in the pool.

    `context_tokens` are in the conversation; the KV of the first `tokens` of them lies in `pages` pages of
    `num_bytes` in all; the rest was evicted or not computed yet, and will be when it is needed. `shared_tokens` of
    them another cached branch or another open session uses too; `own_tokens` are this one's alone. `num_states` counts
    the states of recurrent layers that are kept after some of them.
    """

    context_tokens: int
    tokens: int
    pages: int
    num_bytes: int
    shared_tokens: int
    own_tokens: int
    num_states: int = 0


class Session:
    """A conversation with an engine. It keeps token ids, not pages: its KV stays in the cache while there is room,
    and is computed again if it was evicted, so an idle session blocks no other request.

    A turn's prompt is what the chat template renders of the whole conversation. Where the rendering contains an
    answer's text, the answer's own ids stand for it, so the past is the prefix of the next prompt and hits the cache.
    Where the template changes or drops an answer, or moves other text, the template decides; `explain` says what that
    costs, and a warning is logged once. What `append` and `generate` add stays as it stands.

    Threads may share a session. `send`, `stream`, `append` and `generate` run one at a time, in the order of the
    calls (a stream's turn begins with its first `next`). A thread that has a turn unfinished gets SessionBusyError
    instead of waiting for itself. `fork` and everything that only reads see the state before the running turn.
    After `close` the running turn goes on to its end and counts; turns that wait get ClosedError. A turn that fails or
    is broken off leaves the conversation as it was before.

    >>> import radixkv
    >>> engine = radixkv.Engine.from_pretrained("demo", kv_cache_tokens=4096)
    >>> with engine.session(system="You are a citizen of Rome.") as chat:
    ...     first = chat.send("Who are you?", radixkv.SamplingParams(max_tokens=16))
    ...     again = chat.send("And where do you live?", radixkv.SamplingParams(max_tokens=16))
    >>> first.cached_tokens, again.cached_tokens >= first.prompt_tokens // 16 * 16
    (0, True)
    """

    def __init__(
        self,
        engine: Engine,
        options: CacheOptions,
        *,
        system: str | None = None,
        user_special_tokens: UserSpecialTokens = "allow",
    ) -> None:
        """Begin a conversation; `Engine.session` calls it.

        user_special_tokens: "allow" lets special tokens in a user's text act as such, as the tokenizer does; "text"
            encodes them as ordinary text, so that a user cannot write a turn of another role.

        Raises: InvalidRequestError.
        """
        if system is not None:
            _check_text("system", system)
        if user_special_tokens not in ("allow", "text"):
            raise InvalidRequestError(f"user_special_tokens must be 'allow' or 'text', not {user_special_tokens!r}")
        self._engine = engine
        self._options = options
        self._user_special_tokens: UserSpecialTokens = user_special_tokens
        self._composer = Composer(engine, plain_users=user_special_tokens == "text")
        self._now = Conversation(messages=() if system is None else ({"role": "system", "content": system},))
        self._turns = TurnQueue()
        self._warned = False
        self._closed = False
        engine.register_session(self)

    @property
    def namespace(self) -> tuple[str | None, str | None]:
        """(`extra_key`, `cache_salt`)."""
        return self._options.namespace

    @property
    def token_ids(self) -> list[int]:
        """The context after the last turn, to the token."""
        return list(map(int, self._now.ids))

    @property
    def messages(self) -> list[Message]:
        """The chat turns so far, as the template gets them.

        An answer is the output's text, without what the template itself writes before an answer (a blank, a header).
        """
        return [dict(message) for message in self._now.messages]

    def send(self, text: str, params: SamplingParams | None = None) -> RequestOutput:
        """Add a user turn through the chat template, and generate the answer.

        Raises: MissingChatTemplateError, MissingTokenizerError, PromptTooLongError, InvalidRequestError if `text` is
            not text, SessionBusyError, ClosedError, and the request's own error.
        """
        *_, last = self.stream(text, params)
        assert last.output is not None, "the last chunk carries the output"
        return last.output

    def stream(self, text: str, params: SamplingParams | None = None) -> Generator[Progress]:
        """As `send`, piece by piece. The turn begins with the first `next` and counts once the iterator is exhausted.

        Closing or dropping the iterator breaks the turn off. Raises: as `send`; for bad arguments at once.

        >>> import radixkv
        >>> engine = radixkv.Engine.from_pretrained("demo", kv_cache_tokens=4096)
        >>> with engine.session() as chat:
        ...     pieces = list(chat.stream("Who are you?", radixkv.SamplingParams(max_tokens=8)))
        ...     "".join(piece.text for piece in pieces) == chat.messages[-1]["content"]
        True
        """
        self._check_open()
        _check_text("text", text)
        _check_params(params)
        seen = self._now
        prompt = self._composer.compose(seen, text)
        chunks = self._engine.stream(prompt.ids, params, **self._options._asdict())  # checks, and starts nothing yet
        return self._chat_turn(text, params, seen, prompt, chunks)

    def append(self, content: str | TokenIds) -> None:
        """Add text (encoded as it stands, without special tokens of its own) or token ids to the context.

        Nothing is computed. What is added after an answer belongs to it. Waits for a turn of another thread.

        Raises: TokenIdsTypeError, InvalidTokenIdsError, MissingTokenizerError, SessionBusyError, ClosedError.

        >>> import radixkv
        >>> engine = radixkv.Engine.from_pretrained("demo", kv_cache_tokens=4096)
        >>> with engine.session() as play:
        ...     play.append("ROMEO:\\n")
        ...     output = play.generate(radixkv.SamplingParams(max_tokens=8))
        ...     play.token_ids == output.prompt_token_ids + output.token_ids
        True
        """
        self._check_open()
        ids = self._engine.encode(content, add_special_tokens=False) if isinstance(content, str) else content
        ids = self._engine.known_ids(ids).copy()
        with self._turns.turn():
            self._check_open()
            self._now = self._now.with_added(ids, by_model=False)

    def generate(self, params: SamplingParams | None = None) -> RequestOutput:
        """Continue the context as it stands, and add what was generated to it.

        Raises: InvalidRequestError if the context is empty, PromptTooLongError, SessionBusyError, ClosedError.
        """
        self._check_open()
        _check_params(params)
        with self._turns.turn():
            self._check_open()
            with closing(self._engine.stream(self._now.ids, params, **self._options._asdict())) as chunks:
                *_, last = chunks
            assert last.output is not None, "the last chunk carries the output"
            if _counts(last.output):
                self._now = self._now.with_added(np.array(last.output.token_ids, np.int32), by_model=True)
        return last.output

    def fork(self) -> Session:
        """A second conversation with the same past, which shares all its pages. No KV is copied.

        During a turn, the branch has the state before that turn. Raises: ClosedError.

        >>> import radixkv
        >>> engine = radixkv.Engine.from_pretrained("demo", kv_cache_tokens=4096)
        >>> with engine.session() as chat:
        ...     chat.append(list(range(20, 60)))
        ...     _ = chat.generate(radixkv.SamplingParams(max_tokens=1))
        ...     branch = chat.fork()
        ...     branch.append([70, 71])
        ...     branch.kv_usage().shared_tokens, len(chat.token_ids)
        (40, 41)
        """
        self._check_open()
        branch = Session(self._engine, self._options, user_special_tokens=self._user_special_tokens)
        branch._now, branch._warned = self._now, self._warned
        return branch

    def save(self, path: str | Path) -> None:
        """Write the conversation to a file, from which `load` goes on later, also in another process.

        It holds token ids, messages, the namespace with its `cache_salt`, and no weights and no KV; it is readable for
        its owner alone, and whole at any moment. What the pool holds of the KV is handed down to the engine's tiers,
        whatever `tier_writes` says, and waited for, 10 s at most: so a later engine on the same `disk_cache` loads it.
        During a turn, the state before that turn is saved. O(tokens + vocabulary).

        Raises: SessionFileError if the file cannot be written, ClosedError.
        """
        self._check_open()
        now = self._now
        write_session(
            Path(path), SavedSession(now, self._options, self._user_special_tokens, self._warned), self._engine
        )
        extra_key, cache_salt = self.namespace
        try:
            is_below = self._engine.hand_down(now.ids, extra_key=extra_key, cache_salt=cache_salt)
        except ClosedError:  # of an engine, which handed down what it had when it was closed
            return
        if not is_below:
            logger.warning("the session is saved; what could not be written of its KV will be computed again")

    @classmethod
    def load(cls, engine: Engine, path: str | Path) -> Session:
        """Open a conversation that `save` wrote, with exactly its tokens, messages and options.

        The engine must have the same tokenizer and chat template; its weights and settings may be others. The KV comes
        from the pool, from the tiers, or is computed again.

        Raises: SessionFileError if the file cannot be read, is none of `save`, was written by a newer radixkv, is
            damaged, or belongs to another tokenizer; the message says what differs.

        >>> import radixkv, tempfile
        >>> engine = radixkv.Engine.from_pretrained("demo", kv_cache_tokens=4096)
        >>> with tempfile.TemporaryDirectory() as folder, engine.session() as chat:
        ...     _ = chat.send("Who are you?", radixkv.SamplingParams(max_tokens=8))
        ...     chat.save(f"{folder}/chat.json")
        ...     again = radixkv.Session.load(engine, f"{folder}/chat.json")
        ...     again.token_ids == chat.token_ids, again.messages == chat.messages
        (True, True)
        """
        saved = read_session(Path(path), engine)
        session = cls(engine, saved.options, user_special_tokens=saved.user_special_tokens)
        session._now, session._warned = saved.conversation, saved.warned
        return session

    def explain(self) -> SessionExplanation:
        """What the next turn keeps of this context, and what the chat template holds otherwise.

        Raises: as `send`.

        >>> import radixkv
        >>> engine = radixkv.Engine.from_pretrained("demo", kv_cache_tokens=4096)
        >>> with engine.session() as chat:
        ...     _ = chat.send("Who are you?", radixkv.SamplingParams(max_tokens=16))
        ...     explanation = chat.explain()
        >>> explanation.recomputed_tokens, explanation.changed
        (0, False)
        """
        self._check_open()
        now = self._now
        return self._composer.compose(now, "?").explain(now, self._composer.encoder.special_ids)

    def kv_usage(self) -> KVUsage:
        """What the context holds in the pool now. O(tokens × open sessions)."""
        self._check_open()
        with self._engine.exclusive():
            return self._kv_usage()

    def _kv_usage(self) -> KVUsage:
        ids = self._now.ids
        extra_key, cache_salt = self.namespace
        held = self._engine.cache.held(ids, extra_key=extra_key, cache_salt=cache_salt)
        others = [s._now.ids for s in self._engine.open_sessions(self.namespace) if s is not self]
        in_common = max((common_tokens(ids, other) for other in others), default=0)
        shared = max(held.shared_tokens, min(held.tokens, in_common))
        num_bytes = self._engine.pool.bytes_of(held.pages, held.tokens)
        namespace = Namespace.of(extra_key, cache_salt)
        states = self._engine.cache.kept_states(ids[: held.tokens], [held.pages.data], namespace, 0)
        return KVUsage(len(ids), held.tokens, len(held.pages), num_bytes, shared, held.tokens - shared, len(states))

    def close(self) -> None:
        """End the conversation. Its KV stays in the cache until it is evicted. Idempotent; never waits."""
        self._closed = True

    @property
    def closed(self) -> bool:
        """Whether the conversation was ended."""
        return self._closed

    # -- inside ------------------------------------------------------------------------------------------------------

    def _chat_turn(
        self,
        text: str,
        params: SamplingParams | None,
        seen: Conversation,
        prompt: Prompt,
        chunks: Generator[Progress],
    ) -> Generator[Progress]:
        with self._turns.turn():
            self._check_open()
            if self._now is not seen:  # other turns came in between
                prompt = self._composer.compose(self._now, text)
                chunks = self._engine.stream(prompt.ids, params, **self._options._asdict())
            self._warn_once(prompt)
            with closing(chunks):
                for chunk in chunks:
                    if chunk.output is not None and _counts(chunk.output):
                        self._now = self._composer.answered(self._now, prompt, chunk.output)
                    yield chunk

    def _warn_once(self, prompt: Prompt) -> None:
        if self._warned:
            return
        explanation = prompt.explain(self._now, self._composer.encoder.special_ids)
        if explanation.changed:
            self._warned = True
            logger.warning(
                "the chat template renders earlier turns differently once they are in the history; %d of %d tokens of "
                "context are computed again in this turn (session.explain() has the details)",
                explanation.recomputed_tokens,
                explanation.context_tokens,
            )

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the session was closed; open a new one with engine.session()")

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        now = self._now
        return f"Session({len(now.ids)} tokens, {len(now.messages)} messages{', closed' if self._closed else ''})"


def _counts(output: RequestOutput) -> bool:
    """Whether the turn came to its end and counts; an aborted or failed one does not."""
    return output.finish_reason in ("stop", "length")


def _check_params(params: SamplingParams | None) -> None:
    """Raises: InvalidRequestError unless `params` asks for one answer."""
    if params is not None and (params.n != 1 or params.max_tokens == 0):
        raise InvalidRequestError(
            f"a session's turn has one answer of at least a token; got n={params.n}, max_tokens={params.max_tokens}"
        )


def _check_text(name: str, text: object) -> None:
    """Raises: InvalidRequestError unless `text` is a str that can be encoded."""
    if not isinstance(text, str):
        raise InvalidRequestError(f"{name} must be a str, not {text!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"{name} must be valid Unicode; it has a {error.reason} at character {error.start}"
        ) from error
