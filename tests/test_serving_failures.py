"""What goes wrong inside: one request fails alone, the engine's end is told, and no log line holds a prompt."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import httpx2 as httpx
import pytest
import torch
from starlette.exceptions import HTTPException

from http_server import SMALL, Running, new_demo_engine, running
from radixkv import AsyncEngine, EngineConfig, SamplingParams
from radixkv.config import ServerConfig
from radixkv.engine.assembly import assemble
from radixkv.engine.step_input import StepInput
from radixkv.errors import (
    ClosedError,
    EngineFailedError,
    InvalidRequestError,
    InvalidSamplingParamsError,
    InvalidTokenIdsError,
    NonFiniteLogitsError,
    PromptTooLongError,
    QueueFullError,
)
from radixkv.models.loader import load
from radixkv.serving.errors import ApiError, as_api_error
from radixkv.serving.service import Service
from runners import TamperedRunner

SECRET = "xyzzy plugh"
ASK: dict[str, Any] = {"model": "demo", "max_tokens": 5, "temperature": 0}


class Worn(BaseException):
    """Nothing but the engine's end can follow."""


def tampered(around: Callable[[StepInput, Callable[[], torch.Tensor]], torch.Tensor]) -> AsyncEngine:
    """An engine of the demo model whose steps go through `around`."""
    config = EngineConfig(**SMALL)
    model, tokenizer = load("demo", dtype=config.dtype, device=config.device)
    parts = assemble(model, tokenizer, config)
    return AsyncEngine.from_parts(replace(parts, runner=TamperedRunner(parts.runner, around)))


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_fails_inside_is_told_and_logged_without_its_prompt(
    caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    def fails(step: StepInput, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        raise RuntimeError(f"the model chokes on {SECRET}")

    with running(tampered(fails)) as server, caplog.at_level(logging.DEBUG):
        http = server.http()
        for path, body in (
            ("/v1/completions", {"prompt": SECRET}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": SECRET}]}),
            ("/v1/messages", {"messages": [{"role": "user", "content": SECRET}]}),
        ):
            answer = http.post(path, json={**ASK, **body, "stream": stream})
            assert answer.status_code == 500
            assert "its log says where" in answer.json()["error"]["message"]
            assert SECRET not in answer.text
        assert http.post("/v1/completions", json={**ASK, "prompt": SECRET, "n": "x"}).status_code == 400
        server.check_idle()
    served = [record for record in caplog.records if not record.name.startswith(("asyncio", "httpx", "httpcore"))]
    text = "\n".join(logging.Formatter().format(record) for record in served)
    assert "a request failed: unforeseen RuntimeError at" in text
    assert SECRET not in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("error", "status", "param", "code"),
    [
        (QueueFullError("9 requests wait"), 429, None, "queue_full"),
        (ClosedError("the engine was closed"), 503, None, "shutting_down"),
        (EngineFailedError("it ended"), 503, None, "engine_failed"),
        (InvalidSamplingParamsError("top_p must be above 0; got 0"), 400, "top_p", None),
        (PromptTooLongError("the prompt has 9 tokens"), 400, "prompt", "context_length_exceeded"),
        (InvalidRequestError("the prompt is empty"), 400, "prompt", None),
        (InvalidTokenIdsError("token id -1"), 400, "prompt", None),
        (HTTPException(405), 405, None, None),
        (NonFiniteLogitsError("NaN"), 500, None, "internal_error"),
    ],
)
def test_what_clients_are_told_of_each_kind_of_error(
    error: Exception, status: int, param: str | None, code: str | None
) -> None:
    told = as_api_error(error)
    assert (told.status, told.param, told.code) == (status, param, code)
    assert (told.retry_after_s is not None) == (code in ("queue_full", "shutting_down")), "it helps to wait"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_a_stream_that_fails_amid_its_answer_ends_with_an_error_of_its_interface(
    failing_later: Running, path: str
) -> None:
    field = {"/v1/completions": "prompt", "/v1/responses": "input"}.get(path)
    body: dict[str, Any] = {field: SECRET} if field else {"messages": [{"role": "user", "content": SECRET}]}
    body["max_output_tokens" if field == "input" else "max_tokens"] = 9
    with failing_later.http().stream("POST", path, json={"stream": True, "temperature": 0, **body}) as answer:
        assert answer.status_code == 200
        lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
    last = json.loads(lines[-1].removeprefix("data: "))
    assert len(lines) > 1
    assert SECRET not in lines[-1]
    if path == "/v1/responses":
        assert (last["type"], last["code"], last["sequence_number"]) == ("error", "internal_error", len(lines) - 1)
    else:
        assert last.get("type", "error") == "error"
        assert "its log says where" in last["error"]["message"]


@pytest.fixture(scope="module")
def failing_later() -> Iterator[Running]:
    """A server whose model fails once three tokens of an output have come."""

    def fails(step: StepInput, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        steps[step.request_ids] += 1
        if steps[step.request_ids] > 3:
            raise RuntimeError(f"the model chokes on {SECRET}")
        return compute()

    steps: Counter[tuple[int, ...]] = Counter()
    with running(tampered(fails)) as server:
        yield server


def test_an_engine_that_is_stuck_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    step, go_on = threading.Event(), threading.Event()

    def waits(_: StepInput, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        step.set()
        assert go_on.wait(60)
        return compute()

    async def main(service: Service) -> None:
        asked = asyncio.create_task(service.engine.generate([SECRET], SamplingParams(max_tokens=1)))
        await asyncio.to_thread(step.wait, 60)
        with pytest.raises(ApiError, match="no step of the engine has ended in 0 s") as caught:
            await service.check_health()
        assert caught.value.status == 503
        go_on.set()
        await asked
        monkeypatch.undo()
        await service.check_health()
        await service.close()

    monkeypatch.setattr("radixkv.serving.service.HEALTH_TIMEOUT_S", 0.0)
    asyncio.run(main(Service(tampered(waits), "demo", ServerConfig())))


def test_the_end_of_the_engine_is_told() -> None:
    def ends(step: StepInput, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        raise Worn(SECRET)

    with running(tampered(ends)) as server:
        http = server.http()
        for _ in range(2):
            answer = http.post("/v1/completions", json={**ASK, "prompt": SECRET})
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "engine_failed"
            assert SECRET not in answer.text
        assert http.get("/health").status_code == 503
        assert http.get("/ready").status_code == 503


def test_a_second_signal_ends_what_runs_at_once() -> None:
    body = {**ASK, "prompt": SECRET, "max_tokens": 3000, "ignore_eos": True, "stream": True}
    with (
        running(new_demo_engine(), drain_s=600) as server,
        server.http().stream("POST", "/v1/completions", json=body) as stream,
    ):
        pieces = stream.iter_lines()
        received = [next(pieces)]
        server.server.handle_exit(signal.SIGTERM, None)
        assert not server.server.was_forced
        server.server.handle_exit(signal.SIGTERM, None)
        with suppress(httpx.TransportError):
            received += pieces
    assert server.server.was_forced
    assert "data: [DONE]" not in received
