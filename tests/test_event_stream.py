"""A consumer's place in the messages of a replica, over a network that loses, doubles and delays them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from radixkv.cluster.subscriber.stream_state import AnswerEnd, Message, StreamState

KEPT = 4  # messages that a publisher keeps for replay


class FakePublisher:
    """Holds a set of pages, and tells of each change in a message. Without I/O."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.pages: set[int] = set()
        self.messages: list[Message] = []

    def change(self, page: int) -> Message:
        kind = "BlockRemoved" if page in self.pages else "BlockStored"
        self.pages ^= {page}
        event = {"type": kind, "block_hashes": [page], "epoch": self.epoch}
        self.messages.append(Message(len(self.messages), [event]))
        return self.messages[-1]

    def replay(self, start: int) -> tuple[list[Message], AnswerEnd]:
        kept = self.messages[-KEPT:]
        is_complete = not kept or kept[0].seq <= start
        return [m for m in kept if m.seq >= start], AnswerEnd(self.epoch, len(self.messages), is_complete)

    def snapshot(self) -> tuple[list[list[dict[str, Any]]], AnswerEnd]:
        events = [{"type": "BlockStored", "block_hashes": [page], "epoch": self.epoch} for page in self.pages]
        return [events], AnswerEnd(self.epoch, len(self.messages), True)


class SetSink:
    """A set of pages that refuses what does not fit it."""

    def __init__(self) -> None:
        self.pages: set[int] = set()

    def clear(self) -> None:
        self.pages.clear()

    def apply(self, events: Sequence[dict[str, Any]]) -> bool:
        fits = True
        for event in events:
            (page,) = event["block_hashes"]
            fits = fits and (page in self.pages) == (event["type"] == "BlockRemoved")
            self.pages ^= {page}
        return fits


def settle(state: StreamState, publisher: FakePublisher) -> int:
    """Ask as a subscriber does when all is quiet, over a network that works again. Returns how often."""
    for asked in range(10):
        if asked and state.is_current:
            return asked
        if state.wants_snapshot:
            state.snapshot(*publisher.snapshot())
        else:
            state.replayed(*publisher.replay(state.next_seq))
    raise AssertionError("it never settles")


verbs = ["change", "change", "change", "lose", "delay", "delay", "double", "deliver", "deliver", "restart"]
steps = st.lists(
    st.tuples(st.sampled_from([*verbs, "new consumer", "ask", "late answer"]), st.integers(0, 5)), max_size=60
)


@given(steps=steps)
def test_it_ends_with_what_the_publisher_has(steps: list[tuple[str, int]]) -> None:
    epochs = itertools.count(1)
    publisher, sink = FakePublisher(next(epochs)), SetSink()
    state = StreamState(sink, max_held=3)
    under_way: list[Message] = []
    answers: list[Any] = []
    for verb, number in steps:
        if verb in ("change", "lose", "delay", "double"):
            message = publisher.change(number)
            if verb == "delay":
                under_way.append(message)
            elif verb != "lose":
                for _ in range(1 + (verb == "double")):
                    state.message(message)
        elif verb == "deliver" and under_way:
            state.message(under_way.pop(number % len(under_way)))
        elif verb == "restart":
            publisher = FakePublisher(next(epochs))
        elif verb == "new consumer":
            sink = SetSink()
            state = StreamState(sink, max_held=3)
            answers.clear()
        elif verb == "ask":
            answers.append(
                (state.snapshot, publisher.snapshot())
                if state.wants_snapshot
                else (state.replayed, publisher.replay(state.next_seq))
            )
        elif verb == "late answer" and answers:
            receive, (content, end) = answers.pop(number % len(answers))
            receive(content, end)
    for message in under_way:
        state.message(message)
    settle(state, publisher)
    assert sink.pages == publisher.pages
    assert (state.epoch, state.next_seq) == (publisher.epoch, len(publisher.messages))


def followed() -> tuple[FakePublisher, SetSink, StreamState]:
    publisher, sink = FakePublisher(1), SetSink()
    state = StreamState(sink)
    settle(state, publisher)
    return publisher, sink, state


def test_a_late_consumer_begins_with_a_snapshot_and_what_came_meanwhile() -> None:
    publisher, sink = FakePublisher(1), SetSink()
    for page in range(3):
        publisher.change(page)
    state = StreamState(sink)
    state.message(publisher.change(3))
    snapshot = publisher.snapshot()
    state.message(publisher.change(4))
    assert state.wants_snapshot
    state.snapshot(*snapshot)
    assert (sink.pages, state.is_current, state.num_gaps) == ({0, 1, 2, 3, 4}, True, 0)


def test_a_gap_is_filled_by_a_replay() -> None:
    publisher, sink, state = followed()
    publisher.change(1)
    state.message(publisher.change(2))
    assert (state.wants_replay, state.wants_snapshot, sink.pages) == (True, False, set())
    state.replayed(*publisher.replay(state.next_seq))
    assert (sink.pages, state.is_current, state.num_gaps, state.num_snapshots) == ({1, 2}, True, 1, 1)


def test_a_gap_that_is_not_kept_any_more_takes_a_snapshot() -> None:
    publisher, sink, state = followed()
    for page in range(KEPT + 1):
        publisher.change(page)
    state.message(publisher.change(9))
    state.replayed(*publisher.replay(state.next_seq))
    assert state.wants_snapshot
    state.snapshot(*publisher.snapshot())
    assert (sink.pages, state.is_current) == ({0, 1, 2, 3, 4, 9}, True)


def test_a_silent_loss_is_found_by_asking() -> None:
    publisher, sink, state = followed()
    publisher.change(1)
    assert state.is_current
    state.replayed(*publisher.replay(state.next_seq))
    assert sink.pages == {1}


def test_another_epoch_takes_a_snapshot() -> None:
    publisher, sink, state = followed()
    state.message(publisher.change(1))
    other = FakePublisher(2)
    other.change(7)
    state.message(other.change(8))
    assert (state.wants_snapshot, sink.pages) == (True, {1}), "what was known counts until the snapshot comes"
    state.snapshot(*other.snapshot())
    assert (sink.pages, state.num_restarts, state.is_current) == ({7, 8}, 1, True)


def test_what_does_not_fit_takes_a_snapshot() -> None:
    publisher, sink, state = followed()
    state.message(publisher.change(1))
    sink.pages.clear()
    state.message(publisher.change(1))
    assert state.wants_snapshot
    settle(state, publisher)
    assert sink.pages == publisher.pages


def test_a_publisher_without_a_snapshot_is_asked_again() -> None:
    _, _, state = followed()
    state.message(FakePublisher(2).change(1))
    state.snapshot([], AnswerEnd(2, 5, is_complete=False))
    assert state.wants_snapshot


def test_few_messages_wait_for_one_that_is_missing() -> None:
    publisher, sink = FakePublisher(1), SetSink()
    state = StreamState(sink, max_held=2)
    settle(state, publisher)
    publisher.change(0)
    for page in range(1, 6):
        state.message(publisher.change(page))
    assert state.num_held == 2
    settle(state, publisher)
    assert sink.pages == publisher.pages
