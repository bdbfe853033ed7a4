"""The items of a response's output: messages and calls of functions, whole and as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from radixkv.serving.tool_calls import Arguments, Call, CallBegun, Parsed, Piece, Text


def output_items(message_id: str, parsed: Parsed) -> list[dict[str, Any]]:
    """The items of a whole answer; an empty one is an empty message."""
    parts = parsed.parts or [""]
    return [
        _call_item(part) if isinstance(part, Call) else _message_item(message_id, index, part)
        for index, part in enumerate(parts)
    ]


class ItemStream:
    """Makes the events of a response's items from the pieces of its answer.

    Attributes:
        parts: the texts and calls that are whole.
    """

    def __init__(self, message_id: str, emit: Callable[..., bytes]) -> None:
        """Args: emit: makes an event of its type and fields."""
        self.parts: list[str | Call] = []
        self._message_id = message_id
        self._emit = emit
        self._text: str | None = None  # of the message that is open
        self._call_id = ""  # of the call that has begun

    def events(self, piece: Piece) -> Iterator[bytes]:
        """The events that tell of `piece`."""
        if isinstance(piece, Text):
            if self._text is None:
                yield from self._open_message()
            self._text = (self._text or "") + piece.text
            yield self._emit("response.output_text.delta", **self._text_place(), delta=piece.text, logprobs=[])
            return
        yield from self._close_message()
        index = len(self.parts)
        if isinstance(piece, CallBegun):
            self._call_id = piece.id
            item = {**_call_item(Call(piece.id, piece.name, "")), "status": "in_progress"}
            yield self._emit("response.output_item.added", output_index=index, item=item)
            return
        place = {"item_id": _item_id(self._call_id), "output_index": index}
        if isinstance(piece, Arguments):
            yield self._emit("response.function_call_arguments.delta", **place, delta=piece.text)
            return
        done = {"name": piece.name, "arguments": piece.arguments}
        yield self._emit("response.function_call_arguments.done", **place, **done)
        yield self._emit("response.output_item.done", output_index=index, item=_call_item(piece))
        self.parts.append(piece)

    def end(self) -> Iterator[bytes]:
        """The last events; an empty answer is an empty message."""
        if self._text is None and not self.parts:
            yield from self._open_message()
        yield from self._close_message()

    def _open_message(self) -> Iterator[bytes]:
        self._text = ""
        index = len(self.parts)
        item = {**_message_item(self._message_id, index, ""), "status": "in_progress", "content": []}
        yield self._emit("response.output_item.added", output_index=index, item=item)
        yield self._emit("response.content_part.added", **self._text_place(), part=_text_part(""))

    def _close_message(self) -> Iterator[bytes]:
        if self._text is None:
            return
        text, index = self._text, len(self.parts)
        item = _message_item(self._message_id, index, text)
        yield self._emit("response.output_text.done", **self._text_place(), text=text, logprobs=[])
        yield self._emit("response.content_part.done", **self._text_place(), part=_text_part(text))
        yield self._emit("response.output_item.done", output_index=index, item=item)
        self.parts.append(text)
        self._text = None

    def _text_place(self) -> dict[str, Any]:
        index = len(self.parts)
        return {"item_id": _message_id(self._message_id, index), "output_index": index, "content_index": 0}


def _message_id(first: str, index: int) -> str:
    """The id of a message that is item `index`."""
    return f"{first}_{index}" if index else first


def _item_id(call_id: str) -> str:
    return call_id.replace("call_", "fc_", 1)


def _message_item(message_id: str, index: int, text: str) -> dict[str, Any]:
    return {
        "type": "message",
        "id": _message_id(message_id, index),
        "role": "assistant",
        "status": "completed",
        "content": [_text_part(text)],
    }


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _call_item(call: Call) -> dict[str, Any]:
    return {
        "type": "function_call",
        "id": _item_id(call.id),
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
        "status": "completed",
    }
