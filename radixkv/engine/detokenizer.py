"""From output ids to text, piece by piece, with stop strings."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from radixkv.engine.token_bytes import decodes_as_usual

REPLACEMENT = "\ufffd"  # what an unfinished UTF-8 sequence decodes to


FIRST_MARK = 0xD800  # lone surrogates, which no decoded text holds, stand for special tokens
_Utf8Decoder = codecs.getincrementaldecoder("utf-8")
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class Detokenizer:
    """Turns the ids of one output into text as they come.

    The pieces joined are the text of all ids; a piece is held back while it may change: an unfinished character, byte
    tokens in a row (one invalid byte makes all of them invalid), or the beginning of a stop string. Special tokens are
    not in the text, but a stop string may hold them.
    """

    def __init__(
        self,
        tokenizer: Any,
        stops: Sequence[str] = (),
        min_tokens: int = 0,
        token_bytes: Mapping[int, bytes] | None = None,
    ) -> None:
        """A detokenizer that has seen no id.

        Args:
            min_tokens: ids that come before a stop string may be complete.
            token_bytes: the bytes that each id adds to a text, if `tokenizer` is of that kind; a token costs less then.
        """
        self._tokenizer = tokenizer
        self._min_tokens, self._num_pushed = min_tokens, 0
        self._given_stops = tuple(stops)
        self._marks = _special_tokens_in(tokenizer, stops)
        self._stops = tuple(self._marked(stop) for stop in stops)
        self._decoder = _Windows(tokenizer) if token_bytes is None else _Bytes(token_bytes)
        self._given: list[str] = []  # the text that was given out
        self._held = ""  # the text after it: what may begin a stop string, with a mark for each special token in one
        self.stopped_by: str | None = None  # the stop string that was met

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met."""
        return self.stopped_by is not None

    @property
    def text(self) -> str:
        """All the text so far, up to the stop string if one was met."""
        return "".join(self._given) + self._unmarked(self._held)

    def push(self, token_id: int) -> str:
        """Take one id; returns the text that is certain now and was not returned before."""
        if not self._stops:  # nothing is held back here, and there are no marks
            if piece := self._decoder.push(token_id):
                self._given.append(piece)
            return piece
        self._num_pushed += 1
        if token_id in self._marks:
            self._append(self._decoder.finish() + self._marks[token_id][0])
        else:
            self._append(self._decoder.push(token_id))
            if not self.stopped and (pending := self._decoder.pending):
                self._stop_within(pending)
        return self._give(len(self._held) if self.stopped else self._num_certain())

    def flush(self) -> str:
        """The rest of the text, at the end of the output."""
        if not self.stopped:
            self._append(self._decoder.finish())
        return self._give(len(self._held))

    def _append(self, piece: str) -> None:
        if piece and not (self._stops and self._stop_within(piece)):
            self._held += piece

    def _stop_within(self, piece: str) -> bool:
        """End the text if a stop string is complete with `piece`, which may still change if more ids come.

        It begins in the text that is held back, or in `piece`.
        """
        if self._num_pushed <= self._min_tokens:
            return False
        text, num_held = self._held + piece, len(self._held)
        starts = [text.find(stop, max(0, num_held - len(stop) + 1)) for stop in self._stops]
        found = [(at, i) for i, at in enumerate(starts) if at >= 0]
        if found:
            at, number = min(found)
            self._held, self.stopped_by = text[:at], self._given_stops[number]
        return bool(found)

    def _num_certain(self) -> int:
        """Length of the text held back without a tail that may turn out to begin a stop string."""
        longest = max(map(len, self._stops)) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-size:]
            if any(stop.startswith(tail) for stop in self._stops):
                return len(self._held) - size
        return len(self._held)

    def _give(self, end: int) -> str:
        piece, self._held = self._unmarked(self._held[:end]), self._held[end:]
        if piece:
            self._given.append(piece)
        return piece

    def _marked(self, stop: str) -> str:
        for mark, text in sorted(self._marks.values(), key=lambda item: -len(item[1])):
            stop = stop.replace(text, mark)
        return stop

    def _unmarked(self, text: str) -> str:
        return "".join(c for c in text if ord(c) - FIRST_MARK not in range(len(self._marks))) if self._marks else text


class _Windows:
    """Text of ids by decoding each of them in the context of those before it, whatever the tokenizer does."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._decode = _decoding(tokenizer)
        self._ids: list[int] = []  # those that are not settled, after some that are and only give context
        self._num_settled = 0  # of `_ids`
        self.pending = ""  # text that changes if an invalid byte comes

    def push(self, token_id: int) -> str:
        """Take one id; returns the text that is certain now and was not returned before."""
        self._ids.append(token_id)
        piece, self.pending = self._unsettled(), ""
        if not piece or piece.endswith(REPLACEMENT):
            return ""
        if self._is_byte(token_id):
            self.pending = piece
            return ""
        self._settle()
        return piece

    def finish(self) -> str:
        """The rest of the text of all ids so far."""
        piece, self.pending = self._unsettled(), ""
        self._settle()
        return piece

    def _unsettled(self) -> str:
        context = self._decode(self._ids[: self._num_settled])
        return self._decode(self._ids)[len(context) :]

    def _settle(self) -> None:
        """Keep as context the ids that were settled just now."""
        self._ids = self._ids[self._num_settled :]
        self._num_settled = len(self._ids)

    def _is_byte(self, token_id: int) -> bool:
        names = getattr(self._tokenizer, "convert_ids_to_tokens", None)
        return names is not None and BYTE_TOKEN.fullmatch(names(token_id) or "") is not None


class _Bytes:
    """Text of ids that are bytes in a row: only a character of several bytes may be unfinished."""

    pending = ""

    def __init__(self, token_bytes: Mapping[int, bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = _Utf8Decoder("replace")

    def push(self, token_id: int) -> str:
        """Take one id; returns the text that is certain now and was not returned before."""
        data = self._token_bytes[token_id]
        if data.isascii() and not self._decoder.buffer:  # no character is unfinished
            return data.decode("ascii")
        return self._decoder.decode(data)

    def finish(self) -> str:
        """The rest of the text of all ids so far."""
        return self._decoder.decode(b"", True)


def _special_tokens_in(tokenizer: Any, stops: Sequence[str]) -> dict[int, tuple[str, str]]:
    """The special tokens that stop strings hold: id → (a mark for it, its text)."""
    found: dict[int, tuple[str, str]] = {}
    for stop in stops if callable(tokenizer) else ():
        for token_id in tokenizer(stop, add_special_tokens=False).input_ids:
            text = tokenizer.decode([token_id], skip_special_tokens=False)
            if text and text in stop and not decode(tokenizer, [token_id]) and token_id not in found:
                found[token_id] = (chr(FIRST_MARK + len(found)), text)
    return found


def decode(tokenizer: Any, ids: list[int]) -> str:
    """The text of a whole output."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def _decoding(tokenizer: Any) -> Callable[[list[int]], str]:
    """`decode` of one tokenizer, for a few ids: without what transformers does around it, which takes longer."""
    if decodes_as_usual(tokenizer):
        return partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=True)
    return partial(decode, tokenizer)
