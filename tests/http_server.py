"""A server on a free port of this machine, in a thread of the test's process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import anthropic
import httpx2 as httpx
import openai

from radixkv import AsyncEngine, EngineConfig, EngineStats
from radixkv.config import ServerConfig
from radixkv.models.loader import LoadedModel, load
from radixkv.serving.server import Server
from radixkv.serving.service import Service

SMALL: dict[str, Any] = {
    "kv_cache_tokens": 4096,
    "attention_backend": "torch",
    "dtype": "float32",
}  # nothing to compile


# Tests speak plain HTTP, so their clients verify nothing: to read the system's certificates takes each 60 ms.


def new_openai(address: str, key: str = "none", **options: Any) -> openai.OpenAI:
    """OpenAI's client of a server."""
    http = openai.DefaultHttpxClient(verify=False)
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, http_client=http, **options)


def new_anthropic(address: str, key: str = "none") -> anthropic.Anthropic:
    """Anthropic's client of a server."""
    http = anthropic.DefaultHttpxClient(verify=False)
    return anthropic.Anthropic(base_url=address, api_key=key, max_retries=0, http_client=http)


def new_http(address: str, **options: Any) -> httpx.Client:
    """A client of a server."""
    return httpx.Client(base_url=address, timeout=60, verify=False, **options)


class Running:
    """A server that runs, and ways to speak to it."""

    def __init__(self, service: Service, server: Server) -> None:
        self.service, self.server = service, server
        self.address = server.address
        self._clients = ExitStack()

    @property
    def engine(self) -> AsyncEngine:
        return self.service.engine

    def openai(self, key: str = "none", **options: Any) -> Any:  # typed, each call would need its own overload
        return self._clients.enter_context(new_openai(self.address, key, **options))

    def async_openai(self, key: str = "none") -> Any:
        http = openai.DefaultAsyncHttpxClient(verify=False)
        return openai.AsyncOpenAI(base_url=f"{self.address}/v1", api_key=key, max_retries=0, http_client=http)

    def anthropic(self, key: str = "none") -> Any:
        return self._clients.enter_context(new_anthropic(self.address, key))

    def async_anthropic(self, key: str = "none") -> Any:
        http = anthropic.DefaultAsyncHttpxClient(verify=False)
        return anthropic.AsyncAnthropic(base_url=self.address, api_key=key, max_retries=0, http_client=http)

    def http(self, key: str | None = None) -> httpx.Client:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return self._clients.enter_context(new_http(self.address, headers=headers))

    def close_clients(self) -> None:
        """Close all but the async ones."""
        self._clients.close()

    def stats(self) -> EngineStats:
        return asyncio.run(self.engine.stats())

    def wait_until(self, holds: Callable[[EngineStats], bool]) -> EngineStats:
        """The engine's statistics once `holds` is true of them."""
        while not holds(stats := self.stats()):
            pass
        return stats

    def check_idle(self) -> None:
        """Prove that nothing runs, and that every page can be had."""

        async def check() -> None:
            await self.engine.check_invariants()
            stats = await self.engine.stats()
            assert (stats.running, stats.waiting, stats.cache.num_leases, stats.cache.leased_pages) == (0, 0, 0, 0)
            assert stats.cache.protected_tokens == 0
            for _ in range(1000):  # a client has its answer a moment before the server has left the call
                if self.service.admission.num_inside == 0:
                    break
                await self.engine.stats()

        asyncio.run(check())
        assert self.service.admission.num_inside == 0


@cache
def _demo() -> LoadedModel:
    return load("demo", dtype="float32")


def new_demo_engine(**settings: Any) -> AsyncEngine:
    """An engine of the demo model with the settings `SMALL` and others; all of a process share one model."""
    options = {"max_waiting": settings.pop("max_waiting")} if "max_waiting" in settings else {}
    config = EngineConfig.from_keywords({**SMALL, **settings})
    return AsyncEngine(_demo().model, _demo().tokenizer, config, **options)


@contextmanager
def running(engine: AsyncEngine | None = None, **settings: Any) -> Iterator[Running]:
    """A server for `engine`, by default of the demo model; `settings` are those of `ServerConfig`."""
    if engine is None:
        engine = new_demo_engine()
    service = Service(engine, "demo", ServerConfig(**{"port": 0, **settings}))
    started = threading.Event()
    server = Server(service, on_start=lambda address: started.set())
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert started.wait(60), "the server does not start"
        running = Running(service, server)
        yield running
        running.close_clients()
    finally:
        server.drain()
        thread.join()


def run_all(*work: Awaitable[Any]) -> list[Any]:
    """The results of `work`, done at one time."""

    async def main() -> list[Any]:
        return list(await asyncio.gather(*work))

    return asyncio.run(main())
