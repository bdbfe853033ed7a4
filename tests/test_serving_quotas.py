"""Shares of the pool that keys bring their tenants."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import openai
import pytest

from http_server import Running, new_demo_engine, running
from radixkv import CacheQuota
from radixkv.config import ServerConfig
from radixkv.errors import ConfigError
from radixkv.serving.service import Service
from radixkv.serving.tenants import KeyRing

POOL_TOKENS = 1024
SHARES = {"steady": "pool_share = 0.25", "steadier": "pool_share = 0.125\nshares_with = 'steady'", "flood": ""}


def keys(shares: dict[str, str]) -> str:
    """A file of keys; that of NAME is `key-NAME`."""
    tables = [
        f"[[key]]\nname = '{name}'\nsha256 = '{sha256(f'key-{name}'.encode()).hexdigest()}'\n{more}\n"
        for name, more in shares.items()
    ]
    return "\n".join(tables)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    file.write_text(keys({**SHARES, "boss": "admin = true"}))
    engine = new_demo_engine(kv_cache_tokens=POOL_TOKENS)
    with running(engine, api_keys=str(file)) as server:
        yield server


def ask(server: Running, name: str, number: int, num_tokens: int) -> int:
    """Ask as a tenant, for a prompt that shares nothing with one of another number; returns what was cached of it."""
    prompt = [number % 200 + 5, number // 200 + 5] * (num_tokens // 2)
    answer = server.openai(f"key-{name}").completions.create(model="demo", prompt=prompt, max_tokens=1)
    return int(answer.usage.prompt_tokens_details.cached_tokens)


def test_a_tenants_prefix_survives_the_flood_of_another_one(server: Running) -> None:
    assert ask(server, "steady", 1, 226) == 0
    for number in range(2, 8):
        ask(server, "flood", number, 300)
    assert ask(server, "flood", 2, 300) == 0, "the flood evicts its own"
    assert ask(server, "steady", 1, 226) == 225
    assert ask(server, "steadier", 1, 226) == 225, "whoever shares a namespace shares its share"


def test_who_could_never_be_served_beside_the_shares_of_others_is_told_so(server: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="room for beside what quotas guarantee to others") as caught:
        ask(server, "flood", 1, POOL_TOKENS * 5 // 8)
    assert caught.value.code == "context_length_exceeded"
    assert ask(server, "steady", 99, POOL_TOKENS * 5 // 8) == 0


def test_an_administrator_sees_what_each_namespace_holds(server: Running) -> None:
    ask(server, "steady", 1, 64)
    http = server.http("key-boss")
    steady, others = http.get("/v1/cache/stats").json()["namespaces"]
    assert (steady["namespace"], steady["guaranteed_tokens"]) == ("steady", POOL_TOKENS * 3 // 8)
    assert (others["namespace"], others["guaranteed_tokens"]) == (None, 0)
    assert steady["used_tokens"] >= 64
    lines = http.get("/metrics").text.splitlines()
    for state in ("guaranteed", "used", "evictable"):
        name = f'radixkv_namespace_tokens{{namespace="steady",state="{state}"}}'
        assert f"{name} {float(steady[f'{state}_tokens'])}" in lines
    assert 'radixkv_namespace_tokens{namespace="",state="guaranteed"} 0.0' in lines
    assert server.http("key-steady").get("/v1/cache/stats").status_code == 403


def test_keys_of_one_namespace_add_up_their_shares(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(keys(SHARES))
    assert KeyRing.from_file(file).quotas(4096, 0, 0) == {"steady": CacheQuota(pool_tokens=1536)}


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        (
            {"a": "pool_share = 0.6", "b": "pool_share = 0.5"},
            "must add up to at most 1; they add up to 1.1",
        ),
        ({"a": "pool_share = 1.5"}, r"key 1: pool_share must be a number in \[0, 1\], not 1.5"),
        ({"a": "disk_share = 0.6", "b": "disk_share = 0.5"}, "the disk_share of all keys must add up to at most 1"),
        ({"a": "host_share = 1", "b": "host_share = 0.5"}, "the host_share of all keys must add up to at most 1"),
        ({"a": "pool_share = 'half'"}, "pool_share must be a number"),
    ],
)
def test_shares_that_are_wrong_are_refused(tmp_path: Path, shares: dict[str, str], message: str) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(keys(shares))
    with pytest.raises(ConfigError, match=message):
        KeyRing.from_file(file)


def test_shares_that_just_fit_are_accepted(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(keys({str(number): "pool_share = 0.1" for number in range(10)}))
    assert sum(quota.pool_tokens for quota in KeyRing.from_file(file).quotas(1009, 0, 0).values()) <= 1009


def test_shares_of_a_disk_need_one(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(keys({"a": "disk_share = 0.5"}))
    assert KeyRing.from_file(file).quotas(1, 1000, 0) == {"a": CacheQuota(disk_bytes=500)}

    async def start() -> None:
        async with new_demo_engine() as engine:
            with pytest.raises(ConfigError, match="disk_share needs an engine with disk_cache"):
                await Service(engine, "demo", ServerConfig(api_keys=str(file))).start()

    asyncio.run(start())


def test_shares_of_host_memory_need_some(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(keys({"a": "host_share = 0.5"}))
    assert KeyRing.from_file(file).quotas(1, 0, 1000) == {"a": CacheQuota(host_bytes=500)}

    async def start() -> None:
        async with new_demo_engine() as engine:
            with pytest.raises(ConfigError, match="host_share needs an engine with host_cache_gb"):
                await Service(engine, "demo", ServerConfig(api_keys=str(file))).start()

    asyncio.run(start())
