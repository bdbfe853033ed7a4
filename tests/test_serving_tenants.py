"""Keys and tenants: who may come in, and what they learn of each other."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import openai
import pytest

from http_server import Running, new_demo_engine, running
from radixkv.errors import ConfigError
from radixkv.serving.tenants import KeyRing

PROMPT = "ROMEO:\nBut, soft! what light through yonder window breaks?"
ASK = {"model": "demo", "prompt": PROMPT, "max_tokens": 4, "temperature": 0.0}
KEYS = """
[[key]]
sha256 = "{red}"
name = "red"
max_requests = 1
priority = 3

[[key]]
sha256 = "{blue}"
name = "blue"

[[key]]
sha256 = "{azure}"
name = "azure"
shares_with = "blue"

[[key]]
sha256 = "{boss}"
name = "boss"
admin = true
"""


def hashed(key: str) -> str:
    return sha256(key.encode()).hexdigest()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    names = ("red", "blue", "azure", "boss")
    file.write_text(KEYS.format(**{name: hashed(f"key-{name}") for name in names}))
    with running(new_demo_engine(), api_keys=str(file)) as server:
        yield server


@pytest.fixture(autouse=True)
def _empty(server: Running) -> Iterator[None]:
    yield
    server.check_idle()
    asyncio.run(server.engine.reset_cache())


def cached_tokens(server: Running, key: str, **fields: object) -> int:
    usage = server.openai(key).completions.create(**ASK, extra_body=fields).usage
    return int(usage.prompt_tokens_details.cached_tokens)


def test_without_a_key_nothing_but_the_probes_answers(server: Running) -> None:
    http = server.http()
    assert http.get("/health").status_code == 200
    assert http.get("/ready").status_code == 200
    for path in ("/v1/models", "/nothing", "/openapi.json", "/metrics"):
        answer = http.get(path)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
    assert http.post("/v1/completions", content=b"{not even JSON").status_code == 401
    with pytest.raises(openai.AuthenticationError):
        server.openai("key-green").models.list()
    assert server.http("key-red").get("/v1/models").status_code == 200


def test_tenants_share_no_prefix_unless_they_are_to(server: Running) -> None:
    assert cached_tokens(server, "key-red") == 0
    assert cached_tokens(server, "key-red") > 0
    assert cached_tokens(server, "key-blue") == 0, "another tenant's prompt is as if it had never been"
    assert cached_tokens(server, "key-azure") > 0, "it shares with blue"


def test_explain_tells_a_tenant_of_its_own_namespace_alone(server: Running) -> None:
    body = {"prompt": PROMPT.replace("yonder", "that")}
    before = server.http("key-blue").post("/v1/cache/explain", json=body).json()
    assert cached_tokens(server, "key-red") == 0
    assert server.http("key-red").post("/v1/cache/explain", json=body).json()["divergence"] is not None
    assert server.http("key-blue").post("/v1/cache/explain", json=body).json() == before
    assert server.http("key-boss").post("/v1/cache/explain", json=body).json() == before


def test_what_belongs_to_all_needs_an_administrators_key(server: Running) -> None:
    red, boss = server.http("key-red"), server.http("key-boss")
    for answer in (red.get("/v1/cache/stats"), red.post("/v1/cache/flush"), red.get("/metrics")):
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "admin_key_required"
    for answer in (boss.get("/v1/cache/stats"), boss.post("/v1/cache/flush"), boss.get("/metrics")):
        assert answer.status_code == 200


def test_a_response_belongs_to_its_tenant(server: Running) -> None:
    response = server.openai("key-red").responses.create(model="demo", input="Who?", max_output_tokens=2)
    assert server.openai("key-red").responses.retrieve(response.id).id == response.id
    with pytest.raises(openai.NotFoundError):
        server.openai("key-blue").responses.retrieve(response.id)
    with pytest.raises(openai.NotFoundError):
        server.openai("key-azure").responses.create(model="demo", input="?", previous_response_id=response.id)
    options = {"comparison_response_id": response.id}
    answer = server.openai("key-blue").responses.create(
        model="demo", input="Who?", max_output_tokens=2, prompt_cache_options=options
    )
    assert answer.prompt_cache_diagnostics.type == "comparison_response_not_found"


def test_a_salt_narrows_a_namespace_and_leads_into_no_other(server: Running) -> None:
    assert cached_tokens(server, "key-red") == 0
    assert cached_tokens(server, "key-red", cache_salt="s") == 0
    assert cached_tokens(server, "key-red", cache_salt="s") > 0
    for fields in ({"cache_salt": "s"}, {"cache_salt": "red"}, {"extra_key": "red"}):
        assert cached_tokens(server, "key-blue", **fields) == 0


def test_a_tenant_may_have_no_more_than_its_requests_at_once(server: Running) -> None:
    async def ask() -> None:
        async with server.async_openai("key-red") as red, server.async_openai("key-blue") as blue:
            stream = await red.completions.create(**{**ASK, "max_tokens": 3000}, stream=True)
            await anext(aiter(stream))
            with pytest.raises(openai.RateLimitError) as caught:
                await red.completions.create(**ASK)
            assert caught.value.code == "too_many_requests"
            assert "retry-after" in caught.value.response.headers
            await blue.completions.create(**ASK)
            await stream.close()
            while server.service.admission.num_inside:
                await asyncio.sleep(0)
            await red.completions.create(**ASK)

    asyncio.run(ask())


def test_one_key_opens_a_server_of_one_tenant() -> None:
    with running(new_demo_engine(), api_key="secret-ü") as server:
        assert server.http("secret").get("/v1/models").status_code == 401
        http = server.http()
        assert http.get("/v1/models", headers={b"Authorization": "Bearer secret-ü".encode()}).status_code == 200
        assert http.get("/v1/models", headers={b"x-api-key": "secret-ü".encode()}).status_code == 200


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"must hold tables \[\[key\]\]"),
        ("key = 3", r"must hold tables \[\[key\]\]"),
        ("key = ['a']", "key 1: a key must be a table, not 'a'"),
        ("[[key]]\nname = 'a'", "key 1: sha256 must be text, not None"),
        ("[[key]]\nname = 'a'\nsha256 = 'abc'", "sha256 must be the 64 hex digits"),
        (f"[[key]]\nname = ''\nsha256 = '{hashed('a')}'", "name must not be empty"),
        (f"[[key]]\nname = 'a'\nsha256 = '{hashed('a')}'\nmax_requests = 0", "max_requests must be an integer of at"),
        (f"[[key]]\nname = 'a'\nsha256 = '{hashed('a')}'\nshare = 1", "unknown field 'share'; the fields are sha256"),
        (f"[[key]]\nname = 'a'\nsha256 = '{hashed('a')}'\nadmin = 1", "admin must be True or False, not 1"),
        (f"[[key]]\nname='a'\nsha256='{hashed('a')}'\n" * 2, "two keys have the same sha256"),
        ("[[key", "must be TOML"),
    ],
)
def test_a_file_of_keys_with_a_mistake_is_refused(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        KeyRing.from_file(file)


def test_a_file_of_keys_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        KeyRing.from_file(tmp_path / "keys.toml")
