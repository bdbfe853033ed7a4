"""Whole events out of a stream of bytes."""

from __future__ import annotations

from collections.abc import AsyncGenerator

END = b"\n\n"


async def whole_events(chunks: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """The server-sent events in `chunks`, each with the empty line at its end; what comes after the last one, too.

    Joined they are what `chunks` are. O(bytes).
    """
    held = b""
    async for chunk in chunks:
        *events, held = (held + chunk).split(END)
        for event in events:
            yield event + END
    if held:
        yield held


def is_comment(event: bytes) -> bool:
    """Whether an event says nothing to a client, as those that keep a connection open."""
    return event.startswith(b":")
