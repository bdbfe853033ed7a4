"""Token ids beside the text of a stream, so that another server can go on where this one stops.

They are told in comments, which clients of server-sent events skip: `: radixkv-ids 5,17`. A comment comes before the
text of its ids, so whoever has read some text has read all of its ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from radixkv.engine.outputs import Progress
from radixkv.serving.answer_events import AnswerEvents

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


class ToldIds:
    """The events of an answer with one choice, and before each the ids that it tells of."""

    def __init__(self, answer: AnswerEvents) -> None:
        self._answer = answer
        self._untold: list[int] = []

    def events(self, index: int, progress: Progress) -> Iterator[bytes]:
        """The events that tell what the choice gained."""
        self._untold += progress.token_ids
        for event in self._answer.events(index, progress):
            ids, self._untold = self._untold, []
            yield comment_of(ids) + event if ids else event

    def last_events(self) -> Iterable[bytes]:
        """What follows all pieces."""
        return self._answer.last_events()
