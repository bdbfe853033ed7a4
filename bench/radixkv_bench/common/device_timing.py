"""Times calls on the device that runs them, and takes contenders in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from math import ceil
from statistics import median

import torch

ROUND_S = 0.02  # a contender's turn lasts that long at least
MAX_CALLS = 50
HEAD_START_CYCLES = 20_000_000  # some 10 ms: what the host needs to queue the calls

Call = Callable[[], object]
OnStep = Callable[[int], None]


def seconds_a_call(call: Call, calls: int, device: torch.device) -> float:
    """The mean of `calls` calls in a row; on CUDA by the device's own clock."""
    if device.type == "cuda":
        return _cuda_seconds(call, calls, device)
    started_s = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - started_s) / calls


def _cuda_seconds(call: Call, calls: int, device: torch.device) -> float:
    """Behind a wait during which the host queues the calls: what Python takes to launch them is no part of it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    torch.cuda._sleep(HEAD_START_CYCLES)
    start.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize(device)
    return float(start.elapsed_time(end)) / 1000 / calls


def calls_a_round(call: Call, device: torch.device, round_s: float = ROUND_S) -> int:
    """How many calls fill a contender's turn. Calls it, which warms it up too."""
    seconds_a_call(call, 1, device)
    return min(MAX_CALLS, max(1, ceil(round_s / seconds_a_call(call, 1, device))))


def interleave(
    contenders: Mapping[str, Call], rounds: int, device: torch.device, on_step: OnStep = lambda _: None
) -> dict[str, list[float]]:
    """Seconds a call of each contender, round by round.

    Every second round goes through them backwards, so that drift meets all alike. `on_step` hears of each turn.
    """
    names = list(contenders)
    calls = {name: calls_a_round(call, device) for name, call in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            times[name].append(seconds_a_call(contenders[name], calls[name], device))
            on_step(1)
    return times


def fastest(variants: Mapping[str, Call], device: torch.device) -> str:
    """Which of several ways to compute the same is the fastest here: the median of three calls each, in turns."""
    for call in variants.values():
        call()
    times = {name: [seconds_a_call(call, 1, device) for _ in range(3)] for name, call in variants.items()}
    return min(variants, key=lambda name: median(times[name]))
