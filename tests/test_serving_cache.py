"""The cache on the wire: exact to the token, and defined while requests run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from http_server import Running, new_demo_engine, running

PROMPT = "ROMEO:\nBut, soft! what light through yonder window breaks?\nIt is the east, and Juliet is the sun."
GREEDY = {"model": "demo", "temperature": 0.0, "max_tokens": 4}
SYSTEM = "You are a citizen of Rome, and you know everybody who lives there."


@pytest.fixture(scope="module")
def running_server() -> Iterator[Running]:
    engine = new_demo_engine(kv_cache_tokens=512)
    with running(engine) as server:
        yield server


def post(server: Running, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = server.http().post(path, json=body)
    assert answer.status_code == 200, answer.text
    content: dict[str, Any] = answer.json()
    return content


def usage_of(server: Running, body: dict[str, Any]) -> tuple[int, int, int]:
    usage = post(server, "/v1/chat/completions" if "messages" in body else "/v1/completions", body)["usage"]
    details = usage["prompt_tokens_details"]
    return usage["prompt_tokens"], details["cached_tokens"], details["cache_write_tokens"]


def fill(server: Running) -> None:
    """Let enough other prompts run that all that may be evicted is."""
    for number in range(6):
        post(server, "/v1/completions", {**GREEDY, "prompt": f"{number} other words " * 30})


def test_usage_tells_what_was_cached_and_written(server: Running) -> None:
    num_tokens, cached, written = usage_of(server, {**GREEDY, "prompt": PROMPT})
    assert (cached, written) == (0, num_tokens)
    assert usage_of(server, {**GREEDY, "prompt": PROMPT}) == (num_tokens, num_tokens - 1, 0)
    longer = usage_of(server, {**GREEDY, "prompt": PROMPT + " Arise, fair sun", "n": 3, "temperature": 1.0})
    assert longer[1] == num_tokens
    assert longer[2] == longer[0] - num_tokens


def test_explain_says_how_far_a_prompt_is_cached_and_why_not_further(server: Running) -> None:
    assert post(server, "/v1/cache/explain", {"prompt": PROMPT})["reason"] == "never seen"
    num_tokens, *_ = usage_of(server, {**GREEDY, "prompt": PROMPT})
    found = post(server, "/v1/cache/explain", {**GREEDY, "prompt": PROMPT, "stream": True})
    assert (found["reason"], found["cached_tokens"], found["divergence"]) == ("hit", num_tokens, None)
    found = post(server, "/v1/cache/explain", {"prompt": PROMPT.replace("Juliet", "Rosaline")})
    assert found["reason"] == "never seen"
    assert found["divergence"]["text_before"].endswith("It is the east, and")
    assert "Juliet" in found["divergence"]["cached_text"]
    assert "Ros" in found["divergence"]["asked_text"]
    assert found["divergence"]["position"] == found["cached_tokens"]
    assert post(server, "/v1/cache/explain", {"prompt": PROMPT, "cache_salt": "other"})["cached_tokens"] == 0
    fill(server)
    found = post(server, "/v1/cache/explain", {"prompt": PROMPT})
    assert found["reason"] == "evicted"
    assert found["evicted"]["tokens"] > 0
    assert found["evicted"]["policy"] == "lru"


def test_explain_takes_chats(server: Running) -> None:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Who are you?"}]
    num_tokens, *_ = usage_of(server, {**GREEDY, "messages": messages})
    found = post(server, "/v1/cache/explain", {**GREEDY, "messages": messages})
    assert (found["prompt_tokens"], found["cached_tokens"]) == (num_tokens, num_tokens)
    bodies: list[dict[str, Any]] = [{}, {"prompt": "x", "messages": messages}, {"messages": []}]
    for body in bodies:
        assert server.http().post("/v1/cache/explain", json=body).status_code == 400


def test_prewarm_computes_a_prompt_and_generates_nothing(server: Running) -> None:
    generated = server.stats().generated_tokens
    answer = post(server, "/v1/cache/prewarm", {"prompt": PROMPT})
    assert answer["cached_tokens"] == 0
    assert answer["cache_write_tokens"] == answer["prompt_tokens"]
    assert server.stats().generated_tokens == generated
    assert usage_of(server, {**GREEDY, "prompt": PROMPT})[1] == answer["prompt_tokens"] - 1


def test_prewarm_is_an_option_of_chats_too(server: Running) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    answer = post(
        server, "/v1/chat/completions", {**GREEDY, "messages": messages, "prompt_cache_options": {"prewarm": True}}
    )
    assert answer["choices"][0]["message"]["content"] == ""
    assert answer["usage"]["completion_tokens"] == 0
    assert usage_of(server, {**GREEDY, "messages": messages})[1] == answer["usage"]["prompt_tokens"] - 1


def test_explicit_mode_without_a_breakpoint_is_no_caching(server: Running) -> None:
    asked = {**GREEDY, "prompt": PROMPT}
    explicit = {"prompt_cache_options": {"mode": "explicit"}}
    prompt_tokens, *rest = usage_of(server, {**asked, **explicit})
    assert rest == [0, 0]
    assert usage_of(server, asked) == (prompt_tokens, 0, prompt_tokens), "nothing was left"
    assert usage_of(server, {**asked, **explicit}) == (prompt_tokens, 0, 0), "nothing is found"
    assert usage_of(server, asked)[1] == prompt_tokens - 1


def test_flush_is_defined_while_requests_run(server: Running) -> None:
    usage_of(server, {**GREEDY, "prompt": PROMPT})
    held = post(server, "/v1/cache/flush", {})
    assert held["freed_tokens"] > 0
    assert held["kept_by_running_tokens"] == 0
    body = {"prompt": PROMPT, "max_tokens": 800, "ignore_eos": True, "stream": True}
    with server.http().stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()  # dropping it would close the stream
        assert next(lines)
        kept = post(server, "/v1/cache/flush", {})
        assert kept["kept_by_running_tokens"] > 0
    server.wait_until(lambda stats: stats.running == 0)


def test_stats_say_what_the_cache_holds(server: Running) -> None:
    usage_of(server, {**GREEDY, "prompt": PROMPT})
    stats = server.http().get("/v1/cache/stats").json()
    assert stats["pool"]["pages"] == 32
    assert stats["cached_tokens"]["evictable"] > 0
    assert stats["requests"] == {"running": 0, "waiting": 0}
    assert 0 <= stats["hit_rate"] <= 1


def test_a_breakpoint_keeps_exactly_the_prefix_before_it(server: Running) -> None:
    parts = [
        {"type": "text", "text": SYSTEM, "prompt_cache_breakpoint": {"mode": "explicit", "ttl": "12h"}},
        {"type": "text", "text": "Today is Monday, and it rains in the streets of the city."},
    ]
    messages = [{"role": "system", "content": parts}, {"role": "user", "content": PROMPT}]
    usage_of(server, {**GREEDY, "messages": messages})
    start = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "?"}]
    prefix = post(server, "/v1/cache/explain", {"messages": start})["cached_tokens"]
    assert prefix > 10
    fill(server)
    found = post(server, "/v1/cache/explain", {"messages": messages})
    assert prefix <= found["cached_tokens"] <= prefix + 16, "what follows the last kept page was evicted"
    assert found["reason"] == "evicted"


@pytest.mark.parametrize("stream", [False, True])
def test_options_keep_a_whole_prompt(server: Running, stream: bool) -> None:
    body = {**GREEDY, "prompt": PROMPT, "prompt_cache_options": {"ttl": "30m"}, "stream": stream}
    assert server.http().post("/v1/completions", json=body).status_code == 200
    fill(server)
    assert post(server, "/v1/cache/explain", {"prompt": PROMPT})["reason"] == "hit"


def test_broken_promises_are_counted_in_tokens(server: Running) -> None:
    def broken_tokens() -> int:
        (line,) = (
            line
            for line in server.http().get("/metrics").text.splitlines()
            if line.startswith("radixkv_cache_broken_promise_tokens_total")
        )
        return int(float(line.split()[1]))

    before = broken_tokens()
    kept = {"prompt_cache_options": {"ttl": "12h"}}
    usage_of(server, {**GREEDY, "prompt": PROMPT, **kept})
    fill(server)
    assert broken_tokens() == before, "others went first"
    for number in range(6):
        post(server, "/v1/completions", {**GREEDY, "prompt": f"{number} kept words " * 30, **kept})
    assert broken_tokens() > before
