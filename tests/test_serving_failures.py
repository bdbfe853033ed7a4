"""What goes wrong inside: one request fails alone, the engine's end is told, and no log line holds a prompt."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import httpx2 as httpx
import pytest
import torch

from http_server import SMALL, new_demo_engine, running
from radixkv import AsyncEngine, EngineConfig
from radixkv.engine.assembly import assemble
from radixkv.engine.step_input import StepInput
from radixkv.models.loader import load
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
