"""Serves the same traffic in every layout: once under watch, for the bytes, and then in turn, for the time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

from rich.console import Console
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from radixkv import EngineConfig
from radixkv.hf import ChunkedCache
from radixkv.hf.chunk_buffer import round_up
from radixkv_bench.common import models
from radixkv_bench.common.errors import BenchError
from radixkv_bench.common.models import RandomModel
from radixkv_bench.common.progress import counting_bar
from radixkv_bench.layouts import kinds
from radixkv_bench.layouts import traffic as layout_traffic
from radixkv_bench.layouts.kinds import CHUNKED, CONTIGUOUS, LAYOUTS, PAGED, RADIX, STATIC, endless_requests
from radixkv_bench.layouts.memory import Memory, PageWatch, TensorWatch
from radixkv_bench.layouts.servers import Answers, CacheServer, EngineServer, Served, Server, serve
from radixkv_bench.layouts.traffic import Sizes, Traffic

MEGABYTE = 10**6


@dataclass(frozen=True)
class Settings:
    """How the traffic is served; checked when made."""

    rounds: int = 3
    page_size: int = 16
    chunk_tokens: int = 256
    static_tokens: int | None = None
    memory_mb: float = 64.0

    def __post_init__(self) -> None:
        if not 0 < self.memory_mb < float("inf"):
            raise BenchError(f"--memory-mb must be a number above 0, not {self.memory_mb}")


class Measured(NamedTuple):
    """One layout: its bytes, the requests that fit, its answers, and how long each round took."""

    memory: Memory
    fit: int
    answers: Answers
    total_s: list[float]


class Difference(NamedTuple):
    """The first request, in the order of sessions, that two layouts answered differently."""

    name: str
    other: str
    request: layout_traffic.Request
    position: int


class Job:
    """Traffic on a model, in all layouts."""

    def __init__(self, sizes: Sizes, settings: Settings, model: str | RandomModel) -> None:
        """Load the model and make the traffic. Raises: BenchError if a request is too long for one or the other."""
        encode = models.load_encode(model if isinstance(model, str) else "demo")
        self.traffic = layout_traffic.build(sizes, encode)
        self.settings = settings
        longest = self.traffic.longest_tokens
        self.static_tokens = settings.static_tokens or longest
        if self.static_tokens < longest:
            raise BenchError(f"--static-tokens {self.static_tokens} is less than the longest request, {longest} tokens")
        self._model = models.load(model) if isinstance(model, str) else models.build_random(model, longest)
        self._check_model(longest)
        self._growths = kinds.growths(self.static_tokens, settings.chunk_tokens)
        self._column_bytes = _column_bytes(self._model)
        self.token_bytes = sum(self._column_bytes)
        reserved = sizes.running * round_up(self.static_tokens, settings.page_size)
        self._config = EngineConfig(
            dtype="float32",
            device="cpu",
            page_size=settings.page_size,
            kv_cache_tokens=reserved,
            max_running_requests=sizes.running,
            max_batch_tokens=sizes.running * longest,  # so that every running request takes part in every batch
        )

    @property
    def pool_tokens(self) -> int:
        """What the page pools hold: as much as the preallocated caches of all that run."""
        assert self._config.kv_cache_tokens is not None
        return self._config.kv_cache_tokens

    def run(self, progress_console: Console) -> dict[str, Measured]:
        """Serve, under a progress bar that counts requests."""
        with counting_bar(progress_console) as progress:
            per_pass = len(self.traffic.asked)
            bar = progress.add_task("", total=(1 + self.settings.rounds) * len(LAYOUTS) * per_pass)

            def play(name: str, server: Server, what: str) -> Served:
                progress.update(bar, description=f"{what}: {name}")
                return serve(self.traffic, server, on_finish=lambda: progress.advance(bar))

            watched = {name: self._watched(name, play) for name in LAYOUTS}
            times = self._timed(play)
        return {
            name: Measured(memory, self.fit(name), answers, times[name]) for name, (memory, answers) in watched.items()
        }

    def fit(self, name: str) -> int:
        """How many requests of sessions like these fit in `memory_mb`, in the layout `name`."""
        sizes, page_size = self.traffic.sizes, self.settings.page_size
        requests, memory_bytes = endless_requests(self.traffic), int(self.settings.memory_mb * MEGABYTE)
        if name == PAGED:
            return kinds.paged_fit(requests, page_size, self.token_bytes, memory_bytes)
        if name == RADIX:
            return kinds.radix_fit(requests, sizes.system_tokens, page_size, self.token_bytes, memory_bytes)
        return kinds.contiguous_fit(self._growths[name], requests, self._column_bytes, memory_bytes)

    def _watched(self, name: str, play: Callable[[str, Server, str], Served]) -> tuple[Memory, Answers]:
        """Serve once and look at the bytes after each step; this compiles and allocates what is needed once, too."""
        system_tokens = self.traffic.sizes.system_tokens
        if name in self._growths:
            tensors = TensorWatch(system_tokens, self._growths[name].moved_at_once)
            served = play(name, self._cache_server(name, tensors), "bytes")
            return tensors.memory(), served.answers
        pages = PageWatch(system_tokens, self.token_bytes)
        server = self._engine_server(name, PageWatch.BACKEND)
        pages.watch(server.engine.cache)
        served = play(name, server, "bytes")
        return pages.memory(), served.answers

    def _timed(self, play: Callable[[str, Server, str], Served]) -> dict[str, list[float]]:
        """Seconds of each round; every second round goes through the layouts backwards."""
        times: dict[str, list[float]] = {name: [] for name in LAYOUTS}
        engines = {name: self._engine_server(name, "auto") for name in (PAGED, RADIX)}
        for number in range(self.settings.rounds):
            for name in LAYOUTS if number % 2 == 0 else reversed(LAYOUTS):
                if name in engines:
                    engines[name].engine.reset_cache()
                server = engines[name] if name in engines else self._cache_server(name, None)
                times[name].append(play(name, server, f"round {number + 1} of {self.settings.rounds}").total_s)
        return times

    def _cache_server(self, name: str, watch: TensorWatch | None) -> CacheServer:
        config, static_tokens, chunk_tokens = self._model.config, self.static_tokens, self.settings.chunk_tokens
        makers: dict[str, Callable[[], Any]] = {
            CONTIGUOUS: lambda: DynamicCache(config=config),
            STATIC: lambda: StaticCache(config=config, max_cache_len=static_tokens),
            CHUNKED: lambda: ChunkedCache(config, chunk_tokens=chunk_tokens),
        }
        return CacheServer(self._model, makers[name], watch)

    def _engine_server(self, name: str, backend: str) -> EngineServer:
        settings = {field: getattr(self._config, field) for field in self._config.__slots__}
        settings.update(prefix_cache=name == RADIX, attention_backend=backend)
        return EngineServer(self._model, EngineConfig(**settings))

    def _check_model(self, longest: int) -> None:
        limit, vocab_size = models.context_tokens(self._model), self._model.config.get_text_config().vocab_size
        if limit is not None and self.static_tokens > limit:
            raise BenchError(
                f"a cache of {self.static_tokens} tokens is more than the model's context of {limit}; make the "
                "sessions shorter, or --static-tokens smaller"
            )
        largest = max(self.traffic.system + tuple(token for asked in self.traffic.asked.values() for token in asked))
        if largest >= vocab_size:
            raise BenchError(f"the prompts hold the id {largest}, but the model knows only ids below {vocab_size}")
        layers = DynamicCache(config=self._model.config).layers
        if any(type(layer) is not DynamicLayer for layer in layers):
            raise BenchError("layers that see only a window keep less than all tokens; take a model without them")


def _column_bytes(model: Any) -> list[int]:
    """What a token costs in each tensor of a request: K and V of each layer."""
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size: int = config.num_key_value_heads * head_dim * model.dtype.itemsize
    num_layers: int = config.num_hidden_layers
    return [size] * (2 * num_layers)


def differences(measured: dict[str, Measured]) -> Iterator[Difference]:
    """Where layouts answer otherwise than the first one: the first request and token of each."""
    (reference, expected), *others = measured.items()
    for name, found in others:
        for request, answer in sorted(expected.answers.items()):
            other = found.answers[request]
            if answer != other:
                position = next(i for i, (a, b) in enumerate(zip(answer, other, strict=True)) if a != b)
                yield Difference(reference, name, request, position)
                break


def output_tokens_per_s(measured: Measured, traffic: Traffic) -> float:
    """Answered tokens a second: the median round."""
    return traffic.total_output_tokens / median(measured.total_s)
