"""OpenAI's responses: conversations that the server remembers, within bounds."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest

from http_server import Running
from radixkv.serving.history import BoundedStore
from radixkv.serving.response_items import ItemStream, output_items
from radixkv.serving.responses_body import ResponsesBody
from radixkv.serving.tool_calls import Arguments, Call, CallBegun, Parsed, Text

ASK: Any = {"model": "demo", "temperature": 0.0, "max_output_tokens": 4}
SCHEMA: Any = {
    "type": "object",
    "properties": {"name": {"enum": ["Romeo", "Juliet"]}},
    "required": ["name"],
    "additionalProperties": False,
}
TOOLS: Any = [{"type": "function", "name": "find_person", "description": "Find one.", "parameters": SCHEMA}]


def test_a_response_is_what_a_chat_completion_is(server: Running) -> None:
    client = server.openai()
    response = client.responses.create(input="Who are you?", instructions="Speak.", **ASK)
    messages: Any = [{"role": "system", "content": "Speak."}, {"role": "user", "content": "Who are you?"}]
    chat = client.chat.completions.create(model="demo", messages=messages, temperature=0, max_tokens=4)
    assert response.output_text == chat.choices[0].message.content
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    usage = response.usage
    assert (usage.input_tokens, usage.output_tokens) == (chat.usage.prompt_tokens, 4)
    assert (usage.input_tokens_details.cached_tokens, usage.input_tokens_details.cache_write_tokens) == (
        0,
        usage.input_tokens,
    )


def test_a_stream_adds_up_to_the_response(server: Running) -> None:
    client = server.openai()
    asked = {**ASK, "max_output_tokens": 60, "input": "Who are you?"}  # it stops by itself
    whole = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == whole.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events if event.type != "response.output_text.delta"]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    cut_off = list(client.responses.create(input="Who are you?", stream=True, **ASK))[-1]
    assert (cut_off.type, cut_off.response.usage.output_tokens) == ("response.incomplete", 4)


def test_a_conversation_goes_on_from_a_stored_response(server: Running) -> None:
    client = server.openai()
    first = client.responses.create(input="Who are you?", **ASK)
    second = client.responses.create(input="And who is he?", previous_response_id=first.id, **ASK)
    by_hand = client.responses.create(
        input=[
            {"role": "user", "content": "Who are you?"},
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": "And who is he?"},
        ],
        **ASK,
    )
    assert second.output_text == by_hand.output_text
    assert second.usage.input_tokens == by_hand.usage.input_tokens
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens - 1
    assert client.responses.retrieve(second.id).output_text == second.output_text
    client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(second.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.delete("resp_other")
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.create(input="?", previous_response_id=second.id, **ASK)
    assert caught.value.param == "previous_response_id"
    unstored = client.responses.create(input="Who are you?", store=False, **ASK)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unstored.id)


def test_diagnostics_say_why_a_prompt_missed(server: Running) -> None:
    client = server.openai()

    def diagnosis(before: str, **fields: Any) -> dict[str, Any]:
        options = {"comparison_response_id": before}
        answer = client.responses.create(**ASK, **fields, prompt_cache_options=options)
        found: dict[str, Any] = answer.prompt_cache_diagnostics.model_dump(exclude_none=True)
        return found

    first = client.responses.create(input="Who are you, and what do you want?", instructions="Speak.", **ASK)
    assert diagnosis(first.id, input="And he?", previous_response_id=first.id, instructions="Speak.") == {
        "type": "cache_hit"
    }
    changed = diagnosis(first.id, input="Who are they?", instructions="Speak.")
    assert (changed["type"], changed["reason"]) == ("cache_miss", "input_changed")
    assert changed["comparison_reusable_tokens"] + changed["cache_missed_tokens"] == first.usage.input_tokens
    assert diagnosis("resp_other", input="?") == {"type": "comparison_response_not_found"}
    asyncio.run(server.engine.reset_cache())
    again = diagnosis(first.id, input="Who are you, and what do you want?", instructions="Speak.")
    assert again == {"type": "unavailable"}


def test_tools_are_called_and_answered(server: Running) -> None:
    client = server.openai()
    asked: Any = {
        "model": "demo",
        "temperature": 0.0,
        "max_output_tokens": 60,
        "tools": TOOLS,
        "tool_choice": "required",
    }
    response = client.responses.create(input="Who?", **asked)
    (call,) = response.output
    assert (call.type, call.name, response.status) == ("function_call", "find_person", "completed")
    assert json.loads(call.arguments)["name"] in ("Romeo", "Juliet")
    with client.responses.stream(input="Who?", **asked) as stream:
        fragments = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
        (streamed,) = stream.get_final_response().output
    assert (streamed.name, streamed.arguments) == (call.name, call.arguments)
    assert len(fragments) > 2, "they come as they are written"
    assert "".join(fragments) == call.arguments


def test_items_come_in_the_order_of_the_answer() -> None:
    parts = ["So: wait.", Call("call_1", "wait", "{}"), "Done"]
    first, call, last = (
        [Text("So: "), Text("wait.")],
        [CallBegun(0, "call_1", "wait"), Arguments(0, "{}")],
        [Text("Done")],
    )
    items = ItemStream("msg_1", lambda kind, **fields: json.dumps({"type": kind, **fields}).encode())
    told = [json.loads(event) for piece in [*first, *call, parts[1], *last] for event in items.events(piece)]
    told += [json.loads(event) for event in items.end()]
    assert items.parts == parts
    done = [(event["output_index"], event["item"]) for event in told if event["type"] == "response.output_item.done"]
    assert done == list(enumerate(output_items("msg_1", Parsed(parts))))
    assert [item["id"] for _, item in done] == ["msg_1", "fc_1", "msg_1_2"]
    added = [event["output_index"] for event in told if event["type"] == "response.output_item.added"]
    assert added == [0, 1, 2]
    assert all(event["item_id"] == done[event["output_index"]][1]["id"] for event in told if "item_id" in event)


def test_an_answer_without_anything_is_an_empty_message() -> None:
    items = ItemStream("msg_1", lambda kind, **fields: json.dumps({"type": kind, **fields}).encode())
    told = [json.loads(event) for event in items.end()]
    assert [event["item"]["type"] for event in told if event["type"] == "response.output_item.done"] == ["message"]
    assert [event["text"] for event in told if event["type"] == "response.output_text.done"] == [""]


def test_an_answer_fits_its_schema(server: Running) -> None:
    text: Any = {"format": {"type": "json_schema", "name": "person", "schema": SCHEMA}}
    response = server.openai().responses.create(model="demo", input="Who?", text=text, max_output_tokens=40)
    assert json.loads(response.output_text)["name"] in ("Romeo", "Juliet")


def test_halves_of_characters_make_no_server_fail(server: Running) -> None:
    body = '{"model": "demo", "input": "?", "max_output_tokens": 1, "metadata": {"a": "\\ud800"}, "user": "\\udfff"}'
    answer = server.http().post("/v1/responses", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["metadata"]) == (200, {"a": "?"})
    for field in ("model", "input", "instructions", "cache_salt", "tool_choice", "previous_response_id", "\\ud801"):
        body = f'{{"input": "?", "max_output_tokens": 1, "{field}": "\\ud800"}}'
        answer = server.http().post("/v1/responses", content=body, headers={"content-type": "application/json"})
        assert answer.status_code in (200, 400, 404), field


def test_items_become_messages() -> None:
    body = ResponsesBody.model_validate(
        {
            "instructions": "Be kind.",
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "Who?"}]},
                {"type": "reasoning", "id": "r"},
                {"type": "function_call", "call_id": "c1", "name": "find_person", "arguments": '{"name": "Romeo"}'},
                {"type": "function_call", "call_id": "c2", "name": "wait", "arguments": ""},
                {"type": "function_call_output", "call_id": "c1", "output": "He."},
            ],
        }
    )
    messages = body.as_chat(body.new_messages()).chat().messages
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "tool"]
    assert [call["function"]["arguments"] for call in messages[2]["tool_calls"]] == [{"name": "Romeo"}, {}]
    assert messages[3] == {"role": "tool", "content": "He.", "tool_call_id": "c1"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0]"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input"),
        ({"max_output_tokens": -1}, "max_output_tokens"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
    ],
)
def test_what_is_wrong_is_named(server: Running, fields: Any, param: str) -> None:
    answer = server.http().post("/v1/responses", json={"model": "demo", "input": "?", **fields})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_the_store_is_bounded_in_number_bytes_and_age() -> None:
    now = 0.0
    store: BoundedStore[int] = BoundedStore(max_entries=3, max_bytes=100, max_age_s=10, clock=lambda: now)
    for number in range(5):
        store.put(str(number), number, 10)
    assert [store.get(str(number)) for number in range(5)] == [None, None, 2, 3, 4]
    store.put("large", 9, 90)
    assert (store.get("3"), store.get("4"), store.get("large"), store.num_bytes) == (None, 4, 9, 100)
    store.put("too large", 9, 101)
    assert (len(store), store.num_bytes) == (0, 0)
    store.put("old", 1, 10)
    now = 11.0
    assert store.get("old") is None
    assert (len(store), store.num_bytes) == (0, 0)
