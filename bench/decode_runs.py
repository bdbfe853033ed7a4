"""Prefill and decode of whole models under a clock: radixkv, and Hugging Face's generate."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

import radixkv
from device_timing import interleave
from models import twin
from probes import Probes

OURS, HF = "radixkv", "hf-generate"
PROBE_ROUNDS = 3


class Timing(NamedTuple):
    """One batch: seconds until all had their first token, and from there to their last."""

    prefill_s: float
    decode_s: float


class Runner(Protocol):
    """Answers a batch of prompts of one length greedily, from nothing."""

    name: str

    def run(self, prompts: list[list[int]], output_tokens: int) -> Timing:
        """Answer each with exactly `output_tokens`, two or more."""


class RadixKVRunner:
    """radixkv's engine; it computes the prompts of a batch in one step, as `generate` does."""

    name = OURS

    def __init__(self, model: Any, max_batch: int, prompt_tokens: int, output_tokens: int, backend: str) -> None:
        page_size = 16
        pages = -(-(prompt_tokens + output_tokens) // page_size) + 1
        config = radixkv.EngineConfig(
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(model.device),
            page_size=page_size,
            kv_cache_tokens=(max_batch + 1) * pages * page_size,
            max_batch_tokens=max(2048, max_batch * prompt_tokens),
            attention_backend=backend,
        )
        self.engine = radixkv.Engine(twin(model), None, config)

    def run(self, prompts: list[list[int]], output_tokens: int) -> Timing:
        self.engine.reset_cache()
        params = radixkv.SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
        metrics = [output.metrics for output in self.engine.generate(list(prompts), params)]
        prefill_s = max(times.ttft_s for times in metrics)
        return Timing(prefill_s, max(times.total_s for times in metrics) - prefill_s)


class _TokenClock:
    """A streamer for `generate` that notes when each step's tokens are known."""

    def __init__(self) -> None:
        self.at_s: list[float] = []

    def put(self, _ids: torch.Tensor) -> None:
        """`generate` hands over the prompts first, then each step's tokens."""
        self.at_s.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to flush."""


class GenerateRunner:
    """Hugging Face's `generate` on the unmodified model."""

    name = HF

    def __init__(self, model: Any) -> None:
        self._model = twin(model)

    def run(self, prompts: list[list[int]], output_tokens: int) -> Timing:
        ids = torch.tensor(prompts, device=self._model.device)  # [B, prompt tokens]
        clock = _TokenClock()
        started_s = time.perf_counter()
        with torch.inference_mode():
            self._model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=output_tokens, streamer=clock)
        assert len(clock.at_s) == 1 + output_tokens, "the prompts, then each token"
        return Timing(clock.at_s[1] - started_s, clock.at_s[-1] - clock.at_s[1])


@dataclass(frozen=True, slots=True)
class BatchTimes:
    """What one batch size took, round by round, and what the machine read a second meanwhile."""

    batch: int
    timings: dict[str, list[Timing]]
    read_gb_s: list[float]


def play(
    runners: Sequence[Runner],
    batch: int,
    prompt_tokens: int,
    output_tokens: int,
    *,
    vocab: int,
    rounds: int,
    probes: Probes,
    device: torch.device,
) -> Iterator[tuple[str, BatchTimes]]:
    """Let the runners take turns; yields whose turn comes, and what there is so far: at the end, everything.

    Every second round goes through them backwards. Prompts are random, and differ from round to round.
    """
    times = BatchTimes(batch, {runner.name: [] for runner in runners}, [])
    yield "warming up", times
    for runner in runners:
        runner.run(_prompts(-1, batch, min(16, prompt_tokens), vocab), 3)
    for number in range(rounds):
        prompts = _prompts(number, batch, prompt_tokens, vocab)
        for runner in runners if number % 2 == 0 else reversed(runners):
            yield runner.name, times
            times.timings[runner.name].append(runner.run(prompts, output_tokens))
        times.read_gb_s.append(probes.read_gb_s(interleave(probes.calls, PROBE_ROUNDS, device)))
    yield "done", times


def _prompts(number: int, batch: int, tokens: int, vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1000 + number)
    ids: list[list[int]] = torch.randint(3, vocab, (batch, tokens), generator=generator).tolist()
    return ids
