"""Fixtures that several test files share, and how tests are set up in the processes that run them."""

from __future__ import annotations

import asyncio
import atexit
import gc
import logging
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when transformers imports Triton: its kernels run on the CPU


from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from cli_runs import small_engine
from oracles import GreedyOracle, oracle_of
from radixkv import Engine, EngineConfig, PrefixCache
from radixkv.cli.common import EngineOptions
from radixkv.engine.assembly import assemble
from runners import Around, TamperedRunner
from strategies import PAGE, leak_checked
from tiny_models import served_model

if TYPE_CHECKING:
    from http_server import Running

# Hypothesis tests that do not say how many examples they take. `scripts/test --hypothesis-profile long` looks further.
settings.register_profile("brief", max_examples=25, deadline=None, derandomize=True)
settings.register_profile("long", max_examples=1000, deadline=None)
settings.load_profile("brief")


def pytest_collection_finish() -> None:
    """Take what is loaded out of the garbage collector's sight: a full collection takes a second with it.

    The interpreter sees it again at its end, when it clears everything away. And let every logger hand its records on:
    to each of the sixty that do not (most are torch's) pytest hangs its handlers six times a test.
    """
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.propagate = True
    gc.freeze()
    gc.enable()
    atexit.register(gc.unfreeze)


@pytest.fixture(scope="module", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Collect what a file's tests left, so that no other file pays for it, and each is told of what it forgot."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def oracle() -> GreedyOracle:
    """The unmodified twin of the model in `make_engine`."""
    return oracle_of("llama")


@pytest.fixture
def make_engine() -> Callable[..., Engine]:
    """Makes engines of the tiny Llama; keywords are settings. Every test ends with a leak check of all of them.

    `around` is called in place of each step of the runner; `parts` are exchanged for those that were assembled.
    """
    engines: list[Engine] = []

    def make(*, around: Around | None = None, parts: dict[str, object] | None = None, **settings: object) -> Engine:
        defaults = {"page_size": 4, "kv_cache_tokens": 1024}
        assembled = assemble(served_model("llama"), None, EngineConfig(**{**defaults, **settings}))
        if around is not None:
            assembled = replace(assembled, runner=TamperedRunner(assembled.runner, around))
        engines.append(Engine.from_parts(replace(assembled, **(parts or {}))))
        return engines[-1]

    yield make
    for engine in engines:
        engine.check_invariants()
        stats = engine.stats()
        assert (stats.running, stats.waiting) == (0, 0)
        engine.close()
        stats = engine.stats()
        assert stats.free_pages == stats.cache.num_pages, f"pages leaked: {stats}"


@pytest.fixture(scope="session")
def demo_engine() -> Engine:
    """The demo model, with a tokenizer and a chat template. Shared: tests must not count on what it has cached."""
    return Engine.from_pretrained("demo", kv_cache_tokens=8192)


@pytest.fixture
def cache() -> Iterator[PrefixCache]:
    """A cache of 8 pages, checked for leaks at the end."""
    with leak_checked(PrefixCache(num_pages=8, page_size=PAGE)) as cache:
        yield cache


@pytest.fixture(scope="session")
def engine() -> Engine:
    """The demo model behind the command line's tests; nothing to compile."""
    return small_engine()


@pytest.fixture
def loaded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """What the command line loads: the same engine each time, with nothing in its cache."""
    engine.reset_cache()
    monkeypatch.setattr(EngineOptions, "load", lambda _: engine)
    return engine


@pytest.fixture(scope="module")
def running_server() -> Iterator[Running]:
    """The demo model behind HTTP, with the settings that a server has by default."""
    from http_server import running  # the packages that it takes are loaded where they are needed

    with running() as server:
        yield server


@pytest.fixture
def server(running_server: Running) -> Iterator[Running]:
    """`running_server` with an empty cache; when the test has ended it has nothing to do, and holds no page."""
    asyncio.run(running_server.engine.reset_cache())
    yield running_server
    running_server.check_idle()
