"""From output ids to text, piece by piece, with stop strings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"  # what an unfinished UTF-8 sequence decodes to


FIRST_MARK = 0xD800  # lone surrogates, which no decoded text holds, stand for special tokens
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class Detokenizer:
    """Turns the ids of one output into text as they come.

    The pieces joined are the text of all ids; a piece is held back while it may change: an unfinished character, byte
    tokens in a row (one invalid byte makes all of them invalid), or the beginning of a stop string. Special tokens are
    not in the text, but a stop string may hold them.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), min_tokens: int = 0) -> None:
        """Args: min_tokens: ids that come before a stop string may be complete."""
        self._tokenizer = tokenizer
        self._min_tokens, self._num_pushed = min_tokens, 0
        self._given_stops = tuple(stops)
        self._marks = _special_tokens_in(tokenizer, stops)
        self._stops = tuple(self._marked(stop) for stop in stops)
        self._ids: list[int] = []
        self._window_start = 0  # ids before it are settled and only give context
        self._settled = 0  # ids before it are in `_text`
        self._text = ""  # with a mark for each special token that a stop string holds
        self._sent = 0  # characters of `_text` given out
        self.stopped_by: str | None = None  # the stop string that was met

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met."""
        return self.stopped_by is not None

    @property
    def text(self) -> str:
        """All the text so far, up to the stop string if one was met."""
        return self._unmarked(self._text)

    def push(self, token_id: int) -> str:
        """Take one id; returns the text that is certain now and was not returned before."""
        self._num_pushed += 1
        if token_id in self._marks:
            self._append(self._pending() + self._marks[token_id][0])
            self._window_start, self._settled = self._settled, len(self._ids)
        else:
            self._ids.append(token_id)
            piece = self._pending()
            if piece and not piece.endswith(REPLACEMENT):
                if self._is_byte(token_id):
                    self._stop_within(piece)
                else:
                    self._append(piece)
                    self._window_start, self._settled = self._settled, len(self._ids)
        return self._give(len(self._text) if self.stopped else self._certain())

    def flush(self) -> str:
        """The rest of the text, at the end of the output."""
        if not self.stopped:
            self._append(self._pending())
            self._settled = len(self._ids)
        return self._give(len(self._text))

    def _pending(self) -> str:
        """The text of the ids that are not settled, as it is now."""
        context = self._decode(self._ids[self._window_start : self._settled])
        return self._decode(self._ids[self._window_start :])[len(context) :]

    def _append(self, piece: str) -> None:
        if not self._stop_within(piece):
            self._text += piece

    def _stop_within(self, piece: str) -> bool:
        """End the text if a stop string is complete with `piece`, which may still change if more ids come."""
        if self._num_pushed <= self._min_tokens:
            return False
        search_from = max(0, len(self._text) - max(map(len, self._stops), default=0) + 1)
        text = self._text + piece
        found = [(at, i) for i, stop in enumerate(self._stops) if (at := text.find(stop, search_from)) >= 0]
        if found:
            at, number = min(found)
            self._text, self.stopped_by = text[:at], self._given_stops[number]
        return bool(found)

    def _is_byte(self, token_id: int) -> bool:
        names = getattr(self._tokenizer, "convert_ids_to_tokens", None)
        return names is not None and BYTE_TOKEN.fullmatch(names(token_id) or "") is not None

    def _certain(self) -> int:
        """Length of the text without a tail that may turn out to begin a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        for size in range(min(longest, len(self._text)), 0, -1):
            tail = self._text[-size:]
            if any(stop.startswith(tail) for stop in self._stops):
                return len(self._text) - size
        return len(self._text)

    def _give(self, end: int) -> str:
        piece = self._text[self._sent : end]
        self._sent = max(self._sent, end)
        return self._unmarked(piece)

    def _marked(self, stop: str) -> str:
        for mark, text in sorted(self._marks.values(), key=lambda item: -len(item[1])):
            stop = stop.replace(text, mark)
        return stop

    def _unmarked(self, text: str) -> str:
        return "".join(c for c in text if ord(c) - FIRST_MARK not in range(len(self._marks))) if self._marks else text

    def _decode(self, ids: list[int]) -> str:
        return decode(self._tokenizer, ids)


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
