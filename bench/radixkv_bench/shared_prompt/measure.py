"""Runs a workload through several runners, interleaved round by round, and boils the rounds down to medians."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from radixkv_bench.common.runners import Answer, Runner, Usage
from radixkv_bench.shared_prompt.workloads import Request, Workload


@dataclass(frozen=True)
class Round:
    """One runner's way through the workload: answers by request number, time and tokens spent."""

    total_s: float
    answers: dict[int, Answer]
    ttft_s_by_wave: list[list[float]]
    usage: Usage

    @property
    def outputs(self) -> dict[int, list[int]]:
        """Answered token ids by request number."""
        return {number: answer.token_ids for number, answer in self.answers.items()}

    def ttft_s(self, quantile: float) -> float:
        """Quantile of the time to first token over all requests."""
        return percentile([ttft for wave in self.ttft_s_by_wave for ttft in wave], quantile)


def play(workload: Workload, runner: Runner, on_wave: Callable[[], None]) -> Round:
    """Serve the workload wave by wave, from an empty cache; only the serving is timed."""
    runner.reset()
    answers: dict[int, Answer] = {}
    total_s, ttft_s_by_wave = 0.0, []
    for wave in workload.waves:
        outputs = {number: answer.token_ids for number, answer in answers.items()}
        prompts = [workload.prompt(number, outputs) for number in wave]
        started_s = time.perf_counter()
        served = runner.serve(prompts, workload.output_tokens)
        total_s += time.perf_counter() - started_s
        answers.update(zip(wave, served, strict=True))
        ttft_s_by_wave.append([answer.ttft_s for answer in served])
        on_wave()
    return Round(total_s, answers, ttft_s_by_wave, runner.usage())


def warm_up(workload: Workload, runners: Sequence[Runner]) -> None:
    """Let each runner compile and allocate what it needs once: two requests with two tokens each, not timed."""
    start = Workload("warm-up", tuple(Request(None, r.tokens) for r in workload.requests[:2]), output_tokens=2)
    for runner in runners:
        play(start, runner, on_wave=lambda: None)


def interleave(
    workload: Workload,
    runners: Sequence[Runner],
    rounds: int,
    *,
    on_play: Callable[[str, int], None],
    on_wave: Callable[[], None],
) -> dict[str, list[Round]]:
    """Each runner's rounds. Every second round goes through the runners backwards, so that drift meets all alike.

    `on_play` hears the runner's name and the round's number before it starts, `on_wave` each wave that is done.
    """
    played: dict[str, list[Round]] = {runner.name: [] for runner in runners}
    for number in range(rounds):
        for runner in runners if number % 2 == 0 else reversed(runners):
            on_play(runner.name, number)
            played[runner.name].append(play(workload, runner, on_wave))
    return played


class Disagreement(NamedTuple):
    """Two runners that answered differently: where first, and with which ids."""

    name: str
    other: str
    request: int
    position: int
    token: int
    other_token: int


def disagreements(played: dict[str, list[Round]], reference: str) -> Iterator[Disagreement]:
    """The first token of each round that differs from the first round of `reference`."""
    expected = played[reference][0].outputs
    for name, rounds in played.items():
        for done in rounds:
            found = _first_difference(expected, done.outputs)
            if found is not None:
                request, position = found
                tokens = expected[request][position], done.outputs[request][position]
                yield Disagreement(reference, name, request, position, *tokens)


def _first_difference(outputs: dict[int, list[int]], others: dict[int, list[int]]) -> tuple[int, int] | None:
    """(request, position) of the first token that differs, requests in the order served."""
    for request, tokens in outputs.items():
        for position, (token, other) in enumerate(zip(tokens, others[request], strict=True)):
            if token != other:
                return request, position
    return None


def percentile(values: Sequence[float], quantile: float) -> float:
    """The `quantile` (0 … 1) of `values`, linear between neighbours. O(n log n)."""
    if not values or not 0 <= quantile <= 1:
        raise ValueError(f"needs values and a quantile in [0, 1], not {len(values)} values and {quantile}")
    ordered = sorted(values)
    below, weight = divmod((len(ordered) - 1) * quantile, 1)
    low = ordered[int(below)]
    high = ordered[min(int(below) + 1, len(ordered) - 1)]
    return low + (high - low) * weight


def speedup(rounds: Sequence[Round], others: Sequence[Round]) -> float:
    """How many times as long the others took: the median of the ratios within each round."""
    return median(other.total_s / own.total_s for own, other in zip(rounds, others, strict=True))
