"""OpenAI's interface, spoken to by OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
import logging

import openai
import pytest

from http_server import SMALL, Running
from radixkv import Engine, SamplingParams

PROMPT = "ROMEO:\nBut, soft! what light through yonder window breaks?"
MESSAGES = [{"role": "system", "content": "You are a citizen of Rome."}, {"role": "user", "content": "Who are you?"}]
GREEDY = {"model": "demo", "temperature": 0.0, "max_tokens": 12}


@pytest.fixture(scope="module")
def engine() -> Engine:
    """The same model, asked directly."""
    return Engine.from_pretrained("demo", **SMALL)


def test_models_are_listed_and_found(server: Running) -> None:
    client = server.openai()
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").owned_by == "radixkv"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


def test_a_completion_is_the_engines_and_says_what_was_cached(server: Running, engine: Engine) -> None:
    client = server.openai()
    (expected,) = engine.generate(PROMPT, SamplingParams(max_tokens=12))
    first = client.completions.create(prompt=PROMPT, **GREEDY, extra_body={"cache_salt": "exact"})
    again = client.completions.create(prompt=PROMPT, **GREEDY, extra_body={"cache_salt": "exact"})
    for completion, cached_tokens in ((first, 0), (again, expected.prompt_tokens - 1)):
        (choice,) = completion.choices
        assert (choice.text, choice.finish_reason) == (expected.text, "length")
        assert completion.usage is not None
        assert completion.usage.prompt_tokens_details is not None
        assert completion.usage.prompt_tokens_details.cached_tokens == cached_tokens
        assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (expected.prompt_tokens, 12)


def test_prompts_may_be_texts_ids_and_lists_of_either(server: Running, engine: Engine) -> None:
    client = server.openai()
    ids = engine.encode(PROMPT).tolist()
    texts = [output.text for output in engine.generate([PROMPT, "JULIET:"], SamplingParams(max_tokens=12))]
    for prompt, expected in (
        (ids, texts[:1]),
        ([PROMPT, "JULIET:"], texts),
        ([ids, engine.encode("JULIET:").tolist()], texts),
    ):
        completion = client.completions.create(prompt=prompt, **GREEDY)
        assert [choice.text for choice in completion.choices] == expected
        assert [choice.index for choice in completion.choices] == list(range(len(expected)))


def test_echo_puts_the_prompt_first(server: Running, engine: Engine) -> None:
    (expected,) = engine.generate(PROMPT, SamplingParams(max_tokens=12))
    for prompt in (PROMPT, engine.encode(PROMPT).tolist()):
        completion = server.openai().completions.create(prompt=prompt, echo=True, **GREEDY)
        assert completion.choices[0].text == PROMPT + (expected.text or "")


def test_a_chat_is_the_templates_prompt(server: Running, engine: Engine) -> None:
    rendered = engine.require_tokenizer("a chat").apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True
    )
    ids = engine.encode(rendered, add_special_tokens=False)
    (expected,) = engine.generate(ids, SamplingParams(max_tokens=12))
    answer = server.openai().chat.completions.create(messages=MESSAGES, **GREEDY)
    assert answer.choices[0].message.content == expected.text
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(ids)


def test_parts_of_a_message_are_its_lines(server: Running) -> None:
    parts = [{"type": "text", "text": "Who"}, {"type": "text", "text": "are you?"}]
    client = server.openai()
    counts = [
        client.chat.completions.create(messages=[{"role": "user", "content": content}], **GREEDY).usage
        for content in (parts, "Who\nare you?")
    ]
    assert counts[0].prompt_tokens == counts[1].prompt_tokens
    assert counts[1].prompt_tokens_details.cached_tokens == counts[1].prompt_tokens - 1


def test_a_stream_brings_the_text_of_the_answer_and_its_usage(server: Running) -> None:
    client = server.openai()
    whole = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    chunks = list(
        client.chat.completions.create(messages=MESSAGES, **GREEDY, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == chunks[-1].usage.prompt_tokens - 1
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_streamed_completion_ends_as_clients_expect(server: Running) -> None:
    with server.http().stream("POST", "/v1/completions", json={"prompt": PROMPT, **GREEDY, "stream": True}) as response:
        lines = [line for line in response.iter_lines() if line]
    assert response.headers["content-type"].startswith("text/event-stream")
    assert lines[-1] == "data: [DONE]"
    pieces = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:-1]]
    whole = server.openai().completions.create(prompt=PROMPT, **GREEDY).choices[0]
    assert "".join(piece["text"] for piece in pieces) == whole.text
    assert [piece["finish_reason"] for piece in pieces][-1] == "length"


def test_prompts_of_one_stream_end_each_for_itself(server: Running) -> None:
    client = server.openai()
    prompts = ["JULIET:", "ROMEO: But soft, what", "ROMEO:"]
    whole = client.completions.create(**{**GREEDY, "prompt": prompts}).choices
    texts, reasons = [""] * 3, [""] * 3
    for chunk in client.completions.create(**{**GREEDY, "prompt": prompts}, stream=True):
        (choice,) = chunk.choices
        assert not reasons[choice.index], "nothing comes after its end"
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason or ""
    assert texts == [choice.text for choice in whole]
    assert reasons == [choice.finish_reason for choice in whole]


def test_all_tokens_may_be_drawn_whatever_word_a_client_has_for_it(server: Running) -> None:
    client = server.openai()
    settings = {"model": "demo", "prompt": PROMPT, "max_tokens": 8, "temperature": 1.0, "seed": 7}
    texts = [
        client.completions.create(**settings, extra_body=extra).choices[0].text
        for extra in ({}, {"top_k": 0}, {"top_k": -1}, {"top_k": 1})
    ]
    assert texts[0] == texts[1] == texts[2] != texts[3]


def test_several_choices_compute_the_prompt_once(server: Running) -> None:
    client = server.openai()
    settings = {"model": "demo", "max_tokens": 8, "temperature": 1.0, "n": 4, "extra_body": {"cache_salt": "choices"}}
    computed_before = server.stats().cache.query_tokens - server.stats().cache.hit_tokens
    first = client.chat.completions.create(messages=MESSAGES, seed=1, **settings)
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    assert len({choice.message.content for choice in first.choices}) > 1, "each draws for itself"
    assert first.usage is not None
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    computed = server.stats().cache.query_tokens - server.stats().cache.hit_tokens - computed_before
    assert computed < first.usage.prompt_tokens + 16
    again = client.chat.completions.create(messages=MESSAGES, seed=1, stream=True, **settings)
    texts = ["", "", "", ""]
    for chunk in again:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in first.choices], "seeds make it repeatable"


def test_stop_texts_end_an_answer(server: Running) -> None:
    client = server.openai()
    whole = client.completions.create(prompt=PROMPT, **GREEDY).choices[0].text
    stop = whole[4:8]
    choice = client.completions.create(prompt=PROMPT, stop=[stop], **GREEDY).choices[0]
    assert (choice.text, choice.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_text_becomes_tokens_and_text_again(server: Running, engine: Engine) -> None:
    http = server.http()
    answer = http.post("/tokenize", json={"model": "demo", "prompt": PROMPT}).json()
    assert answer["tokens"] == engine.encode(PROMPT).tolist()
    assert answer["count"] == len(answer["tokens"])
    text = http.post("/detokenize", json={"tokens": answer["tokens"]}).json()["prompt"]
    assert text.endswith(PROMPT)
    chat = http.post("/tokenize", json={"messages": MESSAGES}).json()
    usage = server.openai().chat.completions.create(messages=MESSAGES, **GREEDY).usage
    assert chat["count"] == usage.prompt_tokens


def test_many_clients_at_once_get_what_each_would_alone(server: Running, engine: Engine) -> None:
    prompts = [f"{PROMPT} {name}:" for name in ("ROMEO", "JULIET", "NURSE", "PARIS", "TYBALT", "BENVOLIO")]
    expected = [output.text for output in engine.generate(prompts, SamplingParams(max_tokens=12))]

    async def ask() -> list[str]:
        async with server.async_openai() as client:
            answers = await asyncio.gather(*(client.completions.create(prompt=p, **GREEDY) for p in prompts))
        return [answer.choices[0].text for answer in answers]

    assert asyncio.run(ask()) == expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_completion_tokens": -5}, "max_completion_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"seed": -1}, "seed"),
        ({"stop": ["a", ""]}, "stop"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "judge", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"priority": 1.5}, "priority"),
    ],
)
def test_what_is_wrong_in_a_chat_is_named(server: Running, fields: dict[str, object], param: str) -> None:
    http = server.http()
    answer = http.post("/v1/chat/completions", json={"model": "demo", "messages": MESSAGES, **fields})
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert param.split("[")[0] in error["message"] or "chat template" in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, -3]}, "prompt"),
        ({"prompt": [10**9]}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"prompt": [[1]] * 1025}, "prompt"),
        ({"n": 2, "radixkv_output_ids": [1]}, "radixkv_output_ids"),
        ({"prompt": [[1], [2]], "radixkv_output_ids": [1]}, "radixkv_output_ids"),
        ({"prompt": ""}, "prompt"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"prompt": "a" * 20_000}, "prompt"),
    ],
)
def test_what_is_wrong_in_a_completion_is_named(server: Running, fields: dict[str, object], param: str) -> None:
    http = server.http()
    answer = http.post("/v1/completions", json={"prompt": PROMPT, **GREEDY, **fields, "stream": True})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_other_errors_have_the_same_shape(server: Running) -> None:
    http = server.http()
    answers = [
        http.get("/nothing"),
        http.get("/v1/chat/completions"),
        http.post("/v1/completions", content=b'{"prompt', headers={"content-type": "application/json"}),
        http.post("/v1/completions", json=[1, 2]),
        http.post("/v1/completions", json={"prompt": "x", "model": "other"}),
        http.post("/v1/completions", content=b" " * (17 << 20)),
        http.post("/v1/completions", content=(b" " * (1 << 20) for _ in range(17))),  # whose length is not told before
    ]
    assert [answer.status_code for answer in answers] == [404, 405, 400, 400, 404, 413, 413]
    for answer in answers:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answers[4].json()["error"]["code"] == "model_not_found"
    assert answers[5].json() == answers[6].json()


def test_unknown_fields_are_logged_once_and_ignored(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    body = {"prompt": PROMPT, **GREEDY, "shiny": 1, "stream_options": {"blue": "secret words"}}
    http = server.http()
    with caplog.at_level(logging.WARNING, "radixkv.serving"):
        assert [http.post("/v1/completions", json=body).status_code for _ in range(2)] == [200, 200]
    messages = sorted(record.getMessage() for record in caplog.records)
    assert messages == [
        "the field 'shiny' of a request is unknown and ignored",
        "the field 'stream_options.blue' of a request is unknown and ignored",
    ]


def test_health_and_readiness(server: Running) -> None:
    http = server.http()
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"status": "ready"}
