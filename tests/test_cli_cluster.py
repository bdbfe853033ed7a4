"""`radixkv route` and `radixkv cluster up`: flags from the settings, and mistakes told in one line."""

from __future__ import annotations

import inspect
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import typer

from cli_runs import assert_one_line_error, run
from radixkv.cli.cluster import CLUSTER_SETTINGS, ROUTED_SERVER_SETTINGS, up
from radixkv.cluster.route_server import RouteServer
from radixkv.config import ClusterConfig, ServerConfig
from radixkv.config.setting import setting_fields
from radixkv.errors import ConfigError


def test_each_setting_is_a_flag() -> None:
    parameters = inspect.signature(up).parameters
    for group, settings in ((CLUSTER_SETTINGS, ClusterConfig), (ROUTED_SERVER_SETTINGS, ServerConfig)):
        for field in setting_fields(settings):
            if field.name in group.left_out:
                assert field.name not in parameters
                continue
            assert isinstance(get_args(parameters[field.name].annotation)[1], type(typer.Option()))
            assert parameters[field.name].default == field.default


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["route"], "Missing option '--replica'"),
        (["route", "--replica", "localhost:8000"], "a replica must be an address such as http://127.0.0.1:8000"),
        (["route", "--replica", "http://a", "--port", "70000"], "--port must be an integer in [0, 65535], not 70000"),
        (["cluster", "up", "--replicas", "0"], "--replicas must be an integer in [1, "),
        (["cluster", "up", "--replicas", "3", "--max-replicas", "2"], "max_replicas must be at least replicas; got 2 "),
        (["cluster", "up", "--page-size", "0"], "--page-size must be an integer in [1, "),
    ],
)
def test_wrong_flags_are_refused_before_anything_runs(arguments: list[str], message: str) -> None:
    assert_one_line_error(run(*arguments), message)


def test_a_router_says_where_it_is_and_how_its_replicas_are(monkeypatch: pytest.MonkeyPatch) -> None:
    class Brief(RouteServer):
        """Ends as soon as it has begun."""

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            self.should_exit = True

    monkeypatch.setattr("radixkv.cluster.route_server.RouteServer", Brief)
    result = run("route", "--port", 0, "--replica", "http://127.0.0.1:9", "--replica", "http://127.0.0.1:19")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert re.fullmatch(r"radixkv routes to 2 replicas at http://127\.0\.0\.1:[1-9]\d*", lines[0])
    for line, port in zip(lines[1:], (9, 19), strict=True):
        assert line.startswith(f"  http://127.0.0.1:{port}  down: http://127.0.0.1:{port}: ConnectError: ")


def test_a_router_on_a_port_that_is_taken_is_a_one_line_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("route", "--replica", "http://127.0.0.1:9", "--port", port)
    assert_one_line_error(result, f"cannot listen on 127.0.0.1, port {port}; is another server there?")


def test_a_cluster_without_ray_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.util import find_spec

    def without_ray(name: str) -> object:
        return None if name == "ray" else find_spec(name)

    monkeypatch.setattr("radixkv.cluster.requirements.find_spec", without_ray)
    assert_one_line_error(run("cluster", "up"), "a cluster needs ray[serve], which is not installed; run: pip install")


def test_another_ray_is_refused_by_the_versions_that_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("radixkv.cluster.requirements.find_spec", lambda name: object())
    monkeypatch.setattr("radixkv.cluster.requirements.version", lambda name: "2.61.0")
    assert_one_line_error(run("cluster", "up"), "radixkv.cluster works with ray 2.60.*; got 2.61.0; run: pip install")

    def unknown(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("radixkv.cluster.requirements.version", unknown)
    assert_one_line_error(run("cluster", "up"), "works with ray 2.60.*; got one without metadata; run: pip install")


def test_the_cluster_can_be_imported_without_what_is_optional() -> None:
    code = (
        "import sys, radixkv.cluster, radixkv.cli.route, radixkv.cli.cluster, radixkv.cluster.requirements\n"
        "heavy = {'ray', 'zmq', 'msgpack', 'fastapi', 'starlette', 'httpx2', 'torch', 'transformers'}\n"
        "loaded = heavy & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_cluster_config_is_checked() -> None:
    with pytest.raises(ConfigError, match="target_ongoing_requests must be"):
        ClusterConfig(target_ongoing_requests=0)


# ----------------------------------------------------------------------------------------- `cluster up` and a small Ray


class SmallRay:
    """What `cluster up` asks of Ray and of Serve, and in which order; `serve.run` does what a test says."""

    def __init__(self, on_run: Callable[[], object]) -> None:
        self.told: list[tuple[str, dict[str, Any]]] = []
        self._on_run = on_run
        self.config = SimpleNamespace(HTTPOptions=lambda **options: options)
        self.serve = SimpleNamespace(
            config=self.config, start=self._notes("start"), run=self._run, shutdown=self._notes("serve ends")
        )
        self.init, self.shutdown = self._notes("init"), self._notes("ray ends")

    def _notes(self, name: str) -> Callable[..., None]:
        return lambda **options: self.told.append((name, options))

    def _run(self, application: object, **options: Any) -> None:
        self.told.append(("run", {"application": application, **options}))
        self._on_run()


@pytest.fixture
def up_with(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[Any, SmallRay]]]:
    """Runs `cluster up`, with that small Ray in place of the package, and an application that names its settings."""

    def run_up(*arguments: object, on_run: Callable[[], object]) -> tuple[Any, SmallRay]:
        ray = SmallRay(on_run)
        modules = {"ray": ray, "ray.serve": ray.serve, "ray.serve.config": ray.config}
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr("radixkv.cluster.requirements.check_ray_installed", lambda: None)
        monkeypatch.setattr("radixkv.cluster.serve_app.build", lambda settings, is_local: (settings, is_local))
        return run("cluster", "up", *arguments), ray

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield run_up
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("ends_it", [signal.SIGINT, signal.SIGTERM])
def test_a_cluster_runs_until_a_signal_and_takes_its_ray_along(
    up_with: Callable[..., tuple[Any, SmallRay]], ends_it: signal.Signals
) -> None:
    flags = ("--replicas", 2, "--max-replicas", 3, "--port", 8123, "--page-size", 8)
    result, ray = up_with(*flags, on_run=lambda: signal.raise_signal(ends_it))
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "radixkv serves demo at http://127.0.0.1:8123\n  replicas  2 to 3\n"
    assert [name for name, _ in ray.told] == ["init", "start", "run", "serve ends", "ray ends"]
    told = dict(ray.told)
    assert told["init"]["num_cpus"] >= 3, "room for all replicas that may come"
    assert told["init"]["_node_ip_address"] == "127.0.0.1"
    assert told["start"]["http_options"] == {"host": "127.0.0.1", "port": 8123}
    settings, is_local = told["run"]["application"]
    assert is_local
    assert (settings.model, settings.engine["page_size"]) == ("demo", 8)
    assert (settings.cluster["replicas"], settings.cluster["max_replicas"]) == (2, 3)


def test_a_ray_that_runs_already_is_joined(up_with: Callable[..., tuple[Any, SmallRay]]) -> None:
    flags = ("--ray-address", "ray:6379", "--host", "0.0.0.0", "--served-model-name", "small")
    result, ray = up_with(*flags, on_run=lambda: signal.raise_signal(signal.SIGTERM))
    assert result.stdout.startswith("radixkv serves small at http://0.0.0.0:8000\n  replicas  ")
    told = dict(ray.told)
    assert told["init"]["address"] == "ray:6379"
    assert "num_cpus" not in told["init"], "its machines are its own"
    assert not told["run"]["application"][1]


def test_a_cluster_that_does_not_start_says_why_and_leaves_nothing_behind(
    up_with: Callable[..., tuple[Any, SmallRay]],
) -> None:
    def fails() -> None:
        raise RuntimeError("no replica became healthy")

    result, ray = up_with(on_run=fails)
    assert_one_line_error(result, "the cluster does not start: no replica became healthy; the logs of Ray Serve say")
    assert [name for name, _ in ray.told][-2:] == ["serve ends", "ray ends"]
