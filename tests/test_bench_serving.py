"""bench/serving.py: each case in small, and what a stream's client and the soak's figures say."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from http_server import running
from radixkv import AsyncEngine
from radixkv_bench.serving import command, conversations, http_cost, schema_cost, servers, soak
from radixkv_bench.serving.client import Address
from radixkv_bench.serving.servers import RunningServer

TINY = ["--rounds", "1", "--attention-backend", "torch", "--kv-cache-tokens", "4096"]
SMALL_MODEL = "hidden=32,layers=1,heads=2,vocab=200"


real_server = servers.radixkv_server


@contextmanager
def server_in_a_thread(model: str, settings: Mapping[str, Any], *, profile: Any = ()) -> Iterator[RunningServer]:
    """In this process, which starts sooner than another; a profiler needs one of its own."""
    if profile:
        with real_server(model, settings, profile=profile) as server:
            yield server
        return
    settings = dict(settings)
    engine = AsyncEngine.from_pretrained(model, max_waiting=settings.pop("max_waiting", 1024), **settings)
    with running(engine, served_model_name=model) as server:
        host, port = server.address.removeprefix("http://").split(":")
        yield RunningServer(os.getpid(), Address(host, int(port)))


@pytest.fixture(autouse=True)
def servers_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (conversations, http_cost, schema_cost, soak):
        monkeypatch.setattr(module, "radixkv_server", server_in_a_thread)


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict[str, Any]:
    """The figures of the cases that ran."""
    file = tmp_path / "serving.json"
    monkeypatch.setattr("sys.argv", ["serving", *TINY, *options, "--json", str(file)])
    assert command.main() == 0
    cases: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["cases"]
    return cases


def talk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    sizes = ["--clients", "2", "--system-tokens", "40", "--turns", "2", "--user-tokens", "8", "--output-tokens", "4"]
    options = ["--cases", "transformers", "--random-model", SMALL_MODEL, *sizes]
    figures: dict[str, Any] = run(tmp_path, monkeypatch, *options)["transformers"]
    return figures


def test_both_servers_hold_the_same_conversations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With radixkv in the place of the other, too: it stands in for packages that are not installed here."""
    ours = {"dtype": "float32", "attention_backend": "torch", "kv_cache_tokens": 4096}
    monkeypatch.setattr(conversations, "check_transformers", lambda: None)
    monkeypatch.setattr(conversations, "transformers_server", lambda model, *_: server_in_a_thread(str(model), ours))
    figures = talk(tmp_path, monkeypatch)
    for server in figures["servers"].values():
        assert server["output_tokens"] == [2 * 2 * 4]
        assert server["prompt_tokens"] == [2 * ((40 + 8) + (40 + 8 + 4 + 8))]
        assert server["cached_tokens"][0] >= 2 * (40 + 8), "each second turn goes on from the first"
    assert figures["same_answers"] == 1
    assert "2 clients, 40 tokens of system prompt" in capsys.readouterr().out


@pytest.mark.skipif(find_spec("accelerate") is None, reason="`transformers serve` needs accelerate")
def test_transformers_serves_the_same_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = talk(tmp_path, monkeypatch)
    assert figures["servers"]["transformers"]["output_tokens"] == [2 * 2 * 4]
    assert figures["same_answers"] == 1


def test_a_package_that_the_other_server_lacks_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(servers, "TRANSFORMERS_NEEDS", ("json", "no_such_package"))
    figures = talk(tmp_path, monkeypatch)
    assert figures == {"left_out": "`transformers serve` needs no_such_package: pip install no_such_package"}
    assert "left out; `transformers serve` needs no_such_package" in capsys.readouterr().out


def test_http_is_compared_with_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(http_cost, "THREADS", ())
    figures = http_figures(tmp_path, monkeypatch)
    assert figures["ratio"] == pytest.approx(figures["http_tokens_a_second"] / figures["engine_tokens_a_second"])
    assert set(figures["processor_us_a_token"]) == {"client", "event loop", "engine and model"}
    assert "3 streams, 8 tokens in and 6 out" in capsys.readouterr().out


@pytest.mark.stress  # starts two servers in processes of their own
def test_both_threads_are_taken_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = http_figures(tmp_path, monkeypatch)["profile_us_a_token"]
    assert {"JSON and events", "HTTP protocol", "event loop, sockets"} <= set(parts["loop"])
    assert {"model and sampling", "detokenising"} <= set(parts["engine"])
    assert "thread of the event loop, by a profiler: " in capsys.readouterr().out


def http_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    sizes = ["--streams", "3", "--prompt-tokens", "8", "--stream-tokens", "6"]
    figures: dict[str, Any] = run(tmp_path, monkeypatch, "--cases", "http", *sizes)["http"]
    return figures


def test_a_schema_is_compared_with_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--batch", "2", "--prompt-tokens", "8", "--stream-tokens", "6"]
    figures = run(tmp_path, monkeypatch, "--cases", "schema", *sizes)["schema"]
    assert figures["ratio"] == pytest.approx(figures["schema_tokens_a_second"] / figures["free_tokens_a_second"])
    assert 0 < figures["forced_share"] < 1
    assert "tokens/s with the schema" in capsys.readouterr().out


def test_answers_are_compared_with_their_own_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--answers", "20", "--prompt-tokens", "8", "--stream-tokens", "24"]
    figures = run(tmp_path, monkeypatch, "--cases", "retokenised", *sizes)["retokenised"]
    assert 0 < figures["retokenised_answers"] < figures["answers"] == 20
    assert figures["retokenised_answers"] <= figures["lost_tokens"] < figures["output_tokens"]
    assert 15 <= figures["kept_answers"] <= 20
    assert "are tokenised otherwise when they come back" in capsys.readouterr().out


def test_a_soak_ends_with_nothing_leased(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--soak-streams", "5", "--soak-stream-tokens", "4", "--soak-requests", "12", "--soak-at-once", "4"]
    figures = run(tmp_path, monkeypatch, "--soak", *sizes, "--soak-tokens", "4")["soak"]
    assert figures["streams_finished"] == 5
    assert (figures["leased_pages"], figures["running"], figures["waiting"]) == (0, 0, 0)
    assert figures["resident_bytes"][-1][0] == 12
    assert soak.failures(figures) == []
    assert "5 of 5 streams finished" in capsys.readouterr().out


def test_what_the_soak_leaves_behind_is_a_failure() -> None:
    held = {"leased_pages": 3, "protected_tokens": 0, "running": 0, "waiting": 0}
    assert soak.failures({"streams": 5, "streams_finished": 4, **held}) == [
        "4 of 5 streams finished",
        "at the end there are leased_pages 3, protected_tokens 0, running 0, waiting 0",
    ]


def test_unknown_cases_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["serving", "--cases", "http,ftp"])
    assert command.main() == 2
    assert (
        "--cases must be of transformers, http, schema, retokenised, soak; ftp is not among them"
        in capsys.readouterr().err
    )
