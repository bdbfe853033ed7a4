"""`radixkv serve`: flags from the settings, a file of settings, and the end by signals."""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import get_args

import httpx2 as httpx
import pytest
import typer
from typer.testing import Result

from cli_runs import SMALL, assert_one_line_error, run
from http_server import new_demo_engine
from radixkv import AsyncEngine
from radixkv.cli.serve import SERVED_ENGINE_SETTINGS, SERVER_SETTINGS, read_settings, serve
from radixkv.config import EngineConfig, ServerConfig
from radixkv.config.setting import setting_fields
from radixkv.errors import ClosedError, ConfigError, MissingPackageError
from radixkv.serving.requirements import check_installed
from radixkv.serving.server import serve as serve_service
from radixkv.serving.service import Service
from recurrent_models import recurrent_model

MAIN = "from radixkv.cli import main; main()"


@contextmanager
def served(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """The process of a server, and what it printed until clients could connect."""
    command = [sys.executable, "-c", MAIN, "serve", "demo", "--port", "0", *SMALL, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert process.stdout is not None
    lines: list[str] = []
    try:
        while not lines or "curl" not in lines[-1]:
            line = process.stdout.readline()
            assert line, f"the server ended: {lines}"
            lines.append(line)
        yield process, lines
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def address_in(lines: list[str]) -> str:
    found = re.search(r"http://\S+", lines[0])
    assert found is not None
    return found[0]


def test_each_setting_is_a_flag() -> None:
    parameters = inspect.signature(serve).parameters
    for group, settings in ((SERVED_ENGINE_SETTINGS, EngineConfig), (SERVER_SETTINGS, ServerConfig)):
        assert not group.left_out
        for field in setting_fields(settings):
            option = get_args(parameters[field.name].annotation)[1]
            assert isinstance(option, type(typer.Option()))
            assert parameters[field.name].default == field.default


@pytest.mark.cluster  # a whole process, which imports all there is
def test_it_takes_a_file_and_flags_says_how_to_reach_it_and_drains_at_a_signal(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text('model = "demo"\nport = 8000\npage_size = 4\nserved_model_name = "mine"\nkv_cache_tokens = 2048\n')
    assert read_settings(file)["page_size"] == 4
    flags = ("--page-size", "8", "--root-path", "/llm", "--drain-s", "60", "--kv-events", "tcp://127.0.0.1:0")
    with served("--config", str(file), *flags) as (process, lines):
        address = address_in(lines).removesuffix("/llm")
        text = "".join(lines)
        assert "radixkv serves mine at http://127.0.0.1:" in text
        assert "2,048 tokens in pages of 8" in text, "a flag goes before the file"
        assert "events    tcp://127.0.0.1:" in text
        curl = text[text.index("curl") :]
        assert f"{address}/llm/v1/chat/completions" in curl
        assert '"model": "mine"' in curl
        body = {"prompt": "ROMEO:", "max_tokens": 150, "ignore_eos": True, "temperature": 0, "stream": True}
        with httpx.Client(base_url=address, timeout=60) as client:
            with client.stream("POST", "/v1/completions", json=body) as stream:
                pieces = stream.iter_lines()
                assert next(pieces).startswith("data: ")
                process.send_signal(signal.SIGTERM)
                while client.get("/ready").status_code == 200:
                    pass
                refused = client.post("/v1/completions", json=body)
                assert refused.status_code == 503
                assert refused.headers["retry-after"] == "1"
                assert refused.json()["error"]["code"] == "shutting_down"
                assert client.get("/health").status_code == 200
                rest = [piece for piece in pieces if piece]
            assert rest[-1] == "data: [DONE]", "what ran has finished"
        assert process.wait(60) == 0


@pytest.mark.stress
def test_a_second_signal_ends_it_at_once() -> None:
    with served("--drain-s", "600", "--max-context-tokens", "2000") as (process, lines):
        body = {"prompt": "ROMEO:", "max_tokens": 1900, "ignore_eos": True, "stream": True}
        with (
            httpx.Client(base_url=address_in(lines), timeout=60) as client,
            client.stream("POST", "/v1/completions", json=body) as stream,
        ):
            pieces = stream.iter_lines()
            received = [next(pieces)]
            process.send_signal(signal.SIGTERM)
            while client.get("/ready").status_code == 200:
                pass
            process.send_signal(signal.SIGTERM)
            with suppress(httpx.TransportError):
                received += pieces
            assert "data: [DONE]" not in received
        assert process.wait(60) == 130


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("page_size = 0", "page_size must be an integer in [1, 2147483647], not 0"),
        ("page_size = 1.5", "page_size must be an integer in [1, 2147483647], not 1.5"),
        ("port = 70000", "port must be an integer in [0, 65535], not 70000"),
        ("prot = 70000", "unknown setting 'prot'; the settings are dtype, "),
        ("port =", "must be TOML"),
    ],
)
def test_a_file_with_a_mistake_is_refused(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "server.toml"
    file.write_text(content)
    assert_one_line_error(run("serve", "--config", file), message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "--port must be an integer in [0, 65535], not 70000"),
        (["--config", "nowhere.toml"], "nowhere.toml cannot be read: No such file or directory"),
        (["--api-key", "a", "--api-keys", "b"], "give one of them"),
        (["--kv-events", "5557"], "kv_events must be an address as tcp://127.0.0.1:5557"),
        (["--ssl-keyfile", "key.pem"], "need an ssl_certfile"),
        (["--window", "8", "--cuda-graphs"], "does not run in CUDA graphs"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_loaded(arguments: list[str], message: str) -> None:
    assert_one_line_error(run("serve", "demo", *arguments), message)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("radixkv.serving.requirements.find_spec", lambda name: None if name == "uvicorn" else object())
    with pytest.raises(MissingPackageError, match=r"needs uvicorn, .* run: pip install 'radixkv\[serve\]'"):
        check_installed()


@pytest.fixture
def serve_briefly(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs `radixkv serve`, with a model given in place of loaded, and a server that ends as soon as it has begun."""

    def serve_and_end(service: Service, on_start: Callable[[str], None]) -> bool:
        on_start("http://127.0.0.1:1")
        asyncio.run(service.engine.close())
        return True

    def serve_briefly(engine: AsyncEngine, *arguments: object) -> Result:
        monkeypatch.setattr(AsyncEngine, "from_pretrained", lambda *_, **__: engine)
        monkeypatch.setattr("radixkv.serving.server.serve", serve_and_end)
        result = run("serve", *arguments)
        assert result.exit_code == 0, result.output
        return result

    return serve_briefly


@pytest.mark.parametrize("family", ["lfm2", None])
def test_it_says_how_many_states_there_are_if_there_are_any(
    serve_briefly: Callable[..., Result], family: str | None
) -> None:
    settings = {"kv_cache_tokens": 512, "attention_backend": "torch"}
    engine = (
        new_demo_engine(**settings)
        if family is None
        else AsyncEngine(recurrent_model(family), None, EngineConfig(**settings, state_slots=1200))
    )
    result = serve_briefly(engine, "some-model")
    assert "  KV pool   512 tokens in pages of 16\n" in result.stdout
    assert ("  states    1,200 of recurrent layers\n" in result.stdout) is (family is not None)
    assert ("states" in result.stdout) is (family is not None)


def test_it_warns_of_what_everybody_can_reach(serve_briefly: Callable[..., Result], tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[[key]]\nname = "one"\nsha256 = "{"0" * 64}"\n')
    server = "everybody who reaches 0.0.0.0 can use this server"
    events = "everybody who reaches tcp://*:0 can read all prompts"
    cases: list[tuple[list[object], list[str]]] = [
        ([], []),
        (["--host", "0.0.0.0"], [server]),
        (["--host", "0.0.0.0", "--api-keys", keys], []),
        (["--kv-events", "tcp://*:0"], [events]),
        (["--host", "0.0.0.0", "--kv-events", "tcp://*:0"], [server, events]),
    ]
    for arguments, warnings in cases:
        result = serve_briefly(new_demo_engine(), *arguments)
        lines = result.stderr.splitlines()
        assert len(lines) == len(warnings), arguments
        for line, warning in zip(lines, warnings, strict=True):
            assert line.startswith(f"radixkv: warning: {warning}"), arguments


def test_a_file_names_the_settings_and_the_greeting_what_came_of_them(
    serve_briefly: Callable[..., Result], tmp_path: Path
) -> None:
    file = tmp_path / "server.toml"
    file.write_text('served_model_name = "mine"\nroot_path = "/llm"\nport = 0\n')
    text = serve_briefly(new_demo_engine(kv_events="tcp://127.0.0.1:0"), "--config", file).stdout
    assert text.startswith("radixkv serves mine at http://127.0.0.1:1\n")
    assert re.search(r"^  events    tcp://127\.0\.0\.1:\d+, replays and snapshots at tcp://", text, re.MULTILINE)
    assert "curl http://127.0.0.1:1/llm/v1/chat/completions -H 'Content-Type" in text


def test_a_model_that_does_not_fit_is_told_what_to_make_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(message: str) -> Callable[..., AsyncEngine]:
        def from_pretrained(*_: object, **__: object) -> AsyncEngine:
            raise RuntimeError(message)

        return from_pretrained

    monkeypatch.setattr(AsyncEngine, "from_pretrained", fails("DefaultCPUAllocator: can't allocate memory"))
    assert_one_line_error(
        run("serve"), "there is not enough memory for 'demo' and its KV pool; set a smaller --kv-cache-tokens"
    )
    monkeypatch.setattr(AsyncEngine, "from_pretrained", fails("a bug"))
    assert str(run("serve").exception) == "a bug", "which is told with its traceback"


def test_a_signal_ends_a_server() -> None:
    engine, addresses = new_demo_engine(), []

    def started(address: str) -> None:
        addresses.append(address)
        signal.raise_signal(signal.SIGTERM)

    assert serve_service(Service(engine, "demo", ServerConfig(port=0)), on_start=started), "nothing ran"
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", addresses[0])
    with pytest.raises(ClosedError):
        asyncio.run(engine.stats())


def test_a_port_that_is_taken_and_a_certificate_that_is_missing_are_refused(tmp_path: Path) -> None:
    engine = new_demo_engine()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1, port {port}; is another server there"):
            serve_service(Service(engine, "demo", ServerConfig(port=port)))
    with pytest.raises(ClosedError):
        asyncio.run(engine.stats())
    config = ServerConfig(ssl_certfile=str(tmp_path / "cert.pem"), ssl_keyfile=str(tmp_path / "key.pem"))
    with pytest.raises(ConfigError, match=r"the certificate or its key cannot be used: .*No such file"):
        serve_service(Service(engine, "demo", config))


def test_a_server_can_be_imported_only_by_those_who_serve() -> None:
    code = (
        "import sys, radixkv, radixkv.cli.app, radixkv.config, radixkv.serving.requirements\n"
        "heavy = {'fastapi', 'starlette', 'uvicorn', 'pydantic', 'prometheus_client', 'llguidance', 'torch'}\n"
        "loaded = heavy & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="api_key must be a text that is not empty"):
        ServerConfig(api_key="")


def test_a_host_by_name_is_taken_for_one_that_others_reach() -> None:
    for host, is_local in {"localhost": True, "::1": True, "my-machine": False, "::": False}.items():
        assert ServerConfig(host=host).is_local is is_local, host
