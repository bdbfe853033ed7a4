"""Reading request traces: each format, malformed lines, and blocks that become tokens."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from radixkv.errors import ConfigError, InvalidRequestError, MissingTokenizerError
from radixkv.replay.traces import ExpandedBlocks, Request, Trace, parse_trace, read_trace


def lines(*rows: Any) -> list[bytes]:
    """Rows as a file has them; what is bytes already is taken as it stands."""
    return [row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows]


def parse(*rows: Any, **options: Any) -> Trace:
    return parse_trace(lines(*rows), "t", **{"block_tokens": 4, **options})


def blocks(num_tokens: Any, ids: Any, **fields: Any) -> dict[str, Any]:
    return {"timestamp": 0, "input_length": num_tokens, "output_length": 9, "hash_ids": ids, **fields}


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


# ------------------------------------------------------------------------------------------------------------- formats


def test_blocks() -> None:
    trace = parse(blocks(7, [0, 1]), blocks(9, [0, 1, 2], timestamp=1500), blocks(8, [0, 3]))
    assert (trace.kind, trace.key_tokens, trace.num_tokens) == ("hash_ids", 4, 24)
    assert [request.keys.tolist() for request in trace.requests] == [[0, 1], [0, 1, 2], [0, 3]]
    assert [request.stored.tolist() for request in trace.requests] == [[0, 1], [0, 1, 2], [0, 3]]
    assert [request.num_tokens for request in trace.requests] == [7, 9, 8]
    assert [request.time_s for request in trace.requests] == [0, 1.5, 0]
    assert {request.keys.dtype for request in trace.requests} == {np.dtype(np.int32)}


def test_block_ids_of_any_kind_are_numbered_in_order_of_appearance() -> None:
    trace = parse(blocks(8, [2**63, "a"]), blocks(8, [2**63, -5]), blocks(4, ["a"]))
    assert [request.keys.tolist() for request in trace.requests] == [[0, 1], [0, 2], [1]]


def test_a_partial_block_may_be_left_out() -> None:
    trace = parse(blocks(7, [5]), blocks(3, []))
    assert [request.keys.tolist() for request in trace.requests] == [[0], []]
    assert trace.num_tokens == 10


@pytest.mark.parametrize("field", ["token_ids", "input_tok_ids"])
@pytest.mark.parametrize("output_field", ["output_token_ids", "output_tok_ids"])
def test_token_ids_are_stored_with_their_output_but_for_its_last_token(field: str, output_field: str) -> None:
    trace = parse({field: [7, 8, 9], output_field: [1, 2, 3]}, {field: [7]}, {field: [7], output_field: []})
    assert (trace.kind, trace.key_tokens, trace.num_tokens) == (field, 1, 5)
    assert [request.keys.tolist() for request in trace.requests] == [[7, 8, 9], [7], [7]]
    assert [request.stored.tolist() for request in trace.requests] == [[7, 8, 9, 1, 2], [7], [7]]


def test_texts_are_encoded() -> None:
    trace = parse({"input": "ab", "output": "cd"}, {"input": "xyz"}, encode=letters)
    assert (trace.kind, trace.key_tokens, trace.num_tokens) == ("input", 1, 5)
    assert [request.keys.tolist() for request in trace.requests] == [letters("ab"), letters("xyz")]
    assert [request.stored.tolist() for request in trace.requests] == [letters("abc"), letters("xyz")]


def test_texts_need_a_tokenizer() -> None:
    with pytest.raises(MissingTokenizerError, match="t, line 2: this is a trace of texts; give the tokenizer"):
        parse({"input": ""}, {"input": "ab"}, on_malformed=lambda _: None)


def test_the_first_good_line_decides_the_format() -> None:
    malformed: list[InvalidRequestError] = []
    rows = [{"input_tok_ids": "?"}, {"token_ids": [1]}, {"input_tok_ids": [2]}, {"token_ids": [3]}]
    trace = parse(*rows, on_malformed=malformed.append)
    assert [request.keys.tolist() for request in trace.requests] == [[1], [3]]
    assert [str(error) for error in malformed] == [
        't, line 1: "input_tok_ids" must be a list of token ids, not str',
        "t, line 3: a request needs \"token_ids\"; this one has 'input_tok_ids'",
    ]


@pytest.mark.parametrize(
    ("fields", "time_s"),
    [
        ({}, 0.0),
        ({"timestamp": None}, 0.0),
        ({"timestamp": 2500}, 2.5),
        ({"timestamp": 1_760_428_436}, 1_760_428_436.0),
        ({"timestamp": 1_760_428_436.5}, 1_760_428_436.5),
        ({"timestamp": 1_760_428_436_442}, 1_760_428_436.442),
        ({"timestamp": 1_760_428_436_442_742}, 1_760_428_436.442742),
        ({"timestamp": 1_760_428_436_442_742_000}, 1_760_428_436.442742),
        ({"timestamp": "2023-11-16 18:17:03.9799600"}, 1_700_158_623.97996),
        ({"timestamp": "2023-11-16T19:17:03+01:00"}, 1_700_158_623.0),
        ({"timestamp": " 2023-11-16T18:17:03Z"}, 1_700_158_623.0),
        ({"arrival_time_ns": 46_926_808, "timestamp": 3}, 0.046926808),
    ],
)
def test_times(fields: dict[str, Any], time_s: float) -> None:
    assert parse({"token_ids": [1], **fields}).requests[0].time_s == pytest.approx(time_s)


@pytest.mark.parametrize(
    ("clock", "times_s"),
    [
        ([0, 3000, 3000, 9500], [0.0, 3.0, 3.0, 9.5]),  # Mooncake
        ([0.0, 0.25, 1.5, 61.114], [0.0, 0.25, 1.5, 61.114]),  # Qwen-Bailian
        ([0.0, 1.0, 61.5], [0.0, 1.0, 61.5]),
        ([0, 0, 0, 1, 1, 2], [0.0, 0.0, 0.0, 1.0, 1.0, 2.0]),  # three requests a millisecond are none that people have
        ([0.5, 912.75, 2413.0], [0.0005, 0.91275, 2.413]),  # nor is one in 20 minutes
        ([7, 7, 7], [0.007, 0.007, 0.007]),
        ([500_000.5], [500_000.5]),
        ([None, 1.5, 1_760_428_436], [0.0, 0.0015, 1_760_428_436.0]),  # of two clocks: nothing can be found out
    ],
)
def test_the_clock_of_a_trace_that_begins_at_0_counts_milliseconds_or_seconds(
    clock: list[float | None], times_s: list[float]
) -> None:
    trace = parse(*({"token_ids": [1], "timestamp": time} for time in clock))
    assert [request.time_s for request in trace.requests] == pytest.approx(times_s)


def test_times_in_csv_are_read(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_bytes(b"Timestamp,Prompt\n2023-11-16 18:17:03.5,a\n2023-11-16 18:17:05,b\n")
    times = [request.time_s for request in read_trace(path, encode=letters).requests]
    assert times == [1_700_158_623.5, 1_700_158_625.0]
    path.write_bytes(b"prompt,output,arrival_time_ns\na,b,5000000000\nc,,\n")
    assert [request.time_s for request in read_trace(path, encode=letters).requests] == [5.0, 0.0]


def test_blank_lines_are_no_requests_and_limit_counts_good_ones() -> None:
    rows = [b"\n", {"token_ids": [1]}, b"  \n", b"{\n", {"token_ids": [2]}, b"never read"]
    malformed: list[InvalidRequestError] = []
    assert len(parse(*rows, limit=2, on_malformed=malformed.append).requests) == 2
    assert [str(error)[:9] for error in malformed] == ["t, line 4"]


# ----------------------------------------------------------------------------------------------------- malformed lines


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b"{", "this is not valid JSON"),
        (b'{"token_ids": [1]}{', "this is not valid JSON"),
        (b"[" * 100_000, "this is not valid JSON"),
        (b'{"token_ids": "\xff"}', "this is not valid JSON"),
        ([1], "a request must be an object, not list"),
        (
            {},
            'or "input" or "prompt" or "text" or "conversations" or "messages" or "turns"; this one has no fields',
        ),
        (dict.fromkeys("abcdefgh"), "this one has 'a', 'b', 'c', 'd', 'e', 'f', …"),
        (blocks(None, [1]), '"input_length" must be a positive whole number, not None'),
        (blocks(0, []), '"input_length" must be a positive whole number, not 0'),
        (blocks(True, [1]), "not True"),
        (blocks(4.0, [1]), "not 4.0"),
        (blocks(4, 1), '"hash_ids" must be a list of block ids'),
        (blocks(4, [1.5]), '"hash_ids" must be a list of block ids'),
        (blocks(4, [True]), '"hash_ids" must be a list of block ids'),
        (blocks(9, [1]), "9 tokens are 3 blocks of 4, not 1; check the number of tokens a block"),
        (blocks(4, [1, 2]), "4 tokens are 1 blocks of 4, not 2"),
        (
            blocks(4, [1], timestamp="now"),
            "\"timestamp\" must be a number of at least 0 or an ISO 8601 time from 1970 on, not 'now'",
        ),
        (blocks(4, [1], timestamp="1969-12-31"), "not '1969-12-31'"),
        (blocks(4, [1], arrival_time_ns="2023-11-16"), '"arrival_time_ns" must be a number of at least 0, not'),
        (blocks(4, [1], timestamp=-1), "not -1"),
        (b'{"token_ids": [1], "timestamp": NaN}', "not nan"),
        ({"token_ids": []}, '"token_ids" is empty'),
        ({"token_ids": {"a": 1}}, '"token_ids" must be a list of token ids, not dict'),
        ({"token_ids": [1, -2]}, "token id -2 at position 1"),
        ({"token_ids": [1, 2**31]}, "token id 2147483648 at position 1"),
        ({"token_ids": [1, 0.5]}, "token ids must be integers"),
        ({"token_ids": [1], "output_token_ids": ["a"]}, "token ids must be integers"),
        ({"input": ["a"]}, '"input" must be a text, not list'),
        ({"input": ""}, '"input" is empty'),
        ({"input": " "}, '"input" has no tokens'),
        ({"input": "a", "output": 1}, '"output" must be a text, not int'),
        (b'{"input": "\\ud800"}', '"input" is not valid Unicode'),
        ({"messages": "a"}, "a conversation must be a list of messages"),
        ({"messages": ["a"]}, '"messages" must hold objects with a text "content"'),
        ({"conversations": [{"from": "human"}]}, '"conversations" must hold objects with a text "value"'),
    ],
)
def test_malformed(row: Any, message: str) -> None:
    def encode(text: str) -> list[int]:
        return letters(text.strip())

    with pytest.raises(InvalidRequestError, match=r"^t, line 1: ") as caught:
        parse(row, encode=encode)
    assert message in str(caught.value)
    with pytest.raises(InvalidRequestError, match="t holds no requests"):
        parse(row, encode=encode, on_malformed=lambda _: None)


def test_a_trace_needs_requests_and_sane_settings() -> None:
    with pytest.raises(InvalidRequestError, match="t holds no requests"):
        parse()
    for options in ({"block_tokens": 0}, {"limit": 0}):
        with pytest.raises(ConfigError, match="at least 1, not"):
            parse({"token_ids": [1]}, **options)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(b"".join(lines({"token_ids": [1, 2]}, b"?\n")))
    with pytest.raises(InvalidRequestError, match=r"trace\.jsonl, line 2: this is not valid JSON"):
        read_trace(path)
    assert read_trace(str(path), on_malformed=lambda _: None).num_tokens == 2
    for bad in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InvalidRequestError, match="cannot be read"):
            read_trace(bad)


CHAT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "c"}]
CHAT += [{"from": "gpt", "value": "d"}]
OPENAI = [{"role": "user" if turn["from"] == "human" else "assistant", "content": turn["value"]} for turn in CHAT]


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        (json.dumps([{"id": "x", "conversations": CHAT}], indent=1).encode(), ["a\n\n", "a\n\nb\n\nc\n\n"]),
        (json.dumps({"messages": OPENAI}).encode(), ["a\n\n", "a\n\nb\n\nc\n\n"]),
        (json.dumps({"messages": OPENAI[:1]}).encode(), ["a"]),
        (b'{"session_id": "s", "turns": [{"text": "a"}, {"text": "c", "delay": 5}]}', ["a", "a\n\nc"]),
        (b'{"prompt": "a"}\n{"prompt": "b"}\n', ["a", "b"]),
        (b'\xef\xbb\xbf{"text": "a"}\n', ["a"]),
        (b"one prompt\r\n\nanother\n", ["one prompt", "another"]),
        (b'prompt,output\n"a, with\na break",b\nc,\n', ["a, with\na break", "c"]),
        (gzip.compress(b'{"input": "a"}\n', mtime=0), ["a"]),
        ('{"input": "ä"}\n{"input": "b"}\n'.encode("utf-16"), ["ä", "b"]),
    ],
)
def test_the_formats_that_people_have_are_read_whole(tmp_path: Path, content: bytes, prompts: list[str]) -> None:
    path = tmp_path / "trace"
    path.write_bytes(content)
    trace = read_trace(path, encode=letters)
    assert [request.keys.tolist() for request in trace.requests] == [letters(prompt) for prompt in prompts]


def test_an_answer_is_stored_and_limit_counts_turns(tmp_path: Path) -> None:
    trace = parse({"conversations": CHAT}, {"conversations": CHAT}, encode=lambda text: letters(text * 2), limit=3)
    assert len(trace.requests) == 3
    assert trace.requests[0].stored.tolist() == letters("a\n\na\n\nb")


@pytest.mark.parametrize(
    "header",
    [
        b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.97,374,44\n",
        b"Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,API log\n",
    ],
)
def test_a_trace_of_counts_is_refused_by_what_it_lacks(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "trace.csv"
    path.write_bytes(header)
    with pytest.raises(InvalidRequestError, match="shared prefixes cannot be known from it"):
        read_trace(path, on_malformed=lambda _: None)


@pytest.mark.parametrize("content", [gzip.compress(b'{"input": "a"}', mtime=0)[:-6], b'[{"input": "a"},'])
def test_damaged_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "trace"
    path.write_bytes(content)
    with pytest.raises(InvalidRequestError, match=r"is damaged|is not a valid JSON array"):
        read_trace(path, encode=letters)


def test_text_in_another_encoding_is_refused_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    for content, line in {b"caf\xe9\nplain\n": 1, b"plain\n\ncaf\xe9\n": 3}.items():
        path.write_bytes(content)
        with pytest.raises(InvalidRequestError, match=f"trace, line {line}: this is not valid UTF-8: "):
            read_trace(path, encode=letters)
    path.write_bytes("a".encode("utf-16") + b"x")
    with pytest.raises(InvalidRequestError, match=r"trace is damaged: .*truncated data"):
        read_trace(path, encode=letters)


# ------------------------------------------------------------------------------------------------------------ expanding


def test_blocks_become_tokens_that_tell_them_apart() -> None:
    trace = parse(blocks(7, [0, 1]), blocks(12, [0, 1, 2]), blocks(2, []), blocks(6, [3]))
    expanded = ExpandedBlocks(trace.requests, trace.key_tokens)
    assert len(expanded) == 4
    expected = [np.random.default_rng(block).integers(0, 128_000, 4).tolist() for block in range(4)]
    for _ in range(2):  # it can be iterated over again
        requests = list(expanded)
        assert [request.keys.tolist() for request in requests] == [
            (expected[0] + expected[1])[:7],
            expected[0] + expected[1] + expected[2],
            [],
            expected[3],
        ]
        assert all(request.stored is request.keys and request.keys.dtype == np.int32 for request in requests)
        assert [request.num_tokens for request in requests] == [7, 12, 2, 6]


def test_no_blocks_at_all() -> None:
    nothing = np.empty(0, np.int32)
    assert [request.keys.tolist() for request in ExpandedBlocks([Request(nothing, nothing, 3)], 4)] == [[]]
    assert list(ExpandedBlocks([], 4)) == []
