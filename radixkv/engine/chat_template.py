"""The tokenizer's chat template: what it renders, and where in it each message stands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from radixkv.errors import InvalidRequestError, MissingChatTemplateError

if TYPE_CHECKING:
    from radixkv.engine.engine import Engine

Message = dict[str, str]


class Span(NamedTuple):
    """A half-open range `[first, last)` of characters."""

    first: int
    last: int


class AnswerHeader(NamedTuple):
    """How the template leads up to an answer.

    prompt: the text after the user's message that asks for the answer (the generation prompt and what closes the turn).
    lead: the text that the template puts between `prompt` and the answer once it is in the history.
    """

    prompt: str
    lead: str


class ChatTemplate:
    """Renders messages with the chat template of an engine's tokenizer, and finds their contents in the result."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text of `messages`, up to the point where the next answer begins.

        Raises: MissingTokenizerError, MissingChatTemplateError; InvalidRequestError if the template raises.
        """
        tokenizer = self._engine.require_tokenizer(messages[-1]["content"])
        if not getattr(tokenizer, "chat_template", None):
            raise MissingChatTemplateError(
                "the tokenizer has no chat template; use session.append(text) and session.generate() instead"
            )
        try:
            copies = [dict(message) for message in messages]
            rendered: str = tokenizer.apply_chat_template(copies, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise what they like, of jinja2 and of Python
            raise InvalidRequestError(f"the chat template refuses this turn: {error}") from error
        return rendered

    def place(self, messages: Sequence[Message], wanted: Sequence[int]) -> tuple[str, dict[int, Span]]:
        """The text of `messages`, and where in it the template put the contents of those numbered `wanted`.

        A span holds what the template made of the content, which may be shorter or written in another way. A content
        that the template drops, repeats or moves elsewhere has no span. Spans follow each other in the order of
        `wanted`. Renders once more, or once per wanted message if the template changes any of them.
        """
        text = self.render(messages)
        if not wanted:
            return text, {}
        spans = self._place_together(text, messages, wanted)
        if spans is None:
            spans = {number: span for number in wanted if (span := self._place_one(text, messages, number))}
        ordered: dict[int, Span] = {}
        end = 0
        for number, span in spans.items():
            if span.first >= end:
                ordered[number], end = span, span.last
        return text, ordered

    def _place_together(self, text: str, messages: Sequence[Message], wanted: Sequence[int]) -> dict[int, Span] | None:
        """The span of each content if each is in `text` once, unchanged and in order; else None."""
        marks = placeholders(len(wanted), messages)
        marked = self._try_render(_replaced(messages, dict(zip(wanted, marks, strict=True))))
        if marked is None:
            return None
        spans: dict[int, Span] = {}
        rebuilt, rest = "", marked
        for number, mark in zip(wanted, marks, strict=True):
            before, found, rest = rest.partition(mark)
            if not found:
                return None
            first = len(rebuilt) + len(before)
            rebuilt += before + messages[number]["content"]
            spans[number] = Span(first, len(rebuilt))
        return spans if rebuilt + rest == text else None

    def _place_one(self, text: str, messages: Sequence[Message], number: int) -> Span | None:
        (mark,) = placeholders(1, messages)
        marked = self._try_render(_replaced(messages, {number: mark}))
        if marked is None or marked.count(mark) != 1:
            return None
        before, _, after = marked.partition(mark)
        span = Span(len(before), len(text) - len(after))
        fits = span.first <= span.last and text.startswith(before) and text.endswith(after)
        return span if fits else None

    def answer_header(self, messages: Sequence[Message]) -> AnswerHeader | None:
        """What comes before the answer to the last of `messages`, now and once it is in the history.

        None if the two begin differently, as where a template opens a thought that it drops from the history.
        """
        asked, answered, again = placeholders(3, messages)
        past = [*messages[:-1], {"role": "user", "content": asked}]
        now = self._try_render(past)
        turns = [{"role": "assistant", "content": answered}, {"role": "user", "content": again}]
        later = self._try_render([*past, *turns])
        if now is None or later is None or now.count(asked) != 1 or later.count(asked) != 1:
            return None
        prompt = now.partition(asked)[2]
        before, found, _ = later.partition(asked)[2].partition(answered)
        if not found or not before.startswith(prompt):
            return None
        return AnswerHeader(prompt, before[len(prompt) :])

    def _try_render(self, messages: Sequence[Message]) -> str | None:
        """As `render`; None if the template refuses these messages, which the user did not write."""
        try:
            return self.render(messages)
        except InvalidRequestError:
            return None


def placeholders(num: int, messages: Iterable[Mapping[str, str]]) -> list[str]:
    """`num` strings that are in no message and that templates leave alone: without letters, blanks or markup."""
    mark = "\u241f"
    contents = [message["content"] for message in messages]
    while any(mark in content for content in contents):
        mark += "\u241f"
    return [f"{mark}{number}{mark}" for number in range(num)]


def _replaced(messages: Sequence[Message], contents: Mapping[int, str]) -> list[Message]:
    return [{**message, "content": contents.get(i, message["content"])} for i, message in enumerate(messages)]
