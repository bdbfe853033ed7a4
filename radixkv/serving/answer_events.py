"""The events of an answer, made from the pieces of its generation."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Protocol

from radixkv.engine.outputs import Progress
from radixkv.serving.generation import Generation, Piece
from radixkv.serving.streaming import EventStream


class AnswerEvents(Protocol):
    """Makes the events of one answer in the form of an interface."""

    def events(self, index: int, progress: Progress) -> Iterable[bytes]:
        """The events that tell what a choice gained; called with each piece once, in order."""
        ...

    def last_events(self) -> Iterable[bytes]:
        """The events that follow those of all pieces."""
        ...


async def events_of(generation: Generation, answer: AnswerEvents, stream: EventStream) -> AsyncGenerator[bytes]:
    """What is to be sent over `stream`: all that a piece brings at once.

    Most pieces are sent in the moment in which they come. Only if the stream is busy, and for the first and the last
    piece, this generator is resumed.
    """

    def send_now(piece: Piece) -> bool:
        if not stream.is_idle:
            return False
        stream.send_now(b"".join(answer.events(*piece)))
        return True

    async with aclosing(generation.pieces(send_now)) as pieces:
        async for piece in pieces:
            if data := b"".join(answer.events(*piece)):
                yield data
    if data := b"".join(answer.last_events()):
        yield data
