"""Ray Serve starts and ends replicas: those that join are warm, those that leave finish, and the page shows them."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any

import httpx2 as httpx
import pytest

from radixkv_bench.common.redis_server import NO_SERVER, SERVER, running_redis
from radixkv_bench.common.server_processes import free_port

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(find_spec("ray") is None, reason="needs ray: pip install 'radixkv[cluster]'"),
    pytest.mark.filterwarnings("ignore"),  # Ray's own, in this process
]
PROMPT = "First Citizen: Before we proceed any further, hear me speak. All: Speak, speak. " * 4
ENDLESS_S = 300.0


class Scaled:
    """An application under Ray Serve, and how many replicas it has."""

    def __init__(self, address: str, scale: Callable[[int], object], states: Callable[[], dict[str, int]]) -> None:
        """Args: states: how many replicas are in each of Serve's states."""
        self.address = address
        self._scale, self._states = scale, states

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.address, timeout=ENDLESS_S, trust_env=False)

    async def names(self, client: httpx.AsyncClient) -> list[str]:
        """Of the replicas that are up."""
        states: dict[str, str] = (await client.get("/health")).json()["replicas"]
        return [name for name, state in states.items() if state == "up"]

    async def scale(self, client: httpx.AsyncClient, number: int) -> list[str]:
        """Have Serve run `number` replicas, and wait until the router knows of no others. Returns: their names."""
        await asyncio.to_thread(self._scale, number)
        while len(names := await self.names(client)) != number:
            await asyncio.sleep(0.05)
        return names

    async def states(self) -> dict[str, int]:
        """How many replicas are in each of Serve's states."""
        return await asyncio.to_thread(self._states)


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scaled]:
    """Up to two replicas, above one Redis if there is one.

    Serve's controller is told how many as by an autoscaler, but without the delays of Serve's own.
    """
    import ray
    from ray import serve
    from ray.serve._private.common import DeploymentID
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
    from ray.serve.config import HTTPOptions

    from radixkv.cli.cluster import _join_ray
    from radixkv.cluster.serve_app import ClusterSettings, build
    from radixkv.config import ClusterConfig, ServerConfig

    port = free_port()
    engine: dict[str, Any] = {"dtype": "float32", "attention_backend": "torch", "kv_cache_tokens": 16384}
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        if SERVER is not None:
            engine["shared_cache"] = stack.enter_context(running_redis(tmp_path_factory.mktemp("redis"))).url
        try:
            _join_ray(ray, None, ClusterConfig(replicas=2), ServerConfig(port=port))
            serve.start(proxy_location="HeadOnly", http_options=HTTPOptions(host="127.0.0.1", port=port))
            app = build(
                ClusterSettings(engine=engine, server={"port": port, "drain_s": ENDLESS_S}, cluster={"replicas": 1})
            )
            serve.run(app, name="radixkv", route_prefix="/", external_scaler_enabled=True)
            controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)

            def scale(number: int) -> None:
                ray.get(controller.update_deployment_replicas.remote(DeploymentID("replicas", "radixkv"), number))

            def states() -> dict[str, int]:
                found = serve.status().applications["radixkv"].deployments["replicas"].replica_states
                return {state: number for state, number in found.items() if number}

            yield Scaled(f"http://127.0.0.1:{port}", scale, states)
        finally:
            serve.shutdown()
            ray.shutdown()


async def complete(client: httpx.AsyncClient, replica: int, **fields: Any) -> dict[str, Any]:
    """What one replica answers to a prompt, whatever the router would choose."""
    body = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0, **fields}
    answer = await client.post(f"/replicas/{replica}/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.skipif(SERVER is None, reason=NO_SERVER)
def test_a_replica_that_joins_loads_what_the_others_computed(scaled: Scaled) -> None:
    async def main() -> None:
        async with scaled.client() as client:
            (first,) = await scaled.scale(client, 1)
            computed = await complete(client, 0)
            prompt_tokens = computed["usage"]["prompt_tokens"]
            assert computed["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
            while await written_pages(client) < prompt_tokens // 16:
                await asyncio.sleep(0.05)
            names = await scaled.scale(client, 2)
            (second,) = set(names) - {first}
            loaded = await complete(client, names.index(second))
            assert loaded["choices"] == computed["choices"]
            cached_by = loaded["usage"]["prompt_tokens_details"]["cached_by"]
            assert cached_by["pool"] == 0
            assert cached_by["shared"] >= prompt_tokens // 16 * 16 - 1
            stats = (await client.get("/v1/cache/stats")).json()["replicas"]
            assert stats[second]["tiers"][0]["loaded_tokens"] == cached_by["shared"]
            assert stats[first]["tiers"][0]["loaded_tokens"] == 0

    asyncio.run(main())


async def written_pages(client: httpx.AsyncClient) -> float:
    """How many pages all replicas have handed down."""
    metrics = (await client.get("/metrics")).text
    found = re.findall(r"^radixkv_tier_pages_total\{.*written.*\} (\S+)$", metrics, re.MULTILINE)
    return sum(map(float, found))


def test_the_page_shows_the_replicas_of_ray_serve(scaled: Scaled) -> None:
    async def main() -> None:
        async with scaled.client() as client:
            names = await scaled.scale(client, 2)
            assert "route/replicas.js" in (await client.get("/")).text
            rows = (await client.get("/route/replicas")).json()["replicas"]
            assert [(row["number"], row["replica"], row["state"], row["queued_s"]) for row in rows] == [
                (number, name, "up", 0) for number, name in enumerate(names)
            ]
            for number, name in enumerate(names):
                for path in ("", "live/page.js", "live/page.css"):
                    answer = await client.get(f"/replicas/{number}/{path}")
                    assert "frame-ancestors 'self'" in answer.headers["content-security-policy"]
                async with client.stream("GET", f"/replicas/{number}/v1/cache/live") as feed:
                    assert (await anext(feed.aiter_lines())).startswith("event: ")
                    assert feed.headers["x-radixkv-replica"] == name

    asyncio.run(main())


def test_a_replica_that_leaves_finishes_its_streams_and_no_request_is_lost(scaled: Scaled) -> None:
    body = {"prompt": PROMPT, "max_tokens": 600, "temperature": 0, "ignore_eos": True, "stream": True}
    num_streaming, has_left = 0, False

    async def stream(client: httpx.AsyncClient, replica: int) -> str:
        """The text of a stream that ends after one replica has left."""
        nonlocal num_streaming
        text, num_pieces, is_whole = "", 0, False
        async with client.stream("POST", f"/replicas/{replica}/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                is_whole = is_whole or line == "data: [DONE]"
                if line.startswith("data: {"):
                    data = json.loads(line[6:])
                    assert "error" not in data, data
                    num_streaming, num_pieces = num_streaming + (num_pieces == 0), num_pieces + 1
                    text += "".join(choice["text"] for choice in data["choices"])
        assert is_whole
        assert has_left, "it ends too soon to show anything"
        return text

    async def ask_on(client: httpx.AsyncClient, name: int) -> int:
        """Ask until one has left, and once more. Returns: how many requests were answered."""
        number, is_last = 0, False
        while not is_last:
            is_last = has_left
            asked = {"prompt": f"{name}, {number}: {PROMPT[:40]}", "max_tokens": 2}
            answer = await client.post("/v1/completions", json=asked)
            assert answer.status_code == 200, answer.text
            number += 1
        return number

    async def main() -> None:
        nonlocal has_left
        async with scaled.client() as client:
            await scaled.scale(client, 2)
            streams = [asyncio.create_task(stream(client, replica)) for replica in range(2)]
            while num_streaming < 2:
                await asyncio.sleep(0.01)
            asking = [asyncio.create_task(ask_on(client, name)) for name in range(4)]
            (stays,) = await scaled.scale(client, 1)
            has_left = True
            assert await scaled.states() == {"RUNNING": 1, "STOPPING": 1}
            assert all(number > 1 for number in await asyncio.gather(*asking))
            one, other = await asyncio.gather(*streams)
            assert one == other
            while await scaled.states() != {"RUNNING": 1}:
                await asyncio.sleep(0.05)
            assert await scaled.names(client) == [stays]

    asyncio.run(main())
