"""Calls of tools in what models write."""

from __future__ import annotations

import json

import pytest

from radixkv.serving.tool_calls import AnswerReader, parse, parse_own

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
    '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
    "A <tool in a [TOOL box <|pyth",
    '{"name": ["add"], "arguments": {}}',
]


def found_in(text: str) -> tuple[str, list[tuple[str, object]]]:
    content, calls = parse(text, NAMES)
    return content, [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize(("text", "content", "calls"), CASES)
def test_calls_are_found_in_the_common_forms(text: str, content: str, calls: list[tuple[str, object]]) -> None:
    assert found_in(text) == (content, calls)


@pytest.mark.parametrize("text", NO_CALLS)
def test_what_is_no_call_stays_text(text: str) -> None:
    assert found_in(text) == (text, [])


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("text", [*(case[0] for case in CASES), *NO_CALLS])
def test_a_stream_gives_the_same_in_whatever_pieces_it_comes(text: str, size: int) -> None:
    reader = AnswerReader(NAMES)
    given = "".join(reader.push(text[at : at + size]) for at in range(0, len(text), size))
    rest, calls = reader.finish()
    content, expected = parse(text, NAMES)
    assert given + rest == content
    assert [call[1:] for call in calls] == [call[1:] for call in expected]


def test_text_is_given_out_as_it_comes() -> None:
    reader = AnswerReader(NAMES)
    assert [reader.push(piece) for piece in ("Hello", " you", " <", "b> and", " <tool_call>", '{"name"')] == [
        "Hello",
        " you",
        "",
        " <b> and",
        "",
        "",
    ]
    assert AnswerReader(()).push('{"a"') == '{"a"', "without tools there is nothing to wait for"


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
    for message in ({"content": "no calls"}, ValueError("does not fit"), "text", {"tool_calls": [{"name": "other"}]}):
        assert parse_own(OwnTemplate(message), [1], NAMES) is None
    assert parse_own(object(), [1], NAMES) is None
