"""Calls of tools that the tokenizer finds itself, where it has a template for answers."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

from radixkv.serving.answer_reader import AnswerReader
from radixkv.serving.tool_calls import Arguments, Call, CallBegun, Parsed, Piece, Text, as_object, new_call_id


def reader_of(tokenizer: Any, names: Collection[str], *, parallel: bool = True) -> AnswerReader:
    """The reader of one answer of a model with `tokenizer`."""
    if names and _has_own_form(tokenizer):
        return OwnFormReader(tokenizer, names, parallel=parallel)
    return AnswerReader(names, parallel=parallel)


class OwnFormReader(AnswerReader):
    """Reads answers that the tokenizer parses itself, which it can do at their end alone; all is held back until then.

    What it does not find calls in is read in the common forms.
    """

    def __init__(self, tokenizer: Any, names: Collection[str], *, parallel: bool = True) -> None:
        super().__init__(names, parallel=parallel)
        self._tokenizer = tokenizer
        self._held: list[str] = []

    def push(self, text: str) -> list[Piece]:
        self._held.append(text)
        return []

    def finish(self, token_ids: Sequence[int]) -> list[Piece]:
        found = parse_own(self._tokenizer, token_ids, self._names)
        if found is None:
            return super().push("".join(self._held)) + super().finish(token_ids)
        pieces: list[Piece] = [Text(found.content)] if found.content else []
        for call in found.calls if self._parallel else found.calls[:1]:
            number, self.num_calls = self.num_calls, self.num_calls + 1
            pieces += [CallBegun(number, call.id, call.name), Arguments(number, call.arguments), call]
        return pieces


def parse_own(tokenizer: Any, token_ids: Sequence[int], names: Collection[str]) -> Parsed | None:
    """The answer, parsed by the tokenizer's own template; None if it has none, or it does not fit."""
    if not _has_own_form(tokenizer):
        return None
    try:
        message = tokenizer.parse_response(list(token_ids))
        calls = [_call(call.get("function", call), names) for call in message.get("tool_calls") or ()]
    except Exception:  # of a template that others wrote, on what a model wrote
        return None
    found = [call for call in calls if call is not None]
    content = [message["content"]] if message.get("content") else []
    return Parsed([*content, *found]) if found and len(found) == len(calls) else None


def _has_own_form(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "response_template", None))


def _call(value: Any, names: Collection[str]) -> Call | None:
    if not isinstance(value, dict) or value.get("name") not in names:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = as_object(arguments or "{}")
    if not isinstance(arguments, dict):
        return None
    return Call(new_call_id(), value["name"], json.dumps(arguments, ensure_ascii=False))
