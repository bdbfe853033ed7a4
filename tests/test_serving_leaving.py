"""Clients that leave or read slowly: nothing of theirs runs on, and nobody else waits for them."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator

import openai
import pytest

from http_server import Running, new_demo_engine, running

ENDLESS = {"prompt": "ROMEO:", "max_tokens": 3000, "ignore_eos": True, "temperature": 0}
SHORT = {"model": "demo", "prompt": "JULIET:", "max_tokens": 4, "temperature": 0.0}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    engine = new_demo_engine()
    with running(engine, keep_alive_s=0.05) as server:
        yield server


@pytest.fixture(autouse=True)
def _nothing_is_left(server: Running) -> Iterator[None]:
    yield
    server.wait_until(lambda stats: stats.running == 0)
    while server.service.admission.num_inside:
        pass
    server.check_idle()


def connect(server: Running, body: dict[str, object], path: str = "/v1/completions") -> socket.socket:
    """A connection over which `body` was sent, and nothing was read."""
    host, port = server.address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    connection.sendall(f"{head}\r\n\r\n".encode() + content)
    return connection


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fields", [{}, {"n": 3, "temperature": 1.0}, {"prompt": ["ROMEO:", "JULIET:"]}])
def test_a_closed_connection_aborts_what_it_asked_for(server: Running, stream: bool, fields: dict[str, object]) -> None:
    connection = connect(server, {**ENDLESS, **fields, "stream": stream})
    num_requests = 3 if "n" in fields else 2 if "prompt" in fields else 1
    server.wait_until(lambda stats: stats.running == num_requests)
    connection.close()
    before = server.wait_until(lambda stats: stats.running == 0)
    assert before.generated_tokens < 3000


def test_one_who_leaves_before_the_answer_begins_is_not_served(server: Running) -> None:
    connection = connect(server, {**ENDLESS, "stream": True})
    connection.close()
    server.wait_until(lambda stats: stats.running == 0)


def test_a_slow_reader_holds_up_nobody(server: Running) -> None:
    connection = connect(server, {**ENDLESS, "stream": True, "n": 2})
    server.wait_until(lambda stats: stats.running == 2)
    client = server.openai()
    assert client.completions.create(**SHORT).usage.completion_tokens == 4
    connection.close()


def test_cancelling_a_task_of_the_async_client_aborts_its_request(server: Running) -> None:
    async def ask() -> None:
        async with server.async_openai() as client:
            body = {name: value for name, value in ENDLESS.items() if name != "ignore_eos"}
            answer = asyncio.create_task(
                client.completions.create(model="demo", **body, extra_body={"ignore_eos": True})
            )
            while (await server.engine.stats()).running < 1:
                pass
            answer.cancel()
            with pytest.raises(asyncio.CancelledError):
                await answer

    asyncio.run(ask())
    server.wait_until(lambda stats: stats.running == 0)


def test_leaving_a_stream_of_the_client_aborts_its_request(server: Running) -> None:
    with server.openai().completions.create(
        model="demo", prompt="ROMEO:", max_tokens=3000, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        assert next(iter(stream)).choices[0].text is not None
    server.wait_until(lambda stats: stats.running == 0)


def test_many_who_leave_at_any_point_leave_nothing(server: Running) -> None:
    connections = []
    for number in range(30):
        body = {**ENDLESS, "prompt": f"ROMEO: {number}", "stream": number % 2 == 0}
        connections.append(connect(server, body))
        if number % 3 == 0:
            connections.pop(0).close()
    for connection in connections:
        connection.close()


def test_comments_keep_a_silent_stream_open() -> None:
    engine = new_demo_engine(max_running_requests=1)
    with running(engine, keep_alive_s=0.01) as server:
        first = connect(server, {**ENDLESS, "stream": True})
        server.wait_until(lambda stats: stats.running == 1)
        second = connect(server, {**ENDLESS, "stream": True})
        received = b""
        while b": keep-alive\n\n" not in received:
            received += second.recv(1000)
        assert b"data:" not in received
        assert received.startswith(b"HTTP/1.1 200")
        first.close()
        while b"data:" not in received:
            received += second.recv(1000)
        second.close()
        server.wait_until(lambda stats: stats.running == 0)


def test_a_full_queue_and_the_end_of_the_server_are_told() -> None:
    engine = new_demo_engine(max_running_requests=1, max_waiting=1)
    with running(engine, drain_s=0) as server:
        client = server.openai()
        first = connect(server, {**ENDLESS, "stream": True})
        server.wait_until(lambda stats: stats.running == 1)
        second = connect(server, ENDLESS)
        server.wait_until(lambda stats: stats.waiting == 1)
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(**SHORT)
        assert caught.value.code == "queue_full"
        assert caught.value.response.headers["retry-after"] == "1"
        server.server.drain()
        answers = [b"", b""]
        for number, connection in enumerate((first, second)):
            while piece := connection.recv(100_000):
                answers[number] += piece
            connection.close()
    assert b"[DONE]" not in answers[0]
    for answer in answers:
        assert b'"code":"shutting_down"' in answer
    assert answers[1].startswith(b"HTTP/1.1 503")
