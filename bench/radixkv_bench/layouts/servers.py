"""Those who serve the traffic: transformers' caches one request at a time, and radixkv's engine in batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from radixkv import Engine, EngineConfig, Progress, SamplingParams
from radixkv_bench.common.models import twin
from radixkv_bench.layouts.memory import TensorWatch
from radixkv_bench.layouts.traffic import Request, Traffic

Answers = dict[Request, list[int]]


class Server(Protocol):
    """Serves requests that come and go."""

    @property
    def num_running(self) -> int:
        """Requests that were admitted and not handed back yet."""

    def admit(self, request: Request, prompt: list[int], output_tokens: int) -> None:
        """Begin to serve a request."""

    def step(self) -> Answers:
        """Go on by a token. Returns: the answers that are complete."""


class Served(NamedTuple):
    """What came of it."""

    answers: Answers
    total_s: float


def serve(traffic: Traffic, server: Server, on_finish: Callable[[], None]) -> Served:
    """Serve all requests greedily, as many at a time as the traffic says, the next one as soon as one has ended."""
    line, answers = traffic.line(), Answers()
    started_s = time.perf_counter()
    while True:
        while server.num_running < traffic.sizes.running and (request := line.pop()) is not None:
            server.admit(request, traffic.prompt(request, answers), traffic.output_tokens(request))
        if not server.num_running:
            return Served(answers, time.perf_counter() - started_s)
        for request, answer in server.step().items():
            answers[request] = answer
            line.answered(request)
            on_finish()


@dataclass
class _Running:
    """A request with a cache of its own: the tokens to feed next, and what it has answered."""

    cache: Any
    fed: list[int]
    output_tokens: int
    cached_tokens: int = 0
    answer: list[int] = field(default_factory=list)


class CacheServer:
    """A model of transformers, unchanged, and a cache of its own for each request.

    The tensors of a cache are one batch's. Requests of different lengths that come and go would have to be padded into
    one, so each is computed alone, a token each in turn.
    """

    def __init__(self, model: Any, make_cache: Callable[[], Any], watch: TensorWatch | None = None) -> None:
        self._model, self._make_cache, self._watch = model, make_cache, watch
        self._running: dict[Request, _Running] = {}

    @property
    def num_running(self) -> int:
        return len(self._running)

    def admit(self, request: Request, prompt: list[int], output_tokens: int) -> None:
        self._running[request] = _Running(self._make_cache(), prompt, output_tokens)

    def step(self) -> Answers:
        for request, running in self._running.items():
            self._forward(running)
            if self._watch is not None:
                self._watch.forwarded(request, running.cache, running.cached_tokens)
        if self._watch is not None:
            self._watch.stepped()
        done = {request: r.answer for request, r in self._running.items() if len(r.answer) == r.output_tokens}
        for request in done:
            del self._running[request]
            if self._watch is not None:
                self._watch.finished(request)
        return done

    @torch.inference_mode()
    def _forward(self, running: _Running) -> None:
        ids = torch.tensor([running.fed])
        logits = self._model(input_ids=ids, past_key_values=running.cache, use_cache=True, logits_to_keep=1).logits
        running.cached_tokens += len(running.fed)
        running.fed = [int(logits[0, -1].argmax())]
        running.answer += running.fed


@dataclass
class _Stream:
    """An open stream of the engine. It has its next token after each step, fetched or not."""

    chunks: Generator[Progress]
    due_at_step: int
    answer: list[int] = field(default_factory=list)
    ended: bool = False

    def fetch(self) -> None:
        """Take what is there, after a step if it has not ended."""
        chunk = next(self.chunks)
        self.answer += chunk.token_ids
        self.ended = chunk.output is not None


class EngineServer:
    """radixkv's engine: every step computes a token of each running request, in one batch."""

    def __init__(self, model: Any, config: EngineConfig) -> None:
        self.engine = Engine(twin(model), None, config)
        self._steps = 0
        self._streams: dict[Request, _Stream] = {}

    @property
    def num_running(self) -> int:
        return len(self._streams)

    def admit(self, request: Request, prompt: list[int], output_tokens: int) -> None:
        params = SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
        # The first token comes with the first fetch, and one more with each step after it.
        stream = _Stream(self.engine.stream(prompt, params), due_at_step=self._steps + output_tokens)
        self._streams[request] = stream
        self._advance(stream)

    def step(self) -> Answers:
        if not any(self._is_due(stream) for stream in self._streams.values()):
            self._advance(next(iter(self._streams.values())))
        for stream in filter(self._is_due, self._streams.values()):
            while not stream.ended:
                self._advance(stream)
        done = {request: stream.answer for request, stream in self._streams.items() if stream.ended}
        for request in done:
            del self._streams[request]
        return done

    def _advance(self, stream: _Stream) -> None:
        stream.fetch()
        self._steps += not stream.ended  # the last fetch gives what is there

    def _is_due(self, stream: _Stream) -> bool:
        return stream.ended or self._steps >= stream.due_at_step
