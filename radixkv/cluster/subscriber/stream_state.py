"""Puts the messages of one replica in order, and says what must be asked for where some are missing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

WireEvent: TypeAlias = "dict[str, Any]"
MAX_HELD = 10_000


class Sink(Protocol):
    """Where the events of one replica go."""

    def clear(self) -> None:
        """Forget all that the replica holds."""
        ...

    def apply(self, events: Sequence[WireEvent]) -> bool:
        """Follow the events of one message. Returns: False if they do not fit what came before."""
        ...


class Message(NamedTuple):
    """The events with one sequence number."""

    seq: int
    events: Sequence[WireEvent]

    @property
    def epoch(self) -> int | None:
        """Of the publisher."""
        return self.events[0].get("epoch") if self.events else None


class AnswerEnd(NamedTuple):
    """What ends an answer of a publisher.

    Attributes:
        epoch: of the publisher.
        next_seq: the number that its next message will have.
        is_complete: of a snapshot, whether there is one; of a replay, whether all from the number that was asked for on
            are still kept.
    """

    epoch: int
    next_seq: int
    is_complete: bool


class StreamState:
    """Where a consumer stands in the messages of one replica. No I/O, no clock.

    Messages may be lost, doubled or late, and the publisher may begin anew: what reaches `sink` is a snapshot and then
    each message that follows it, once and in order. Whatever `wants_*` asks for is asked again until it comes; without
    news, ask for a replay from `next_seq` now and then, which tells of messages lost at the end.

    Attributes:
        epoch: of the publisher that is followed; None before the first snapshot.
        next_seq: the number of the message that comes next.
        wants_snapshot: whether nothing but a snapshot helps; messages wait meanwhile.
        num_gaps, num_restarts, num_snapshots: times that messages were missing, that the publisher was another one, and
            that a snapshot was taken.
    """

    def __init__(self, sink: Sink, *, max_held: int = MAX_HELD) -> None:
        """max_held: messages that wait for an earlier one at most; more of them are fetched later."""
        self._sink, self._max_held = sink, max_held
        self._held: dict[tuple[int | None, int], Message] = {}
        self.epoch: int | None = None
        self.next_seq = 0
        self.wants_snapshot = True
        self.num_gaps = self.num_restarts = self.num_snapshots = 0

    @property
    def wants_replay(self) -> bool:
        """Whether messages are missing before others that came: those from `next_seq` on."""
        return bool(self._held) and not self.wants_snapshot

    @property
    def num_held(self) -> int:
        """Messages that wait."""
        return len(self._held)

    @property
    def is_current(self) -> bool:
        """Whether nothing is known to be missing."""
        return not self._held and not self.wants_snapshot

    def message(self, message: Message) -> None:
        """A message came, live or replayed."""
        if self.wants_snapshot or message.epoch != self.epoch:
            self.wants_snapshot = True
            self._hold(message)
        elif message.seq == self.next_seq:
            self._take(message)
            self._take_held()
        elif message.seq > self.next_seq:
            self.num_gaps += not self._held
            self._hold(message)

    def replayed(self, messages: Iterable[Message], end: AnswerEnd) -> None:
        """A replay from `next_seq` came, or a part of it; as `next_seq` was when it was asked for."""
        for message in messages:
            self.message(message)
        if end.epoch != self.epoch or (self.next_seq < end.next_seq and not end.is_complete):
            self.wants_snapshot = True

    def snapshot(self, batches: Iterable[Sequence[WireEvent]], end: AnswerEnd) -> None:
        """A snapshot came whole: all that is held after the messages before `end.next_seq`."""
        if not self.wants_snapshot or not end.is_complete:
            return
        self.num_restarts += self.epoch not in (None, end.epoch)
        self.num_snapshots += 1
        self.epoch, self.next_seq = end.epoch, end.next_seq
        self._sink.clear()
        for events in batches:
            self._sink.apply(events)
        self.wants_snapshot = False
        self._take_held()

    def _hold(self, message: Message) -> None:
        if len(self._held) >= self._max_held:
            del self._held[next(iter(self._held))]
        self._held[message.epoch, message.seq] = message

    def _take(self, message: Message) -> None:
        self.next_seq += 1
        if not self._sink.apply(message.events):
            self.wants_snapshot = True

    def _take_held(self) -> None:
        """Take what came too early, and forget what is of no use any more."""
        while not self.wants_snapshot and (next_one := self._held.pop((self.epoch, self.next_seq), None)) is not None:
            self._take(next_one)
        if not self.wants_snapshot:
            self._held = {key: held for key, held in self._held.items() if self._is_of_use(held)}

    def _is_of_use(self, message: Message) -> bool:
        return message.epoch == self.epoch and message.seq > self.next_seq
