"""From output ids to text, piece by piece, with stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"  # what an unfinished UTF-8 sequence decodes to


class Detokenizer:
    """Turns the ids of one output into text as they come.

    The pieces joined are the text of all ids; a piece is held back while it may change: an unfinished character, or
    the beginning of a stop string.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._ids: list[int] = []
        self._window_start = 0  # ids before it are settled and only give context
        self._settled = 0  # ids before it are in `_text`
        self._text = ""
        self._sent = 0  # characters given out
        self.stopped = False

    @property
    def text(self) -> str:
        """All the text so far, up to the stop string if one was met."""
        return self._text

    def push(self, token_id: int) -> str:
        """Take one id; returns the text that is certain now and was not returned before."""
        self._ids.append(token_id)
        context = self._decode(self._ids[self._window_start : self._settled])
        window = self._decode(self._ids[self._window_start :])
        if len(window) > len(context) and not window.endswith(REPLACEMENT):
            self._append(window[len(context) :])
            self._window_start, self._settled = self._settled, len(self._ids)
        return self._give(len(self._text) if self.stopped else self._certain())

    def flush(self) -> str:
        """The rest of the text, at the end of the output."""
        if not self.stopped:
            context = self._decode(self._ids[self._window_start : self._settled])
            self._append(self._decode(self._ids[self._window_start :])[len(context) :])
            self._settled = len(self._ids)
        return self._give(len(self._text))

    def _append(self, piece: str) -> None:
        search_from = max(0, len(self._text) - max(map(len, self._stops), default=0) + 1)
        self._text += piece
        found = [at for stop in self._stops if (at := self._text.find(stop, search_from)) >= 0]
        if found:
            self._text = self._text[: min(found)]
            self.stopped = True

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
        return piece

    def _decode(self, ids: list[int]) -> str:
        return decode(self._tokenizer, ids)


def decode(tokenizer: Any, ids: list[int]) -> str:
    """The text of a whole output."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text
