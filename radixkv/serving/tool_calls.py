"""Calls of tools, and the pieces in which they come."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

_decoder = json.JSONDecoder()


class Call(NamedTuple):
    """A call of a tool: the name of its function, and the arguments as JSON."""

    id: str
    name: str
    arguments: str


class Text(NamedTuple):
    """A piece of an answer's text."""

    text: str


class CallBegun(NamedTuple):
    """A call begins; its arguments follow, and nothing else before its end. `number` counts calls from 0."""

    number: int
    id: str
    name: str


class Arguments(NamedTuple):
    """A fragment of the arguments of the call that has begun."""

    number: int
    text: str


Piece: TypeAlias = Text | CallBegun | Arguments | Call
"""What is known for sure of an answer. A `Call`, whole, ends the one that has begun."""


class Parsed(NamedTuple):
    """An answer, taken apart: its texts and calls, in order."""

    parts: list[str | Call]

    @classmethod
    def of(cls, pieces: Iterable[Piece]) -> Parsed:
        """What `pieces` make together."""
        parts: list[str | Call] = []
        for piece in pieces:
            if isinstance(piece, Text) and parts and isinstance(parts[-1], str):
                parts[-1] += piece.text
            elif isinstance(piece, Text):
                parts.append(piece.text)
            elif isinstance(piece, Call):
                parts.append(piece)
        return cls(parts)

    @property
    def content(self) -> str:
        """All text."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def calls(self) -> list[Call]:
        """All calls."""
        return [part for part in self.parts if isinstance(part, Call)]


def new_call_id() -> str:
    """An id that no other call has."""
    return f"call_{secrets.token_hex(12)}"


def as_object(arguments: str) -> dict[str, Any] | None:
    """Arguments as an object; None if they are none, as those that were cut off."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def whole_members(arguments: str) -> dict[str, Any]:
    """Arguments as an object; of those that were cut off, the members that are whole. A number at the end is whole.

    >>> whole_members('{"a": [1, 2], "b": {"c": tr')
    {'a': [1, 2]}
    """
    found = as_object(arguments)
    if found is not None:
        return found
    members: dict[str, Any] = {}
    rest = arguments.lstrip()[1:]
    try:
        while True:
            key, end = _decoder.raw_decode(rest.lstrip())
            value_text = rest.lstrip()[end:].lstrip().removeprefix(":").lstrip()
            value, end = _decoder.raw_decode(value_text)
            members[key] = value
            rest = value_text[end:].lstrip()[1:]
    except (ValueError, RecursionError):
        return members
