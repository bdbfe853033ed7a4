"""What a client has of a streamed answer, so that another replica's stream of the same answer can go on from there.

The other replica is given the ids that were told so far, and streams the answer from its beginning. All pieces of a
stream follow from the ids alone, except how its text is cut, its ids and its times. So of the second stream the
first events without text are left out, as many as the client has, and as many characters of text; its ids
and times are replaced by those of the first.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from radixkv.serving.streaming import DONE
from radixkv.serving.told_ids import ids_in
from radixkv.serving.wire import to_json

# In JSON a quote within a text has a backslash before it: so these find fields and no texts.
_IDS = re.compile(rb'(?<!\\)"(?:chatcmpl-|cmpl-|resp_|msg_)[0-9a-f]{24}"')
_TIMES = re.compile(rb'(?<!\\)"created(?:_at)?":\d+')
_NUMBERS = re.compile(rb'(?<!\\)"sequence_number":\d+')
_DATA = re.compile(rb"^data: (.*)$", re.MULTILINE)


class TextPlace(NamedTuple):
    """Where an event has its text: the object that holds it, and under which key."""

    holder: dict[str, Any]
    key: str

    @property
    def text(self) -> str:
        return str(self.holder[self.key])


class AnswerSoFar:
    """The events of one answer that were handed on, of one stream or of several one after another."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.has_calls = False
        self._characters = 0
        self._others = 0  # events that bring something else than text
        self._skip_characters = self._skip_others = 0
        self._names: list[bytes] = []
        self._times: list[bytes] = []
        self._new_names: dict[bytes, bytes] = {}
        self._sent = 0
        self._stream_ids: list[int] = []

    @property
    def can_go_on(self) -> bool:
        """Whether another replica can continue the answer: not in the middle of calls of tools."""
        return not self.has_calls

    def begin_again(self) -> None:
        """The events that come next are of another stream of the same answer, or of the first one."""
        self._skip_characters, self._skip_others = self._characters, self._others
        self._new_names, self._stream_ids = {}, []

    def take(self, event: bytes) -> bytes | None:
        """What of a stream's next event goes to the client; None if nothing does.

        Args: event: whole, with the empty line at its end; comments, too.
        """
        if event.startswith(b":"):
            told = ids_in(event)
            if not told:
                return event
            self._stream_ids += told
            if len(self._stream_ids) > len(self.ids):
                self.ids = list(self._stream_ids)
            return None
        kept = self._kept(event)
        if kept is None:
            return None
        return self._renamed(kept)

    def _kept(self, event: bytes) -> bytes | None:
        """What the client lacks of an event."""
        found = _DATA.search(event)
        data = None if event == DONE or found is None else json.loads(found[1])
        place = None if data is None else text_place(data)
        is_other = place is None or _ends(data)
        self.has_calls = self.has_calls or (data is not None and _is_call(data))
        skipped = 0
        if place is not None:
            skipped = min(self._skip_characters, len(place.text))
            self._skip_characters -= skipped
            self._characters += len(place.text) - skipped
        if is_other:
            if self._skip_others:
                self._skip_others -= 1
                return None
            self._others += 1
        elif place is not None and skipped == len(place.text) and skipped:
            return None
        if place is not None and skipped and found is not None:
            place.holder[place.key] = place.text[skipped:]
            return event[: found.start(1)] + to_json(data) + event[found.end(1) :]
        return event

    def _renamed(self, event: bytes) -> bytes:
        """`event` with the ids, times and numbers of the first stream."""
        event = _IDS.sub(lambda match: self._name(match[0]), event)
        event = _TIMES.sub(lambda match: self._time(match[0]), event)
        number, self._sent = self._sent, self._sent + 1
        return _NUMBERS.sub(b'"sequence_number":%d' % number, event)

    def _name(self, name: bytes) -> bytes:
        if name not in self._new_names:
            place = len(self._new_names)
            if place == len(self._names):
                self._names.append(name)
            self._new_names[name] = self._names[place]
        return self._new_names[name]

    def _time(self, time: bytes) -> bytes:
        if not self._times:
            self._times.append(time)
        return self._times[0]


def text_place(data: dict[str, Any]) -> TextPlace | None:
    """Where an event of any of the interfaces has a piece of the answer's text; None if it has none.

    >>> text_place({"choices": [{"delta": {"content": "Hi"}}]}).text
    'Hi'
    """
    if data.get("type") == "response.output_text.delta":
        return TextPlace(data, "delta")
    delta = data.get("delta")
    if data.get("type") == "content_block_delta" and isinstance(delta, dict) and delta.get("type") == "text_delta":
        return TextPlace(delta, "text")
    choices = data.get("choices")
    if not isinstance(choices, list) or len(choices) != 1:
        return None
    (choice,) = choices
    if isinstance(choice.get("text"), str):
        return TextPlace(choice, "text")
    delta = choice.get("delta")
    if isinstance(delta, dict) and isinstance(delta.get("content"), str) and "role" not in delta:
        return TextPlace(delta, "content")
    return None


def _ends(data: dict[str, Any] | None) -> bool:
    """Whether an event with text ends the answer, too, as the last one of completions does."""
    choices = None if data is None else data.get("choices")
    return choices is not None and len(choices) > 0 and choices[0].get("finish_reason") is not None


def _is_call(data: dict[str, Any]) -> bool:
    """Whether an event tells of a call of a tool."""
    choices = data.get("choices")
    if choices and (choices[0].get("delta") or {}).get("tool_calls"):
        return True
    block, item = data.get("content_block") or {}, data.get("item") or {}
    return block.get("type") == "tool_use" or item.get("type") == "function_call"
