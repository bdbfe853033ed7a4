"""Calls of tools in what a model wrote: the tokenizer's own form where it has one, else those that are common.

- Hermes and Qwen: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, several in a row;
- Llama 3: the whole answer is `{"name": …, "parameters": {…}}`, perhaps after `<|python_tag|>`, several after `;`;
- Mistral: `[TOOL_CALLS][{"name": …, "arguments": {…}}]`, or `[TOOL_CALLS]name[ARGS]{…}`.

Markers that are special tokens are missing from an answer's text, so the last two forms are known without them, too.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

HERMES, HERMES_END = "<tool_call>", "</tool_call>"
MISTRAL, MISTRAL_ARGUMENTS = "[TOOL_CALLS]", "[ARGS]"
LLAMA = "<|python_tag|>"
MARKERS = (HERMES, MISTRAL, LLAMA)

_decoder = json.JSONDecoder()


class Call(NamedTuple):
    """A call of a tool: the name of its function, and the arguments as JSON."""

    id: str
    name: str
    arguments: str


class Parsed(NamedTuple):
    """An answer, taken apart: its text, and the calls in it."""

    content: str
    calls: list[Call]


def parse(text: str, names: Collection[str]) -> Parsed:
    """The calls in `text` of functions that have one of `names`; whatever is no such call is content.

    >>> parse('Wait. <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>', ["add"]).calls[0][1:]
    ('add', '{"a": 1}')
    >>> parse('{"name": "add", "parameters": {}}', ["add"]).calls[0][1:]
    ('add', '{}')
    >>> parse('{"name": "sub", "parameters": {}}', ["add"])
    Parsed(content='{"name": "sub", "parameters": {}}', calls=[])
    """
    content, marker, rest = _cut(text)
    if marker == HERMES:
        objects = _hermes(rest)
    elif marker:
        objects = _plain(rest, names)
    else:
        content, objects = "", _plain(text, names)
    calls = [call for value in objects or () if (call := _call(value, names)) is not None]
    if not calls or objects is None or len(calls) < len(objects):
        return Parsed(text, [])
    return Parsed(content.rstrip() if marker else content, calls)


def may_begin(text: str, names: Collection[str]) -> int:
    """How much of `text`, the beginning of an answer, is content for sure: no call begins within it.

    >>> may_begin("Hello <tool", ["add"]), may_begin(' {"na', ["add"]), may_begin("ad", ["add"])
    (5, 0, 0)
    """
    stripped = text.lstrip()
    if stripped.startswith(("{", "[")) or any(_overlap(stripped, name) for name in names):
        return 0
    content, marker, _ = _cut(text)
    if marker:
        return len(content.rstrip())
    held = max((size for mark in MARKERS for size in range(1, len(mark)) if text.endswith(mark[:size])), default=0)
    return len(text[: len(text) - held].rstrip())


class AnswerReader:
    """Reads an answer as it comes: what is content is given out at once, what may be a call is held back."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._text = ""
        self._num_given = 0

    def push(self, text: str) -> str:
        """Take more of the answer; returns what is content for sure."""
        if not self._names:
            return text
        self._text += text
        return self._give(may_begin(self._text, self._names))

    def finish(self) -> Parsed:
        """The rest of the content, and the calls."""
        if not self._names:
            return Parsed("", [])
        content, calls = parse(self._text, self._names)
        return Parsed(content[self._num_given :], calls)

    def _give(self, end: int) -> str:
        given = self._text[self._num_given : end]
        self._num_given = max(self._num_given, end)
        return given


def parse_own(tokenizer: Any, token_ids: Sequence[int], names: Collection[str]) -> Parsed | None:
    """The answer, parsed by the tokenizer's own template; None if it has none, or it does not fit."""
    if not getattr(tokenizer, "response_template", None):
        return None
    try:
        message = tokenizer.parse_response(list(token_ids))
        calls = [_call(call.get("function", call), names) for call in message.get("tool_calls") or ()]
    except Exception:  # of a template that others wrote, on what a model wrote
        return None
    found = [call for call in calls if call is not None]
    return Parsed(message.get("content") or "", found) if found and len(found) == len(calls) else None


def _overlap(text: str, name: str) -> bool:
    """Whether `text` begins with `name` and JSON, or may yet do so."""
    if text.startswith(name):
        return text[len(name) :].lstrip()[:1] in ("", "{", "[")
    return bool(text) and name.startswith(text)


def _cut(text: str) -> tuple[str, str, str]:
    """`text` before the first marker, the marker, and what follows; without one, all of it is before."""
    places = [(place, marker) for marker in MARKERS if (place := text.find(marker)) >= 0]
    if not places:
        return text, "", ""
    place, marker = min(places)
    return text[:place], marker, text[place + len(marker) :]


def _hermes(text: str) -> list[Any] | None:
    objects = []
    for part in text.split(HERMES):
        try:
            objects.append(json.loads(part.partition(HERMES_END)[0]))
        except ValueError:
            return None
    return objects


def _plain(text: str, names: Collection[str]) -> list[Any] | None:
    """The objects that `text` consists of, and nothing else: a list, or one after the other."""
    rest, objects = text.strip(), []
    while rest:
        name = next((name for name in names if rest.startswith(name) and _overlap(rest, name)), None)
        if name is not None:
            rest = rest[len(name) :].lstrip().removeprefix(MISTRAL_ARGUMENTS).lstrip()
        try:
            value, end = _decoder.raw_decode(rest)
        except ValueError:
            return None
        if name is not None:
            value = {"name": name, "arguments": value}
        objects += value if isinstance(value, list) else [value]
        rest = rest[end:].lstrip().removeprefix(";").removeprefix(MISTRAL).lstrip()
    return objects


def _call(value: Any, names: Collection[str]) -> Call | None:
    if not isinstance(value, dict) or value.get("name") not in names:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            return None
    if not isinstance(arguments, dict):
        return None
    return Call(f"call_{secrets.token_hex(12)}", value["name"], json.dumps(arguments, ensure_ascii=False))
