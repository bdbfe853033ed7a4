"""Answers of a given form: log probabilities, schemas, grammars and tools."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import openai
import pytest

from http_server import SMALL, Running, running
from radixkv import Engine, SamplingParams

PROMPT = "ROMEO:\nBut, soft! what light through yonder window breaks?"
MESSAGES: Any = [{"role": "user", "content": PROMPT}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Romeo", "Juliet"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
TOOLS: Any = [
    {"type": "function", "function": {"name": "find_person", "description": "Find one.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "wait"}},
]


def test_logprobs_of_a_chat_are_the_engines(server: Running) -> None:
    client = server.openai()
    settings: Any = {"model": "demo", "messages": MESSAGES, "temperature": 0, "max_tokens": 5, "logprobs": True}
    choice = client.chat.completions.create(**settings, top_logprobs=3).choices[0]
    content = choice.logprobs.content
    assert "".join(entry.token for entry in content) == choice.message.content
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob, "greedy takes the likeliest"
        assert bytes(entry.bytes).decode() == entry.token
        assert math.fsum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1 + 1e-6
    chunks = client.chat.completions.create(**settings, top_logprobs=3, stream=True)
    streamed = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert [entry.token for entry in streamed] == [entry.token for entry in content]
    assert [entry.logprob for entry in streamed] == pytest.approx([entry.logprob for entry in content], abs=1e-4)
    assert client.chat.completions.create(**settings).choices[0].logprobs.content[0].top_logprobs == []


def test_echo_with_logprobs_tells_those_of_the_prompt(server: Running) -> None:
    engine = Engine.from_pretrained("demo", **SMALL)
    (expected,) = engine.generate(PROMPT, SamplingParams(max_tokens=3, logprobs=2, prompt_logprobs=2))
    settings: Any = {"model": "demo", "prompt": PROMPT, "temperature": 0, "max_tokens": 3, "logprobs": 2, "echo": True}
    client = server.openai()
    for _ in range(2):
        found = client.completions.create(**settings).choices[0].logprobs
        assert found.token_logprobs[0] is None
        assert expected.prompt_logprobs is not None
        assert expected.logprobs is not None
        whole = [entry.logprob for entry in [*expected.prompt_logprobs, *expected.logprobs] if entry is not None]
        assert found.token_logprobs[1:] == pytest.approx(whole, abs=1e-4)
        assert len(found.tokens) == expected.prompt_tokens + 3
    streamed: dict[str, list[Any]] = {"tokens": [], "text_offset": []}
    for chunk in client.completions.create(**settings, stream=True):
        if chunk.choices[0].logprobs is not None:
            streamed["tokens"] += chunk.choices[0].logprobs.tokens
            streamed["text_offset"] += chunk.choices[0].logprobs.text_offset
    assert streamed == {"tokens": found.tokens, "text_offset": found.text_offset}


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_an_answer_fits_its_schema(server: Running, temperature: float) -> None:
    answer = server.openai().chat.completions.create(
        model="demo", messages=MESSAGES, response_format=FORMAT, temperature=temperature, n=3, max_tokens=60
    )
    for choice in answer.choices:
        person = json.loads(choice.message.content)
        assert set(person) == {"name", "age"}
        assert person["name"] in ("Romeo", "Juliet")
        assert 0 <= person["age"] <= 99
        assert choice.finish_reason == "stop"


def test_a_schema_leaves_prefixes_shared(server: Running) -> None:
    client = server.openai()
    settings: Any = {"model": "demo", "messages": MESSAGES, "max_tokens": 40}
    client.chat.completions.create(**settings)
    usage = client.chat.completions.create(**settings, response_format=FORMAT).usage
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1


def test_a_json_object_is_one(server: Running) -> None:
    answer = server.openai().chat.completions.create(
        model="demo", messages=MESSAGES, response_format={"type": "json_object"}, max_tokens=30, seed=3
    )
    assert re.match(r"\s*\{", answer.choices[0].message.content)


def test_regular_expressions_and_lark_grammars_hold(server: Running) -> None:
    client = server.openai()
    for field, text, pattern in (
        ("regex", r"[A-Z]{3}-[0-9]{4}", r"[A-Z]{3}-[0-9]{4}"),
        ("grammar", 'start: "yes" | "no" ", " /[a-z]{2,5}/', r"yes|no, [a-z]{2,5}"),
    ):
        answer = client.completions.create(model="demo", prompt=PROMPT, max_tokens=40, extra_body={field: text})
        assert re.fullmatch(pattern, answer.choices[0].text)
        assert answer.choices[0].finish_reason == "stop"


def test_compiled_grammars_are_remembered(server: Running) -> None:
    client = server.openai()
    body: Any = {"model": "demo", "prompt": PROMPT, "max_tokens": 4, "extra_body": {"regex": "[a-c]{1,30}"}}
    client.completions.create(**body)
    known = server.service.grammars.num_compiled
    client.completions.create(**body)
    assert server.service.grammars.num_compiled == known


def test_no_more_grammars_are_remembered_than_may_be(monkeypatch: pytest.MonkeyPatch, server: Running) -> None:
    client, grammars = server.openai(), server.service.grammars
    num_before = grammars.num_compiled
    monkeypatch.setattr("radixkv.serving.grammars.MAX_COMPILED", num_before + 1)
    for letter in "xyz":
        body: Any = {"model": "demo", "prompt": PROMPT, "max_tokens": 4, "extra_body": {"regex": f"{letter}{{4}}"}}
        assert set(client.completions.create(**body).choices[0].text) == {letter}
        assert grammars.num_compiled == num_before + 1


def test_a_tool_that_must_be_called_is_called(server: Running) -> None:
    client = server.openai()
    chosen: Any = {"type": "function", "function": {"name": "find_person"}}
    settings: Any = {"model": "demo", "messages": MESSAGES, "tools": TOOLS, "max_tokens": 80, "temperature": 0}
    choice = client.chat.completions.create(**settings, tool_choice=chosen).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls
    assert call.function.name == "find_person"
    assert set(json.loads(call.function.arguments)) == {"name", "age"}
    chunks = list(client.chat.completions.create(**settings, tool_choice=chosen, stream=True))
    deltas = [delta for chunk in chunks for delta in chunk.choices[0].delta.tool_calls or ()]
    first, *fragments = deltas
    assert (first.index, first.type, first.function.name, first.function.arguments) == (
        0,
        "function",
        "find_person",
        "",
    )
    assert first.id.startswith("call_")
    assert {(delta.index, delta.id, delta.function.name) for delta in fragments} == {(0, None, None)}
    assert len(fragments) > 2, "they come as they are written"
    assert "".join(delta.function.arguments for delta in fragments) == call.function.arguments
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ""
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    required = client.chat.completions.create(**settings, tool_choice="required").choices[0]
    assert required.message.tool_calls[0].function.name in ("find_person", "wait")


ANSWER = """So. <tool_call>
{"name": "wait", "arguments": {"until": ["dawn", {"or": null}]}}
</tool_call><tool_call>{"name": "find_person", "arguments": {"name": "Romeo"}}</tool_call>"""


@pytest.mark.parametrize(
    ("max_tokens", "parallel"),
    [(200, True), *(pytest.param(*case, marks=pytest.mark.stress) for case in ((200, False), (60, True))), (60, False)],
)
def test_calls_of_several_choices_are_streamed_as_they_are_written(
    server: Running, max_tokens: int, parallel: bool
) -> None:
    settings: Any = {"model": "demo", "messages": MESSAGES, "tools": TOOLS, "n": 2, "max_tokens": max_tokens}
    settings["temperature"] = 0  # an answer has the same tokens, so that it is cut off at the same place
    settings |= {"parallel_tool_calls": parallel, "extra_body": {"regex": re.escape(ANSWER)}}
    client = server.openai()
    whole = client.chat.completions.create(**settings).choices
    streamed: list[dict[str, Any]] = [{"content": "", "calls": []}, {"content": "", "calls": []}]
    for chunk in client.chat.completions.create(**settings, stream=True):
        (choice,) = chunk.choices
        message = streamed[choice.index]
        message["content"] += choice.delta.content or ""
        message["reason"] = choice.finish_reason
        for delta in choice.delta.tool_calls or ():
            if delta.id is not None:
                assert delta.index == len(message["calls"])
                message["calls"].append([delta.function.name, delta.function.arguments])
            else:
                message["calls"][delta.index][1] += delta.function.arguments
    for choice, message in zip(whole, streamed, strict=True):
        calls = [[call.function.name, call.function.arguments] for call in choice.message.tool_calls or ()]
        assert message == {"content": choice.message.content, "calls": calls, "reason": choice.finish_reason}
        assert message["content"] == "So."
        if max_tokens == 200:
            expected = [["wait", '{"until": ["dawn", {"or": null}]}'], ["find_person", '{"name": "Romeo"}']]
            assert calls == expected[: 1 + parallel]
            assert choice.finish_reason == "tool_calls"
        else:
            assert '{"until": ["dawn", {"or": null}]}'.startswith(calls[0][1])
            assert choice.finish_reason == "length"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}},
            "response_format",
        ),
        ({"regex": "[a"}, "regex"),
        ({"grammar": "start: nowhere"}, "grammar"),
        ({"regex": "a", "grammar": 'start: "a"'}, "grammar"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 1000}}, "logit_bias"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"n": 1000}, "n"),
    ],
)
def test_forms_that_cannot_be_are_refused(server: Running, fields: Any, param: str) -> None:
    answer = server.http().post("/v1/chat/completions", json={"model": "demo", "messages": MESSAGES, **fields})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_penalties_and_bias_reach_the_engine(server: Running) -> None:
    client = server.openai()
    settings: Any = {"model": "demo", "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
    plain = client.completions.create(**settings).choices[0].text
    token = server.http().post("/tokenize", json={"prompt": plain, "add_special_tokens": False}).json()["tokens"][0]
    assert client.completions.create(**settings, logit_bias={str(token): -100}).choices[0].text != plain
    forced = client.completions.create(**settings, logit_bias={str(token): 100}, logprobs=0).choices[0]
    assert len(set(forced.logprobs.tokens)) == 1
    freed = client.completions.create(**settings, logit_bias={str(token): 3}, frequency_penalty=2.0).choices[0]
    assert freed.text != forced.text


def test_strict_servers_refuse_unknown_fields() -> None:
    with running(strict=True) as server:
        client = server.openai()
        assert client.completions.create(model="demo", prompt=PROMPT, max_tokens=1, user="me").choices
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="demo", prompt=PROMPT, extra_body={"shiny": 1})
        assert (caught.value.param, caught.value.code) == ("shiny", "unknown_field")
