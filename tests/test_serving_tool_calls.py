"""Calls of tools in what models write."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radixkv.serving.answer_reader import AnswerReader, parse
from radixkv.serving.own_form import parse_own, reader_of
from radixkv.serving.tool_calls import Arguments, Call, CallBegun, Parsed, Piece, Text, whole_members

NAMES = ("get_weather", "add")
WEATHER = ("get_weather", {"city": "Rome"})
ADD = ("add", {"a": 1, "b": [2, "}{"]})

CASES = [
    ('<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>', "", [WEATHER]),
    (
        'Let me see.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>\n'
        '<tool_call>{"name": "add", "arguments": {"a": 1, "b": [2, "}{"]}}</tool_call>',
        "Let me see.",
        [WEATHER, ADD],
    ),
    ('<tool_call>{"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": [2, \\"}{\\"]}"}', "", [ADD]),
    ('{"name": "get_weather", "parameters": {"city": "Rome"}}', "", [WEATHER]),
    ('<|python_tag|>{"name": "get_weather", "parameters": {"city": "Rome"}}', "", [WEATHER]),
    (
        '{"name": "get_weather", "parameters": {"city": "Rome"}}; '
        '{"name": "add", "parameters": {"a": 1, "b": [2, "}{"]}}',
        "",
        [WEATHER, ADD],
    ),
    ('[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Rome"}}]', "", [WEATHER]),
    ('[{"name": "get_weather", "arguments": {"city": "Rome"}}]', "", [WEATHER]),
    ('[TOOL_CALLS]get_weather[ARGS]{"city": "Rome"}', "", [WEATHER]),
    ('{"id": 7, "name": "get_weather", "parameters": {"city": "Rome"}, "type": "function"}', "", [WEATHER]),
    ('{"parameters": {"city": "Rome"}, "name": "get_weather"}', "", [WEATHER]),
    ('{"name": "add"}', "", [("add", {})]),
    ('<tool_call>{"name": "add", "arguments": {}}</tool_call>\nThat is all.', "\nThat is all.", [("add", {})]),
    ('<tool_call><tool_call>{"name": "add", "arguments": {}}', "<tool_call>", [("add", {})]),
    ('<tool_call>{"name": "add", "arguments": {}</tool_call>', "", [("add", {})]),
    ('{"name": "add", "parameters": {}}; {"name": "sub"}', ' {"name": "sub"}', [("add", {})]),
    ('[{"name": "add", "arguments": {}}, {"name": "sub"}]', ', {"name": "sub"}]', [("add", {})]),
    ('<tool_call>{"name": "get_weather", "arguments": {"city": "Ro\nme"}}', "", [("get_weather", {"city": "Ro\nme"})]),
    ('get_weather{"city": "Rome"}add{"a": 1, "b": [2, "}{"]}', "", [WEATHER, ADD]),
]

NO_CALLS = [
    "Hello, how are you?",
    "",
    "add one egg",
    "get_weather",
    '{"answer": 42}',
    "{not JSON",
    "[1, 2, 3]",
    '{"name": "unknown", "arguments": {}}',
    '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "add", "arguments": {',
    '<tool_call>{"name": "add", "arguments": {"a"',
    "add{1, 2}",
    'add{"a", "b"}',
    '{"name": "add", "arguments": "{\\"a\\"',
    '{"arguments": {"a": tru',
    '{"arguments": {}, "name": "sub"}',
    '{"answer": [1, {"name": "add"}]} and more',
    "  ",
    '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
    "A <tool in a [TOOL box <|pyth",
    '{"name": ["add"], "arguments": {}}',
]


def found_in(text: str) -> tuple[str, list[tuple[str, object]]]:
    parsed = parse(text, NAMES)
    return parsed.content, [(call.name, json.loads(call.arguments)) for call in parsed.calls]


def pieces_of(reader: AnswerReader, chunks: Sequence[str]) -> list[Piece]:
    return [piece for chunk in chunks for piece in reader.push(chunk)] + reader.finish(())


def without_ids(parsed: Parsed) -> list[object]:
    return [part if isinstance(part, str) else part[1:] for part in parsed.parts]


def check_calls_are_whole(pieces: Sequence[Piece]) -> None:
    """Prove that fragments follow the beginning of their call, and make its arguments together."""
    begun, fragments, number = None, [], 0
    for piece in pieces:
        assert isinstance(piece, Text) == (begun is None and not isinstance(piece, CallBegun)), pieces
        if isinstance(piece, CallBegun):
            assert piece.number == number
            begun, fragments = piece, list[str]()
        elif isinstance(piece, Arguments):
            assert piece.number == number
            fragments.append(piece.text)
        elif isinstance(piece, Call):
            assert begun is not None
            assert piece == Call(begun.id, begun.name, "".join(fragments))
            begun, number = None, number + 1
    assert begun is None


@pytest.mark.parametrize(("text", "content", "calls"), CASES)
def test_calls_are_found_in_the_common_forms(text: str, content: str, calls: list[tuple[str, object]]) -> None:
    assert found_in(text) == (content, calls)


@pytest.mark.parametrize("text", NO_CALLS)
def test_what_is_no_call_stays_text(text: str) -> None:
    assert found_in(text) == (text, [])


TEXTS = [*(case[0] for case in CASES), *NO_CALLS]


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_gives_the_same_in_whatever_pieces_it_comes(text: str) -> None:
    expected = without_ids(parse(text, NAMES))
    for cuts in [*([text[:at], text[at:]] for at in range(len(text) + 1)), list(text)]:
        pieces = pieces_of(AnswerReader(NAMES), cuts)
        check_calls_are_whole(pieces)
        assert without_ids(Parsed.of(pieces)) == expected


@pytest.mark.parametrize("text", TEXTS)
def test_an_answer_that_is_cut_off_anywhere_is_the_same_streamed_and_whole(text: str) -> None:
    for end in range(len(text)):
        pieces = pieces_of(AnswerReader(NAMES), list(text[:end]))
        check_calls_are_whole(pieces)
        assert without_ids(Parsed.of(pieces)) == without_ids(parse(text[:end], NAMES))


MARKS = [
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "<|python_tag|>",
    "add",
    "get_weather",
    "Hi",
    " ",
    "\n",
]
JSON_MARKS = [
    '{"name": "add", ',
    '"arguments": ',
    '"parameters": ',
    '"a": ',
    '"x',
    '"',
    "\\",
    "\\u00",
    "1",
    "-",
    "true",
]
FRAGMENTS = st.sampled_from([*MARKS, *JSON_MARKS, "{}", "}", "{", "[", "]", ",", ":", ";", *TEXTS])


@given(st.lists(FRAGMENTS, max_size=8), st.randoms(use_true_random=False))
def test_any_answer_is_the_same_streamed_and_whole(parts: list[str], random: object) -> None:
    text = "".join(parts)
    chunks, rest = list[str](), text
    while rest:
        size = random.randint(1, 6)  # type: ignore[attr-defined]
        chunks.append(rest[:size])
        rest = rest[size:]
    pieces = pieces_of(AnswerReader(NAMES), chunks)
    check_calls_are_whole(pieces)
    parsed = Parsed.of(pieces)
    assert without_ids(parsed) == without_ids(parse(text, NAMES))
    if not parsed.calls:
        assert parsed.content == text
    first_only = Parsed.of(pieces_of(AnswerReader(NAMES, parallel=False), chunks))
    assert first_only.content == parsed.content
    assert [call[1:] for call in first_only.calls] == [call[1:] for call in parsed.calls[:1]]


def test_arguments_are_given_out_as_they_are_written() -> None:
    reader = AnswerReader(NAMES)
    assert reader.push('So: <tool_call>{"name": "add"') == [Text("So:")]
    assert reader.push(', "arguments": {"a') == [], "not a call for sure"
    begun, arguments = reader.push('": [1')
    assert (begun.number, begun.name, arguments) == (0, "add", Arguments(0, '{"a": ['))  # type: ignore[union-attr]
    assert reader.push(', "tw') == [Arguments(0, '1, "tw')]
    assert reader.push("o \\") == [Arguments(0, "o ")], "an escape comes whole"
    assert reader.push('n"]') == [Arguments(0, '\\n"]')]
    end, call = reader.push("}")
    assert end == Arguments(0, "}")
    assert call[1:] == ("add", '{"a": [1, "two \\n"]}')
    assert reader.push("} </tool_call>") == []
    assert reader.finish(()) == []


@pytest.mark.parametrize(
    ("text", "arguments", "content"),
    [
        ('<tool_call>{"name": "add", "arguments": {"a": 1, "b": [2, "x', '{"a": 1, "b": [2, "x', ""),
        ('<tool_call>{"name": "add", "arguments": {"a": 1, "b": tru', '{"a": 1, "b": ', ""),
        ('<tool_call>{"name": "add", "arguments": {"a": 1</tool_call> Hm.', '{"a": 1', " Hm."),
        ('<tool_call>{"name": "add", "arguments": {"a": 1, oops}}', '{"a": 1, ', "oops}}"),
        ('add{"a": 1, "b": "\\x"}', '{"a": 1, "b": "', '\\x"}'),
    ],
)
def test_arguments_end_where_they_stop_being_json(text: str, arguments: str, content: str) -> None:
    parsed = parse(text, NAMES)
    assert [call.arguments for call in parsed.calls] == [arguments]
    assert parsed.content == content
    assert whole_members(arguments) == {"a": 1}


def test_deep_arguments_are_read() -> None:
    text = 'add{"a": ' + "[" * 100_000
    assert parse(text, NAMES).calls[0].arguments == text[3:]
    assert parse('{"arguments": "' + "[" * 100_000 + '", "name": "add"}', NAMES).calls == []


def test_text_is_given_out_as_it_comes() -> None:
    reader = AnswerReader(NAMES)
    assert [reader.push(piece) for piece in ("Hello", " you", " <", "b> and", " <tool_call>", '{"name"')] == [
        [Text("Hello")],
        [Text(" you")],
        [],
        [Text(" <b> and")],
        [],
        [],
    ]
    assert AnswerReader(()).push('{"a"') == [Text('{"a"')], "without tools there is nothing to wait for"


def test_ids_tell_calls_apart() -> None:
    calls = parse(CASES[1][0], NAMES).calls
    assert len({call.id for call in calls}) == 2


class OwnTemplate:
    """A tokenizer that parses answers itself."""

    response_template = "…"

    def __init__(self, message: object) -> None:
        self._message = message

    def parse_response(self, ids: list[int]) -> object:
        if isinstance(self._message, Exception):
            raise self._message
        return self._message


def test_a_tokenizers_own_template_goes_first() -> None:
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    found = parse_own(OwnTemplate({"content": "So:", "tool_calls": calls}), [1], NAMES)
    assert found is not None
    assert found.content == "So:"
    assert found.calls[0][1:] == ("add", '{"a": 1}')
    for arguments, taken in (('{"a": 1}', '{"a": 1}'), ("", "{}"), ({"a": "ü"}, '{"a": "ü"}')):
        found = parse_own(OwnTemplate({"tool_calls": [{"name": "add", "arguments": arguments}]}), [1], NAMES)
        assert found is not None
        assert [call.arguments for call in found.calls] == [taken]
    for message in (
        {"content": "no calls"},
        ValueError("does not fit"),
        "text",
        {"tool_calls": [{"name": "other"}]},
        {"tool_calls": [{"name": "add", "arguments": [1]}]},
        {"tool_calls": [{"name": "add", "arguments": "{"}]},
        {"tool_calls": [{"function": "add"}]},
    ):
        assert parse_own(OwnTemplate(message), [1], NAMES) is None
    assert parse_own(object(), [1], NAMES) is None


def test_what_the_tokenizer_parses_itself_comes_at_the_end() -> None:
    calls = [{"name": "add", "arguments": {"a": n}} for n in (1, 2)]
    tokenizer = OwnTemplate({"content": "So:", "tool_calls": calls})
    for parallel in (True, False):
        reader = reader_of(tokenizer, NAMES, parallel=parallel)
        assert reader.push("So: <function=add>") == []
        pieces = reader.finish([1, 2])
        check_calls_are_whole(pieces)
        assert Parsed.of(pieces).content == "So:"
        assert [call.arguments for call in Parsed.of(pieces).calls] == ['{"a": 1}', '{"a": 2}'][: 1 + parallel]
    reader = reader_of(OwnTemplate({"content": "no calls"}), NAMES)
    assert reader.push('add{"a": 1}') == []
    assert [call.name for call in Parsed.of(reader.finish([1])).calls] == ["add"]
    assert reader_of(tokenizer, ()).push("text") == [Text("text")], "without tools there is nothing to wait for"
