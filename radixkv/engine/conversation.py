"""A conversation's tokens: the chat template's rendering, with the answers' own ids in it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.token_ids import common_tokens
from radixkv.engine.chat_template import AnswerHeader, ChatTemplate, Message, Span, placeholders
from radixkv.engine.prompt_encoder import PromptEncoder
from radixkv.errors import InvalidRequestError

if TYPE_CHECKING:
    from radixkv.engine.engine import Engine
    from radixkv.engine.outputs import RequestOutput

Ids = NDArray[np.int32]
NO_IDS: Ids = np.empty(0, np.int32)


class AnswerUse(NamedTuple):
    """How the next prompt holds one earlier answer.

    `tokens` were generated, or appended after it; `kept_tokens` of them stand in the prompt as they are. The others
    were control tokens at its end, which the template writes itself, or text that the template holds otherwise.
    `changed`: the template does not hold the answer's text as it is.
    """

    tokens: int
    kept_tokens: int
    changed: bool


class SessionExplanation(NamedTuple):
    """What the next turn keeps of a conversation's context.

    The context has `context_tokens`; the next prompt begins with the first `shared_tokens` of them, and
    `recomputed_tokens` are lost: they come after the first difference, apart from control tokens at the end, whose KV
    is not there yet. `answers` has an entry for each answer so far.
    """

    context_tokens: int
    shared_tokens: int
    recomputed_tokens: int
    answers: tuple[AnswerUse, ...]

    @property
    def changed(self) -> bool:
        """Whether the template changes a past answer, or anything else before the last one."""
        last = self.answers[-1].tokens if self.answers else 0
        moved = self.recomputed_tokens > 0 and self.shared_tokens < self.context_tokens - last
        return moved or any(answer.changed for answer in self.answers)


@dataclass(frozen=True, eq=False)
class Answer:
    """What the model answered, to the token, and what was added to it afterwards.

    `ids[start:]` follow the tokens `before` and read `lead + content` and then what ended the answer; `content` is
    its text in the messages, `lead` what the template writes before an answer itself.
    """

    ids: list[int]
    start: int
    before: list[int]
    lead: str
    content: str
    encoder: PromptEncoder
    added: Ids = field(default_factory=lambda: NO_IDS)
    model_added_last: bool = False

    @cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """(number of ids, number of characters) wherever the text of the first ids is whole characters of ours."""
        text = self.lead + self.content
        history = [*self.before, *self.ids[self.start :]]
        skip = len(self.before)
        bounds = [(0, 0)]
        for count in range(1, len(history) - skip + 1):
            settled, end = bounds[-1]
            at = skip + settled
            piece = self.encoder.text_after(history[max(0, at - 4) : at], history[at : skip + count])
            if text.startswith(piece, end) and not piece.endswith("\ufffd"):
                bounds.append((count, end + len(piece)))
        return bounds

    def kept(self, rendered: str) -> tuple[str, list[int], str]:
        """`rendered`, which the template made of the content, as (text, own ids, text).

        The own ids are those whose text lies in `rendered` as a whole.
        """
        text, first = self.lead + self.content, len(self.lead)
        at = text.find(rendered, first)
        length = len(rendered) if at >= 0 else _common_length(text[first:], rendered)
        at = max(at, first) if at < 0 else at
        begin, begin_end = (0, at) if at == first else next((b for b in self.bounds if b[1] >= at), (0, at))
        end_end = max((chars for _, chars in self.bounds if chars <= at + length), default=0)
        end = next(count for count, chars in self.bounds if chars == end_end)
        if end <= begin:
            return rendered, [], ""
        ids = self.ids[self.start + begin : self.start + end]
        return rendered[: begin_end - at], ids, rendered[end_end - at :]

    def as_it_stands(self) -> list[int]:
        """All its ids with what was added, without control tokens that the model ended with."""
        ids = [*self.ids[self.start :], *map(int, self.added)]
        while self.model_added_last and ids and ids[-1] in self.encoder.special_ids:
            ids.pop()
        return ids


@dataclass(frozen=True)
class Conversation:
    """The state of a session, never changed in place: `ids` are its context to the token.

    `preface` was appended before the first turn. `answers` belong to the assistant's messages, in order.
    """

    ids: Ids = field(default_factory=lambda: NO_IDS)
    messages: tuple[Message, ...] = ()
    answers: tuple[Answer, ...] = ()
    preface: Ids = field(default_factory=lambda: NO_IDS)

    def with_added(self, ids: Ids, *, by_model: bool) -> Conversation:
        """Ids after all others, which belong to the last answer if there is one."""
        whole = np.concatenate([self.ids, ids])
        if not self.answers:
            return replace(self, ids=whole, preface=np.concatenate([self.preface, ids]))
        last = self.answers[-1]
        last = replace(last, added=np.concatenate([last.added, ids]), model_added_last=by_model)
        return replace(self, ids=whole, answers=(*self.answers[:-1], last))


class Prompt(NamedTuple):
    """A prompt for the next turn, and how it holds the earlier answers."""

    ids: Ids
    messages: tuple[Message, ...]
    answers: tuple[AnswerUse, ...]

    def explain(self, conversation: Conversation, special_ids: frozenset[int]) -> SessionExplanation:
        """What it keeps of the context of `conversation`."""
        context = conversation.ids
        shared = common_tokens(context, self.ids)
        end = len(context)
        while end > shared and int(context[end - 1]) in special_ids:
            end -= 1
        return SessionExplanation(len(context), shared, end - shared, self.answers)


class Composer:
    """Makes the prompts of a conversation's turns. Its state is a memory of what it encoded, and changes no result."""

    def __init__(self, engine: Engine, *, plain_users: bool) -> None:
        self._plain_users = plain_users
        self._template = ChatTemplate(engine)
        self.encoder = PromptEncoder(engine)

    def compose(self, conversation: Conversation, text: str) -> Prompt:
        """The prompt that asks `text` after `conversation`.

        It is what the template renders of all messages, encoded, except that each answer's text is replaced by the
        answer's own ids as far as the rendering contains it. An answer that was added to stays as it stands.
        """
        messages = (*conversation.messages, {"role": "user", "content": text})
        numbers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        answers = dict(zip(numbers, conversation.answers, strict=True))
        marks = placeholders(len(messages), messages)
        shown = list(messages)
        for i, answer in answers.items():
            if len(answer.added):  # its text is not the message's any more
                shown[i] = {"role": "assistant", "content": marks[i]}
        plain = {i for i, message in enumerate(shown) if self._is_to_be_plain(message)}
        rendered, spans = self._template.place(shown, sorted(plain | set(answers)))
        for i in plain - set(spans):
            raise InvalidRequestError(
                f"the chat template must render text with control tokens "
                f"({self.encoder.controls_in(shown[i]['content'])[0]!r}) once and in its place; "
                f"it drops, repeats or moves that of message {i}"
            )
        builder = _PromptBuilder(self.encoder, conversation.preface)
        uses: list[AnswerUse] = []
        cursor = 0
        for i in range(len(messages)):
            span = spans.get(i)
            if i in answers:
                use, cursor = self._add_answer(builder, rendered, cursor, span, answers[i], i in plain)
                uses.append(use)
            elif span is not None:
                builder.add_text(rendered[cursor : span.first])
                builder.add_text(rendered[span.first : span.last], plain=True)
                cursor = span.last
        builder.add_text(rendered[cursor:])
        return Prompt(builder.finish(), messages, tuple(uses))

    def answered(self, conversation: Conversation, prompt: Prompt, output: RequestOutput) -> Conversation:
        """The conversation after the turn that asked `prompt` and got `output`."""
        answer = self._answer(prompt, output)
        return Conversation(
            ids=np.concatenate([prompt.ids, np.array(output.token_ids, np.int32)]),
            messages=(*prompt.messages, {"role": "assistant", "content": answer.content}),
            answers=(*conversation.answers, answer),
            preface=conversation.preface,
        )

    def _answer(self, prompt: Prompt, output: RequestOutput) -> Answer:
        """An answer's content is its text, without what the template writes before an answer itself."""
        encoder, ids, text = self.encoder, list(output.token_ids), output.text or ""
        before = list(map(int, prompt.ids[-4:]))
        in_context = encoder.text_after(before, ids)
        at = in_context.find(text)
        gap = in_context[:at] if at > 0 and not in_context[:at].strip() else ""  # a blank that decoders drop in front
        header = self._template.answer_header(prompt.messages)
        if header is not None and header.lead and encoder.controls_in(header.lead):
            start = self._after_header(before, ids, header)
            if start is not None:
                head = encoder.text_after(before, ids[:start])
                return Answer(ids, start, (before + ids[:start])[-4:], "", (gap + text)[len(head) :], encoder)
        elif header is not None and header.lead and (gap + text).startswith(header.lead):
            return Answer(ids, 0, before, header.lead, (gap + text)[len(header.lead) :], encoder)
        return Answer(ids, 0, before, gap, text, encoder)

    def _after_header(self, before: list[int], ids: list[int], header: AnswerHeader) -> int | None:
        """How many of `ids` come before the answer itself: up to the last header that the model wrote."""
        raw = header.prompt + self.encoder.raw_text_after(before, ids)
        at = raw.rfind(header.prompt + header.lead)
        if at < 0:
            return None
        head = raw[len(header.prompt) : at + len(header.prompt) + len(header.lead)]
        lengths = (self.encoder.raw_text_after(before, ids[:count]) for count in range(len(ids) + 1))
        return next((count for count, text in enumerate(lengths) if text == head), None)

    def _add_answer(
        self, builder: _PromptBuilder, rendered: str, cursor: int, span: Span | None, answer: Answer, plain: bool
    ) -> tuple[AnswerUse, int]:
        """Put an answer into the prompt; what comes before it in `rendered` from `cursor` on, too."""
        tokens = len(answer.ids) + len(answer.added)
        if span is None and not len(answer.added):
            return AnswerUse(tokens, 0, True), cursor
        first, last = (cursor, cursor) if span is None else span
        if len(answer.added):
            text, ids, rest = "", answer.as_it_stands(), ""
        else:
            text, ids, rest = answer.kept(rendered[first:last])
        begins = bool(ids) and not text
        if begins and first - len(answer.lead) >= cursor and rendered[:first].endswith(answer.lead):
            builder.add_text(rendered[cursor : first - len(answer.lead)])  # the ids hold the lead
        else:
            builder.add_text(rendered[cursor:first])
        builder.add_text(text, plain=plain)
        builder.add_ids(ids)
        builder.add_text(rest, plain=plain)
        changed = not len(answer.added) and rendered[first:last] != answer.content
        return AnswerUse(tokens, len(ids), changed), last

    def _is_to_be_plain(self, message: Message) -> bool:
        return self._plain_users and message["role"] != "system" and bool(self.encoder.controls_in(message["content"]))


class _PromptBuilder:
    """Joins texts and ids to one prompt. Texts in a row are encoded as one, and as what follows the ids before them."""

    def __init__(self, encoder: PromptEncoder, preface: Ids) -> None:
        self._encoder = encoder
        self._parts: list[Ids] = []
        self._texts: list[tuple[str, bool]] = []
        self._before = ""  # the end of what was joined so far
        self._last_id: int | None = None
        if len(preface):
            self.add_ids(list(map(int, preface)))

    def add_text(self, text: str, *, plain: bool = False) -> None:
        """Text whose control tokens count, unless it is `plain`."""
        if self._texts and self._texts[-1][1] == plain:
            text, plain = self._texts.pop()[0] + text, plain
        if text:
            self._texts.append((text, plain))

    def add_ids(self, ids: list[int]) -> None:
        """Ids as they stand."""
        if ids:
            self._encode_texts()
            self._add(np.array(ids, np.int32), self._encoder.raw_text_after([], ids[-8:]) or " ")

    def finish(self) -> Ids:
        """All ids."""
        self._encode_texts()
        return np.concatenate([NO_IDS, *self._parts])

    def _encode_texts(self) -> None:
        for text, plain in self._texts:
            ids = self._encoder.encode_after(self._before, text, plain=plain)
            if len(ids) and int(ids[0]) == self._last_id and self._last_id in self._encoder.special_ids:
                ids = ids[1:]  # `append` added the token that closes the turn
            self._add(ids, text)
        self._texts = []

    def _add(self, ids: Ids, text: str) -> None:
        self._parts.append(ids)
        self._before = text[-16:]
        if len(ids):
            self._last_id = int(ids[-1])


def _common_length(a: str, b: str) -> int:
    size = min(len(a), len(b))
    return next((i for i in range(size) if a[i] != b[i]), size)
