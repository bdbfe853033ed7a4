"""Anthropic's interface, spoken to by Anthropic's own client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from http_server import Running, new_demo_engine, running
from radixkv.serving.anthropic_body import MessagesBody
from radixkv.serving.anthropic_messages import BlockStream
from radixkv.serving.tool_calls import Arguments, Call, CallBegun, Text

SYSTEM = "You are a citizen of Rome, and you know everybody who lives there."
PROMPT = "But, soft! what light through yonder window breaks?"
ASK: Any = {"model": "demo", "max_tokens": 12, "system": SYSTEM, "messages": [{"role": "user", "content": PROMPT}]}
GREEDY: Any = {**ASK, "extra_body": {"temperature": 0.0}}  # the client has no word for it
SCHEMA: Any = {
    "type": "object",
    "properties": {"name": {"enum": ["Romeo", "Juliet"]}},
    "required": ["name"],
    "additionalProperties": False,
}
TOOLS: Any = [{"name": "find_person", "description": "Find one.", "input_schema": SCHEMA}]


@pytest.fixture(scope="module")
def running_server() -> Iterator[Running]:
    engine = new_demo_engine(kv_cache_tokens=1024)
    with running(engine) as server:
        yield server


def cached_tokens(server: Running, messages: object) -> int:
    found = server.http().post("/v1/cache/explain", json={"messages": messages}).json()
    return int(found["cached_tokens"])


def test_a_message_is_what_a_chat_completion_is(server: Running) -> None:
    message = server.anthropic().messages.create(**GREEDY)
    messages: Any = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": PROMPT}]
    chat = server.openai().chat.completions.create(model="demo", messages=messages, temperature=0, max_tokens=12)
    (block,) = message.content
    assert (block.type, block.text) == ("text", chat.choices[0].message.content)
    assert (message.role, message.stop_reason, message.stop_sequence) == ("assistant", "max_tokens", None)
    assert chat.usage.prompt_tokens_details.cached_tokens == chat.usage.prompt_tokens - 1, "it is the same prompt"


def test_input_tokens_add_up(server: Running) -> None:
    client = server.anthropic()
    num_tokens = client.messages.count_tokens(**{k: v for k, v in ASK.items() if k != "max_tokens"}).input_tokens
    first, again = (client.messages.create(**GREEDY).usage for _ in range(2))
    assert (first.cache_read_input_tokens, first.cache_creation_input_tokens, first.input_tokens) == (0, num_tokens, 0)
    assert (again.cache_read_input_tokens, again.cache_creation_input_tokens) == (num_tokens - 1, 0)
    assert again.input_tokens == 1
    assert first.output_tokens == 12


def test_a_stream_adds_up_to_the_message(server: Running) -> None:
    client = server.anthropic()
    whole = client.messages.create(**GREEDY)
    with client.messages.stream(**GREEDY) as stream:
        kinds = [event.type for event in stream]
        message = stream.get_final_message()
    assert message.content[0].text == whole.content[0].text
    assert message.stop_reason == whole.stop_reason
    assert (message.usage.cache_read_input_tokens, message.usage.input_tokens) == (
        whole.usage.cache_creation_input_tokens - 1,
        1,
    )
    assert [kind for kind in kinds if "_" in kind and "delta" not in kind] == [
        "message_start",
        "content_block_start",
        "content_block_stop",
        "message_stop",
    ]


def test_a_stream_begins_with_what_was_cached(server: Running) -> None:
    client = server.anthropic()
    num_tokens = client.messages.count_tokens(**{k: v for k, v in ASK.items() if k != "max_tokens"}).input_tokens
    for cached_tokens in (0, num_tokens - 1):
        told = list(client.messages.create(**GREEDY, stream=True))
        start = next(event.message.usage for event in told if event.type == "message_start")
        end = next(event.usage for event in told if event.type == "message_delta")
        assert start.cache_read_input_tokens == end.cache_read_input_tokens == cached_tokens
        for usage in (start, end):
            parts = usage.input_tokens, usage.cache_read_input_tokens, usage.cache_creation_input_tokens
            assert sum(parts) == num_tokens
            assert min(parts) >= 0
        assert start.cache_creation_input_tokens <= end.cache_creation_input_tokens
        assert end.cache_creation_input_tokens == (0 if cached_tokens else num_tokens)


def test_a_stream_begins_with_why_the_cache_was_missed(server: Running) -> None:
    client = server.anthropic()

    def diagnostics(**fields: Any) -> Any:
        told = client.messages.create(**{**GREEDY, **fields}, stream=True)
        message = next(event.message for event in told if event.type == "message_start")
        return message.id, message.diagnostics

    first, nothing = diagnostics(diagnostics={"previous_message_id": None})
    assert nothing is None
    asked: Any = {"previous_message_id": first}
    assert diagnostics(diagnostics=asked)[1] is None
    changed = diagnostics(diagnostics=asked, system="You are a stranger in Rome.")[1]
    assert changed.cache_miss_reason.type == "system_changed"


def test_stop_sequences_are_told(server: Running) -> None:
    client = server.anthropic()
    text = client.messages.create(**GREEDY).content[0].text
    message = client.messages.create(**GREEDY, stop_sequences=[text[3:6]])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", text[3:6])
    assert message.content[0].text == text[: text.index(text[3:6])]


def test_an_answer_may_be_begun(server: Running) -> None:
    client = server.anthropic()
    text = client.messages.create(**GREEDY).content[0].text
    begun = {**GREEDY, "messages": [*GREEDY["messages"], {"role": "assistant", "content": text[:4].rstrip()}]}
    rest = client.messages.create(**begun).content[0].text
    assert (text[:4].rstrip() + rest).startswith(text[:6])


def test_a_tool_that_must_be_called_is_called(server: Running) -> None:
    client = server.anthropic()
    asked: Any = {**GREEDY, "max_tokens": 60, "tools": TOOLS, "tool_choice": {"type": "tool", "name": "find_person"}}
    message = client.messages.create(**asked)
    (block,) = message.content
    assert (block.type, block.name, message.stop_reason) == ("tool_use", "find_person", "tool_use")
    assert block.input["name"] in ("Romeo", "Juliet")
    with client.messages.stream(**asked) as stream:
        fragments = [event.partial_json for event in stream if event.type == "input_json"]
        streamed = stream.get_final_message()
    assert (streamed.content[0].name, streamed.content[0].input) == (block.name, block.input)
    assert len(fragments) > 2, "they come as they are written"
    assert json.loads("".join(fragments)) == block.input
    assert streamed.stop_reason == "tool_use"


def test_a_call_that_is_cut_off_has_the_members_that_are_whole(server: Running) -> None:
    client = server.anthropic()
    choice: Any = {"type": "tool", "name": "find_person"}
    asked: Any = {**GREEDY, "tools": TOOLS, "tool_choice": choice}
    seen = []
    for max_tokens in range(2, 60, 7):
        message = client.messages.create(**{**asked, "max_tokens": max_tokens})
        seen.append((message.content[0].type, getattr(message.content[0], "input", None)))
        if message.stop_reason == "tool_use":
            break
        assert message.stop_reason == "max_tokens"
        if max_tokens % 2:
            continue
        with client.messages.stream(**{**asked, "max_tokens": max_tokens}) as stream:
            assert stream.get_final_message().content[0].type == message.content[0].type
    kinds = [kind for kind, _ in seen]
    assert kinds == sorted(kinds), "text until it is a call for sure"
    assert ("tool_use", {}) in seen
    assert seen[-1][1] in ({"name": "Romeo"}, {"name": "Juliet"})


def test_blocks_come_in_the_order_of_the_answer() -> None:
    call = Call("call_1", "wait", "{}")
    pieces = [Text("So: "), Text("wait."), CallBegun(0, "call_1", "wait"), Arguments(0, "{}"), call, Text("Done")]
    blocks = BlockStream()
    events = [event for piece in pieces for event in blocks.events(piece)] + list(blocks.end())
    told = [json.loads(event.partition(b"data: ")[2]) for event in events]
    assert [(event["type"].removeprefix("content_block_"), event["index"]) for event in told] == [
        ("start", 0),
        ("delta", 0),
        ("delta", 0),
        ("stop", 0),
        ("start", 1),
        ("delta", 1),
        ("stop", 1),
        ("start", 2),
        ("delta", 2),
        ("stop", 2),
    ]
    assert told[4]["content_block"] == {"type": "tool_use", "id": "toolu_1", "name": "wait", "input": {}}
    assert told[5]["delta"] == {"type": "input_json_delta", "partial_json": "{}"}


def test_an_answer_without_anything_is_an_empty_text() -> None:
    told = [json.loads(event.partition(b"data: ")[2]) for event in BlockStream().end()]
    assert [event["type"] for event in told] == ["content_block_start", "content_block_stop"]
    assert told[0]["content_block"] == {"type": "text", "text": ""}


def test_an_answer_fits_its_schema(server: Running) -> None:
    message = server.anthropic().messages.create(
        **{**ASK, "max_tokens": 40}, output_config={"format": {"type": "json_schema", "schema": SCHEMA}}
    )
    assert '"name"' in message.content[0].text
    assert message.stop_reason == "end_turn"


def test_blocks_become_what_chat_templates_take() -> None:
    body = MessagesBody.model_validate(
        {
            "max_tokens": 1,
            "system": [
                {"type": "text", "text": "A"},
                {"type": "text", "text": "B", "cache_control": {"type": "ephemeral"}},
            ],
            "tools": [{**TOOLS[0], "cache_control": {"type": "ephemeral", "ttl": "1h"}}],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Who?"}]},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "…", "signature": "x"},
                        {"type": "text", "text": "Let me see."},
                        {"type": "tool_use", "id": "t1", "name": "find_person", "input": {"name": "Romeo"}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "He."}]},
                        {"type": "text", "text": "And?", "cache_control": {"type": "ephemeral"}},
                    ],
                },
            ],
        }
    )
    chat = body.chat()
    call = {"id": "t1", "type": "function", "function": {"name": "find_person", "arguments": {"name": "Romeo"}}}
    assert chat.messages == [
        {"role": "system", "content": "A\nB"},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call]},
        {"role": "tool", "content": "He.", "tool_call_id": "t1"},
        {"role": "user", "content": "And?"},
    ]
    assert [tuple(point) for point in chat.breakpoints] == [(None, 0, 3600.0), (0, 3, 300.0), (4, 4, 300.0)]
    assert not chat.continues


def message_body(**fields: Any) -> MessagesBody:
    return MessagesBody.model_validate({"max_tokens": 1, "messages": [{"role": "user", "content": "Who?"}], **fields})


def test_the_choice_of_tools_says_which_may_and_which_must_be_called() -> None:
    tools: Any = [*TOOLS, {"name": "wait"}]
    schemas = {"find_person": SCHEMA, "wait": {}}
    for choice, expected in (
        (None, (schemas, (), True)),
        ({"type": "auto"}, (schemas, (), True)),
        ({"type": "auto", "disable_parallel_tool_use": True}, (schemas, (), False)),
        ({"type": "any"}, (schemas, ("find_person", "wait"), True)),
        ({"type": "tool", "name": "wait"}, (schemas, ("wait",), True)),
        ({"type": "none"}, ({}, (), True)),
    ):
        body = message_body(tools=tools, tool_choice=choice)
        assert tuple(body.tool_use()) == expected, choice
        offered = [tool["function"]["name"] for tool in body.chat().tools]
        assert offered == ([] if choice == {"type": "none"} else ["find_person", "wait"]), choice


def test_a_control_of_the_whole_request_keeps_it_to_its_end() -> None:
    turns: Any = [
        {"role": "user", "content": "Who?"},
        {"role": "system", "content": [{"type": "text", "text": "Now be brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "he?"}]},
    ]
    chat = message_body(system="Be kind.", messages=turns, cache_control={"type": "ephemeral", "ttl": "1h"}).chat()
    assert [message["role"] for message in chat.messages] == ["system", "user", "system", "user"]
    assert chat.messages[2]["content"] == "Now be brief."
    last = chat.messages[3]["content"]
    assert [tuple(point) for point in chat.breakpoints] == [(3, len(last), 3600.0)]


def test_cache_control_keeps_exactly_the_prefix_before_it(server: Running) -> None:
    client = server.anthropic()
    blocks: Any = [{"type": "text", "text": SYSTEM, "cache_control": {"type": "ephemeral", "ttl": "1h"}}]
    usage = client.messages.create(**{**GREEDY, "system": blocks}).usage
    start = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "?"}]
    prefix = cached_tokens(server, start)
    marks = 2  # of the template, between the system text and the user's
    assert usage.cache_creation.ephemeral_1h_input_tokens == prefix - marks
    assert usage.cache_creation.ephemeral_5m_input_tokens == 0
    for number in range(6):
        client.messages.create(**{**GREEDY, "system": f"{number} other words " * 60})
    messages = [*start[:1], {"role": "user", "content": PROMPT}]
    assert prefix - marks <= cached_tokens(server, messages) <= prefix + 16


def test_diagnostics_say_why_a_prompt_missed(server: Running) -> None:
    client = server.anthropic()
    first = client.messages.create(**GREEDY, diagnostics={"previous_message_id": None})
    assert first.diagnostics is None

    def reason(before: str, **fields: Any) -> Any:
        message = client.messages.create(**{**GREEDY, **fields}, diagnostics={"previous_message_id": before})
        return message.diagnostics and message.diagnostics.cache_miss_reason

    said = {"role": "assistant", "content": first.content[0].text}
    assert reason(first.id, messages=[*ASK["messages"], said, {"role": "user", "content": "And?"}]) is None
    assert reason(first.id, system="You are a stranger in Rome.").type == "system_changed"
    assert reason(first.id, tools=TOOLS, system="You are a stranger in Rome.").type == "tools_changed"
    changed = reason(first.id, messages=[{"role": "user", "content": "Who?"}])
    assert changed.type == "messages_changed"
    assert changed.cache_missed_input_tokens > 0
    assert reason("msg_other").type == "previous_message_not_found"
    asyncio.run(server.engine.reset_cache())
    assert reason(first.id).type == "unavailable"


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": -1},
        {"extra_body": {"temperature": -1}},
        {"messages": []},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        {"messages": [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]},
        {"tools": TOOLS, "tool_choice": {"type": "tool", "name": "other"}},
        {"tool_choice": {"type": "any"}},
        {"system": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}] * 5},
    ],
)
def test_what_is_wrong_is_told_in_anthropics_shape(server: Running, fields: Any) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        server.anthropic().messages.create(**{**ASK, **fields})
    body: Any = caught.value.body
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["message"]


def test_other_errors_have_anthropics_shape_too(server: Running) -> None:
    with pytest.raises(anthropic.NotFoundError) as caught:
        server.anthropic().messages.create(**{**ASK, "model": "other"})
    body: Any = caught.value.body
    assert body["error"]["type"] == "not_found_error"
    with running(new_demo_engine(), api_key="secret") as closed:
        with pytest.raises(anthropic.AuthenticationError):
            closed.anthropic("guess").messages.create(**ASK)
        assert closed.anthropic("secret").messages.create(**ASK).content


def test_the_async_client_streams_too(server: Running) -> None:
    async def ask() -> str:
        async with server.async_anthropic() as client, client.messages.stream(**GREEDY) as stream:
            return "".join([text async for text in stream.text_stream])

    assert asyncio.run(ask()) == server.anthropic().messages.create(**GREEDY).content[0].text
