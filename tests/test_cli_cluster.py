"""`radixkv route` and `radixkv cluster up`: flags from the settings, and mistakes told in one line."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import get_args

import pytest
import typer

from cli_runs import assert_one_line_error, run
from radixkv.cli.cluster import CLUSTER_SETTINGS, ROUTED_SERVER_SETTINGS, up
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
