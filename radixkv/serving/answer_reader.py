"""Calls of tools in what a model writes, as it comes, in the forms that are common.

- Hermes and Qwen: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, anywhere in the answer;
- Llama 3: the answer begins with `{"name": …, "parameters": {…}}`, perhaps after `<|python_tag|>`, several after `;`;
- Mistral: `[TOOL_CALLS][{"name": …, "arguments": {…}}]`, or `[TOOL_CALLS]name[ARGS]{…}`.

Markers that are special tokens are missing from an answer's text, so at its beginning the last two forms are known
without them, too.

What has been sent to a client cannot be taken back. So a call is a call from the point on where it has the name of a
tool and its arguments begin as an object does; they are given out as they are written, and if they are cut off or stop
being JSON, they end there. What does not come that far is text.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from radixkv.serving.incoming_json import IncomingJson, Reading
from radixkv.serving.tool_calls import Arguments, Call, CallBegun, Parsed, Piece, Text, as_object, new_call_id

HERMES, HERMES_END = "<tool_call>", "</tool_call>"
MISTRAL, MISTRAL_ARGUMENTS = "[TOOL_CALLS]", "[ARGS]"
LLAMA = "<|python_tag|>"
MARKERS = (HERMES, MISTRAL, LLAMA)


class AnswerReader:
    """Reads an answer as it comes: gives out what is known for sure, and holds back what may be a call or not.

    The pieces, put together, do not depend on how the answer was cut. O(the answer's length) in all.
    """

    def __init__(self, names: Collection[str], *, parallel: bool = True) -> None:
        """Args: names: of the tools. parallel: whether calls after the first one are given out."""
        self._names = names
        self._parallel = parallel
        self._in = IncomingJson()
        self._pieces: list[Piece] = []
        self._begun: CallBegun | None = None
        self._arguments: list[str] = []  # of the call that has begun
        self.num_calls = 0
        patterns = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
        self._named = re.compile(rf"({patterns})\s*(?:{re.escape(MISTRAL_ARGUMENTS)}\s*)?(?={{)")
        self._reading = self._read()

    def push(self, text: str) -> list[Piece]:
        """Take more of the answer."""
        if not self._names:
            return [Text(text)] if text else []
        self._in.text += text
        return self._advance()

    def finish(self, token_ids: Sequence[int]) -> list[Piece]:
        """The rest of the answer, which has come to its end.

        Args: token_ids: the whole answer, for forms that are parsed by the tokenizer itself.
        """
        self._in.is_over = True
        return self._advance() if self._names else []

    def _advance(self) -> list[Piece]:
        next(self._reading, None)
        if self._begun is not None:
            self._add_arguments(self._in.take(self._in.at))
        pieces, self._pieces = self._pieces, []
        return pieces

    def _read(self) -> Reading[None]:
        """Read the whole answer. What the readers of calls do not find is text, and the place is where they began."""
        source = self._in
        yield from self._plain_calls()
        while marker := (yield from self._text_until_marker()):
            after_marker = source.at
            if marker != HERMES:
                yield from self._plain_calls()
            elif not (yield from self._call_object()):
                source.at = after_marker
            elif (yield from source.skip(HERMES_END)):
                source.take(source.at)

    def _text_until_marker(self) -> Reading[str]:
        """Give out text until a marker comes, and read it; "" at the answer's end.

        Spaces before a marker, and after a call, are text only if other text follows.
        """
        source, start = self._in, self._in.at  # what is before the place holds no marker
        while True:
            text = source.text
            found = [(place, marker) for marker in MARKERS if (place := text.find(marker, start)) >= 0]
            if found:
                place, marker = min(found)
                source.at = place + len(marker)
                self._give_text(len(text[:place].rstrip()))
                return marker
            if source.is_over:
                if not (self.num_calls and text.isspace()):
                    self._give_text(len(text))
                return ""
            held = _begun_marker(text[start:])
            given = self._give_text(len(text[: len(text) - held].rstrip()))
            start = max(0, start - given)
            yield

    def _plain_calls(self) -> Reading[None]:
        """Read calls that have no end markers, as many as follow one another."""
        source, start = self._in, self._in.at
        while True:
            first = yield from source.peek()
            if first == "{":
                found = yield from self._call_object()
            elif first == "[":
                found = yield from self._call_list()
            else:
                found = yield from self._named_call()
            if not found:
                source.at = start
                return
            while (yield from source.skip(";")) or (yield from source.skip(MISTRAL)):
                source.take(source.at)
            start = 0

    def _call_list(self) -> Reading[bool]:
        """A list of calls; whether there is one at least."""
        source = self._in
        yield from source.skip("[")
        if not (yield from self._call_object()):
            return False
        while (yield from source.skip(",")):
            if not (yield from self._call_object()):
                source.at = 0
                return True
        if (yield from source.skip("]")):
            source.take(source.at)
        return True

    def _named_call(self) -> Reading[bool]:
        """`name{…}` or `name[ARGS]{…}`."""
        source = self._in
        while not (match := self._named.match(source.text, source.at)):
            rest = source.text[source.at :]
            if not any(_may_become_call(rest, name) for name in self._names) or not (yield from source.more()):
                return False
        source.at = match.end()
        if not (yield from self._object_begins()):
            return False
        yield from self._stream_call(match[1])
        return True

    def _call_object(self) -> Reading[bool]:
        """`{"name": …, "arguments": {…}}`; without arguments, or with other members, too."""
        source, name, arguments = self._in, None, None
        if not (yield from source.skip("{")):
            return False
        while True:
            key = yield from source.key()
            if key == "name":
                name = yield from source.string()
                if name not in self._names:
                    return False
            elif key in ("arguments", "parameters") and arguments is None:
                if name is not None and (yield from self._object_begins()):
                    yield from self._stream_call(name)
                    yield from self._rest_of_object()
                    return True
                arguments = yield from self._whole_arguments()
                if arguments is None:
                    return False
            elif key is None or not (yield from source.value()):
                return False
            if (yield from source.skip("}")):
                break
            if not (yield from source.skip(",")):
                return False
        if name is None:
            return False
        source.take(source.at)
        self._begin_call(name)
        self._add_arguments("{}" if arguments is None else arguments)
        self._end_call()
        return True

    def _rest_of_object(self) -> Reading[None]:
        """Take what follows the arguments; if it does not fit, it is text."""
        source = self._in
        while (yield from source.skip(",")):
            if (yield from source.key()) is None or not (yield from source.value()):
                break
        if (yield from source.skip("}")):
            source.take(source.at)
        source.at = 0

    def _object_begins(self) -> Reading[bool]:
        """Whether `{}` or `{"key":` comes next. Moves to its beginning."""
        source = self._in
        if (yield from source.peek()) != "{":
            return False
        start = source.at
        source.at += 1
        fits = (yield from source.peek()) == "}" or (yield from source.key()) is not None
        source.at = start
        return fits

    def _whole_arguments(self) -> Reading[str | None]:
        """Arguments that can only be given out once all of the call is there: an object, or one within a string."""
        source = self._in
        first, start = (yield from source.peek()), source.at
        if first == "{":
            return source.text[start : source.at] if (yield from source.value()) else None
        text = yield from source.string()
        return (text or "{}") if text is not None and (not text or as_object(text) is not None) else None

    def _stream_call(self, name: str) -> Reading[None]:
        """Give out a call whose arguments come next, as far as they are JSON."""
        source = self._in
        source.take(source.at)
        self._begin_call(name)
        source.repairs = True
        yield from source.value()
        source.repairs = False
        self._add_arguments(source.take(source.at))
        self._end_call()

    def _give_text(self, end: int) -> int:
        if text := self._in.take(end):
            self._pieces.append(Text(text))
        return end

    def _begin_call(self, name: str) -> None:
        self._begun = CallBegun(self.num_calls, new_call_id(), name)
        self._give_of_call(self._begun)

    def _add_arguments(self, text: str) -> None:
        if text:
            self._arguments.append(text)
            self._give_of_call(Arguments(self.num_calls, text))

    def _end_call(self) -> None:
        assert self._begun is not None
        self._give_of_call(Call(self._begun.id, self._begun.name, "".join(self._arguments)))
        self._begun, self.num_calls = None, self.num_calls + 1
        self._arguments.clear()

    def _give_of_call(self, piece: Piece) -> None:
        if self._parallel or not self.num_calls:
            self._pieces.append(piece)


def parse(text: str, names: Collection[str], *, parallel: bool = True) -> Parsed:
    """An answer in one of the common forms, taken apart.

    >>> parse('Wait. <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>', ["add"]).calls[0][1:]
    ('add', '{"a": 1}')
    >>> parse('{"name": "add", "parameters": {}}', ["add"]).calls[0][1:]
    ('add', '{}')
    >>> parse('{"name": "sub", "parameters": {}}', ["add"])
    Parsed(parts=['{"name": "sub", "parameters": {}}'])
    """
    reader = AnswerReader(names, parallel=parallel)
    return Parsed.of(reader.push(text) + reader.finish(()))


def _begun_marker(text: str) -> int:
    """How many characters at the end of `text` may be the beginning of a marker.

    >>> _begun_marker("Hi <tool"), _begun_marker("Hi <b>")
    (5, 0)
    """
    first = max(text.rfind("<"), text.rfind("["))  # markers begin with these, and hold none of them further on
    return len(text) - first if first >= 0 and any(mark.startswith(text[first:]) for mark in MARKERS) else 0


def _may_become_call(text: str, name: str) -> bool:
    """Whether `text` is the beginning of `name`, or of it and what stands between it and arguments."""
    if not text.startswith(name):
        return name.startswith(text)
    rest = text[len(name) :].strip()
    return MISTRAL_ARGUMENTS.startswith(rest)
