"""Token ids beside the text of a stream, so that another server can go on where this one stops.

They are told in comments, which clients of server-sent events skip: `: radixkv-ids 5,17`. A comment comes before the
text of its ids, so whoever has read some text has read all of its ids.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from radixkv.serving.generation import Generation

MARK = b": radixkv-ids "


def comment_of(ids: Sequence[int]) -> bytes:
    """The comment that tells `ids`.

    >>> comment_of([5, 17])
    b': radixkv-ids 5,17\\n\\n'
    """
    return MARK + ",".join(map(str, ids)).encode() + b"\n\n"


def ids_in(comment: bytes) -> list[int]:
    """The ids that a comment tells; none if it is another one.

    >>> ids_in(b": radixkv-ids 5,17\\n\\n"), ids_in(b": keep-alive\\n\\n")
    ([5, 17], [])
    """
    return [int(word) for word in comment[len(MARK) :].split(b",")] if comment.startswith(MARK) else []


async def told(events: AsyncGenerator[bytes], generation: Generation) -> AsyncGenerator[bytes]:
    """`events` of `generation`, and before each the ids that it tells of."""
    async with aclosing(events):
        async for event in events:
            ids = generation.take_ids()
            yield comment_of(ids) + event if ids else event
