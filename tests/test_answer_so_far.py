"""What a client has of a stream, put together from two streams of the same answer that are cut differently."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from itertools import pairwise
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from radixkv.cluster.answer_so_far import AnswerSoFar
from radixkv.cluster.events_in import whole_events
from radixkv.serving.streaming import DONE, event
from radixkv.serving.told_ids import comment_of

NAMES = ["chatcmpl-" + digit * 24 for digit in "ab"]


def chunk(name: str, delta: dict[str, Any], reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
    return event({"id": name, "created": int(name[-1], 16), "choices": [choice]})


def stream(name: str, text: str, cuts: list[int]) -> list[bytes]:
    """The events of a chat's stream that has one id for each character, its text cut at `cuts`."""
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    head, events = chunk(name, {"role": "assistant", "content": ""}), []
    for start, end in pairwise(edges):
        if start < end:
            told_ids = comment_of([ord(character) for character in text[start:end]])
            events += [told_ids, head, chunk(name, {"content": text[start:end]})]
            head = b": keep-alive\n\n"
    return [*events, chunk(name, {}, "stop"), DONE]


def data_of(events: list[bytes]) -> list[bytes]:
    """Those events that have JSON."""
    return [one for one in events if one.startswith(b"data: {")]


def told(events: list[bytes]) -> str:
    """The text of chunks."""
    chunks = [json.loads(one[6:]) for one in data_of(events)]
    return "".join(one["choices"][0]["delta"].get("content") or "" for one in chunks)


@example(text="abcd", cuts=[[2], [3]], broken_at=3)  # the second cuts a piece where the client has half of it
@given(
    text=st.text(st.characters(codec="utf-8"), min_size=1, max_size=12),
    cuts=st.lists(st.lists(st.integers(0, 12), max_size=4), min_size=2, max_size=2),
    broken_at=st.integers(0, 20),
)
def test_two_streams_make_one_answer(text: str, cuts: list[list[int]], broken_at: int) -> None:
    first, second = (stream(name, text, cut) for name, cut in zip(NAMES, cuts, strict=True))
    so_far = AnswerSoFar()
    sent = [kept for one in first[:broken_at] if (kept := so_far.take(one)) is not None]
    assert so_far.ids[: len(told(sent))] == [ord(character) for character in told(sent)], (
        "ids of all text that was sent"
    )
    so_far.begin_again()
    sent += [kept for one in second if (kept := so_far.take(one)) is not None]
    assert told(sent) == text
    assert so_far.ids == [ord(character) for character in text]
    assert sent.count(DONE) == 1
    kinds = [json.loads(one[6:])["choices"][0] for one in data_of(sent)]
    assert [kind["delta"].get("role") for kind in kinds].count("assistant") == 1
    assert [kind["finish_reason"] for kind in kinds].count("stop") == 1
    heads = {(json.loads(one[6:])["id"], json.loads(one[6:])["created"]) for one in data_of(sent)}
    assert len(heads) == 1, "the ids and times of the first stream that was sent"


def test_a_stream_that_is_not_broken_stays_as_it_is() -> None:
    events = stream(NAMES[0], 'He said "created":7, "msg_' + "0" * 24 + '".', [5, 9])
    so_far = AnswerSoFar()
    kept = [so_far.take(one) for one in events]
    assert [one for one in kept if one is not None] == [one for one in events if not one.startswith(b": radixkv-ids")]


def test_in_the_middle_of_a_call_it_cannot_go_on() -> None:
    so_far = AnswerSoFar()
    so_far.take(chunk(NAMES[0], {"content": "I look."}))
    assert so_far.can_go_on
    so_far.take(chunk(NAMES[0], {"tool_calls": [{"index": 0, "id": "call_1"}]}))
    assert not so_far.can_go_on


@given(st.binary(max_size=60).map(lambda data: data.replace(b"x", b"\n")), st.lists(st.integers(0, 60), max_size=6))
def test_whole_events_are_what_came(data: bytes, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]

    async def chunks() -> AsyncGenerator[bytes]:
        for start, end in pairwise(edges):
            yield data[start:end]

    async def main() -> list[bytes]:
        return [one async for one in whole_events(chunks())]

    found = asyncio.run(main())
    assert b"".join(found) == data
    assert all(one.endswith(b"\n\n") for one in found[:-1])
    assert all(b"\n\n" not in one[:-2] for one in found)
