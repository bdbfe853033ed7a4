"""Whatever a client sends that the OpenAPI document allows, or not quite allows: the server never fails."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest

from http_server import Running, new_demo_engine, running

MOST_TOKENS = 4


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    engine = new_demo_engine(max_context_tokens=256)
    with running(engine) as server:
        yield server


def bounded(body: Any) -> Any:
    """`body`, asking for few tokens: what is looked for does not take many."""
    if isinstance(body, dict):
        for name in ("max_tokens", "max_completion_tokens"):
            if isinstance(body.get(name), int) and body[name] > MOST_TOKENS:
                body[name] = MOST_TOKENS
        if isinstance(body.get("n"), int) and body["n"] > 3:
            body["n"] = 3
    return body


@pytest.mark.parametrize("num_examples", [2, pytest.param(50, marks=pytest.mark.stress)])
def test_no_request_makes_the_server_fail(server: Running, num_examples: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import schemathesis
    http = server.http()
    document = http.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/messages", "/v1/cache/explain", "/tokenize"} <= set(document["paths"])
    schema = schemathesis.openapi.from_dict(document)
    for result in schema.get_all_operations():
        probe(server, result.ok(), num_examples)()  # type: ignore[union-attr]
    server.wait_until(lambda stats: stats.running == 0)
    server.check_idle()


def probe(server: Running, operation: Any, num_examples: int) -> Any:
    """A test that sends `operation` what Hypothesis finds."""
    from schemathesis.checks import not_a_server_error

    @hypothesis.settings(
        max_examples=num_examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy())
    def sends(case: Any) -> None:
        case.body = bounded(case.body)
        response = case.call(base_url=server.address, timeout=60)
        case.validate_response(response, checks=[not_a_server_error])

    return sends
