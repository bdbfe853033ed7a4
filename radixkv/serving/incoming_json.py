"""Reads JSON that comes piece by piece.

Each reader is a generator that yields whenever it needs more text than there is, and returns what it found. It reads on
from where it stopped, so that a value costs O(its length), however many pieces it comes in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from typing import TypeAlias, TypeVar

T = TypeVar("T")
Reading: TypeAlias = Generator[None, None, T]

_SPACE = re.compile(r"\s*")
_STRING_CHARACTERS = re.compile(r'[^"\\\x00-\x1f]*')
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_ESCAPE_BEGUN = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?")
_ATOM_CHARACTERS = re.compile(r"[-+.0-9A-Za-z]*")
_ATOM = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null")


class IncomingJson:
    """Text that comes piece by piece, and a place in it.

    `text` is what has come and was not taken; `[0, at)` of it was read. `[0, at)` of a value that is being read is the
    beginning of valid JSON at any time. Once `is_over`, no more comes.
    With `repairs`, the text is made to fit: control characters within strings, which JSON forbids and models write, are
    replaced by their escapes, and a word or an escape that the end cuts off is dropped, as it may mean anything.
    """

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.is_over = False
        self.repairs = False

    def take(self, end: int) -> str:
        """Take away the first `end` characters."""
        taken, self.text = self.text[:end], self.text[end:]
        self.at = max(0, self.at - end)
        return taken

    def more(self) -> Reading[bool]:
        """Wait for more text. Returns: whether there may be some."""
        if self.is_over:
            return False
        yield
        return True

    def peek(self) -> Reading[str]:
        """The next character that is not a space, which becomes the place; "" at the end."""
        while True:
            self.at = _end_of(_SPACE, self.text, self.at)
            if self.at < len(self.text):
                return self.text[self.at]
            if not (yield from self.more()):
                return ""

    def skip(self, expected: str) -> Reading[bool]:
        """Whether `expected` comes next, after spaces; if so, read it. If not, only spaces are read."""
        yield from self.peek()
        while not self.text.startswith(expected, self.at):
            rest = self.text[self.at :]
            if not expected.startswith(rest) or not (yield from self.more()):
                return False
        self.at += len(expected)
        return True

    def string(self) -> Reading[str | None]:
        """A string, decoded; None if there is none. Nothing may be taken meanwhile."""
        if (yield from self.peek()) != '"':
            return None
        start = self.at
        if not (yield from self._string()):
            return None
        decoded: str = json.loads(self.text[start : self.at])
        return decoded

    def key(self) -> Reading[str | None]:
        """The key of a member, with its colon; None if there is none. Nothing may be taken meanwhile."""
        key = yield from self.string()
        return key if key is not None and (yield from self.skip(":")) else None

    def value(self) -> Reading[bool]:
        """Whether a whole value comes next. If not, it is read as far as it is valid."""
        closers: list[str] = []  # of what is open
        while True:
            first = yield from self.peek()
            if first in ("{", "["):
                self.at += 1
                closers.append("}" if first == "{" else "]")
                if (yield from self.peek()) != closers[-1]:
                    if first == "{" and not (yield from self._key()):
                        return False
                    continue
            elif not (yield from self._string() if first == '"' else self._atom()):
                return False
            if not (yield from self._after_value(closers)):
                return False
            if not closers:
                return True

    def _after_value(self, closers: list[str]) -> Reading[bool]:
        """Close what ends after a value. Returns: whether another value follows, or nothing is open."""
        while closers:
            if (yield from self.skip(closers[-1])):
                closers.pop()
            elif not (yield from self.skip(",")):
                return False
            else:
                return closers[-1] == "]" or (yield from self._key())
        return True

    def _atom(self) -> Reading[bool]:
        """Whether a number, `true`, `false` or `null` comes next, and its end has come, too."""
        while True:
            end = _end_of(_ATOM_CHARACTERS, self.text, self.at)
            if end < len(self.text):
                break
            if not (yield from self._rest_of_word()):
                return False
        if not _ATOM.fullmatch(self.text, self.at, end):
            return False
        self.at = end
        return True

    def _rest_of_word(self) -> Reading[bool]:
        """Wait for the rest of a word or an escape. Returns: whether there may be some."""
        if (yield from self.more()):
            return True
        if self.repairs:
            self.text = self.text[: self.at]
        return False

    def _key(self) -> Reading[bool]:
        return (yield from self.peek()) == '"' and (yield from self._string()) and (yield from self.skip(":"))

    def _string(self) -> Reading[bool]:
        self.at += 1
        while True:
            self.at = _end_of(_STRING_CHARACTERS, self.text, self.at)
            if self.at == len(self.text):
                if not (yield from self.more()):
                    return False
            elif self.text[self.at] == '"':
                self.at += 1
                return True
            elif self.text[self.at] != "\\":
                if not self.repairs:
                    return False
                escaped = json.dumps(self.text[self.at])[1:-1]
                self.text = self.text[: self.at] + escaped + self.text[self.at + 1 :]
            elif escape := _ESCAPE.match(self.text, self.at):
                self.at = escape.end()
            elif not _ESCAPE_BEGUN.fullmatch(self.text, self.at) or not (yield from self._rest_of_word()):
                return False


def _end_of(pattern: re.Pattern[str], text: str, at: int) -> int:
    """Where a pattern ends that fits anywhere."""
    match = pattern.match(text, at)
    assert match is not None, pattern
    return match.end()
