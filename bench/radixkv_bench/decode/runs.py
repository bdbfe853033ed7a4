"""Prefill and decode of whole models under a clock: radixkv, and Hugging Face's generate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

import radixkv
from radixkv_bench.common.device_timing import interleave
from radixkv_bench.common.probes import Probes
from radixkv_bench.common.runners import GenerateRunner, RadixKVRunner, Runner

OURS, HF = "radixkv", "hf-generate"
PROBE_ROUNDS = 3


class Timing(NamedTuple):
    """One batch: seconds until all had their first token, and from there to their last."""

    prefill_s: float
    decode_s: float


def make_runners(
    model: Any, max_batch: int, prompt_tokens: int, output_tokens: int, backend: str
) -> tuple[RadixKVRunner, GenerateRunner]:
    """radixkv's engine, which computes the prompts of a batch in one step, and Hugging Face's `generate`."""
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
    ours = RadixKVRunner(OURS, model, config)
    return ours, GenerateRunner(HF, model, max_batch, ours.kv_bytes_per_token)


def time_batch(runner: Runner, prompts: list[list[int]], output_tokens: int) -> Timing:
    """Answer each prompt with exactly `output_tokens`, two or more, from an empty cache."""
    runner.reset()
    answers = runner.serve(prompts, output_tokens)
    prefill_s = max(answer.ttft_s for answer in answers)
    return Timing(prefill_s, max(answer.total_s for answer in answers) - prefill_s)


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
        time_batch(runner, _prompts(-1, batch, min(16, prompt_tokens), vocab), 3)
    for number in range(rounds):
        prompts = _prompts(number, batch, prompt_tokens, vocab)
        for runner in runners if number % 2 == 0 else reversed(runners):
            yield runner.name, times
            times.timings[runner.name].append(time_batch(runner, prompts, output_tokens))
        times.read_gb_s.append(probes.read_gb_s(interleave(probes.calls, PROBE_ROUNDS, device)))
    yield "done", times


def _prompts(number: int, batch: int, tokens: int, vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1000 + number)
    ids: list[list[int]] = torch.randint(3, vocab, (batch, tokens), generator=generator).tolist()
    return ids
