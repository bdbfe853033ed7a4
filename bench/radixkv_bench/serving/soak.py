"""Case "soak": many streams at once, and many short requests of which half are cut off."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil

from radixkv_bench.common.device_timing import OnStep
from radixkv_bench.serving.client import COMPLETIONS, Address, ask, ask_and_leave, get_json
from radixkv_bench.serving.http_cost import MODEL
from radixkv_bench.serving.servers import RunningServer, Settings, radixkv_server

SETTLE_S = 60.0
POLL_S = 0.1
SAMPLES = 200  # of the resident memory
WORDS = ("the", "and", "to", "of", "my", "lord", "king", "love", "night", "good", "sir", "death", "hand", "eye")


@dataclass(frozen=True, slots=True)
class Soak:
    """How many streams run at once, then how many requests, so many of them at a time."""

    streams: int
    stream_tokens: int
    requests: int
    at_once: int
    output_tokens: int


def measure(soak: Soak, seed: int, settings: Settings, advance: OnStep) -> dict[str, Any]:
    """Let one server live through it. `advance` counts requests."""
    rng = np.random.default_rng(seed)
    settings = {**settings, "max_waiting": max(1024, soak.streams)}
    with radixkv_server(MODEL, settings) as server:
        num_finished, streams_s = asyncio.run(_stream(server.address, soak, rng))
        advance(soak.streams)
        samples, requests_s = asyncio.run(_requests(server, soak, rng, advance))
        idle = _settled(server.address)
    half = [sample for sample in samples if sample[0] >= soak.requests // 2]
    return {
        "streams": soak.streams,
        "stream_tokens": soak.stream_tokens,
        "streams_finished": num_finished,
        "streams_s": streams_s,
        "requests": soak.requests,
        "at_once": soak.at_once,
        "requests_s": requests_s,
        "leased_pages": idle["pool"]["leased_pages"],
        "protected_tokens": idle["cached_tokens"]["protected"],
        "running": idle["requests"]["running"],
        "waiting": idle["requests"]["waiting"],
        "resident_bytes": samples,
        "resident_bytes_a_request": slope(half),
        "resident_growth_bytes": half[-1][1] - half[0][1],
    }


def failures(figures: dict[str, Any]) -> list[str]:
    """What did not end as it must."""
    lines = []
    if figures["streams_finished"] < figures["streams"]:
        lines.append(f"{figures['streams_finished']:,} of {figures['streams']:,} streams finished")
    held = {name: figures[name] for name in ("leased_pages", "protected_tokens", "running", "waiting")}
    if any(held.values()):
        lines.append("at the end there are " + ", ".join(f"{name} {value:,}" for name, value in held.items()))
    return lines


def slope(samples: Sequence[tuple[int, int]]) -> float:
    """Bytes a request: of the straight line through (requests done, resident bytes), by least squares.

    >>> slope([(0, 1000), (10, 1020), (20, 1040)])
    2.0
    """
    done, resident = np.array(samples, float).T
    if np.ptp(done) == 0:
        return 0.0
    return round(float(np.polyfit(done, resident, 1)[0]), 6)


async def _stream(address: Address, soak: Soak, rng: np.random.Generator) -> tuple[int, float]:
    """How many of the streams brought all of their tokens, and how long they took together."""
    started_s = time.perf_counter()
    bodies = [_body(rng, soak.stream_tokens) for _ in range(soak.streams)]
    replies = await asyncio.gather(*(ask(address, COMPLETIONS, body) for body in bodies))
    finished = sum(reply.output_tokens == soak.stream_tokens for reply in replies)
    return finished, time.perf_counter() - started_s


async def _requests(
    server: RunningServer, soak: Soak, rng: np.random.Generator, advance: OnStep
) -> tuple[list[tuple[int, int]], float]:
    """The server's resident memory after so many requests, and how long all took."""
    process = psutil.Process(server.pid)
    every = max(1, soak.requests // SAMPLES)
    samples = [(0, process.memory_info().rss)]
    cut = rng.permutation(soak.requests) < soak.requests // 2
    num_begun = num_done = 0

    async def work() -> None:
        nonlocal num_begun, num_done
        while num_begun < soak.requests:
            leaves, num_begun = bool(cut[num_begun]), num_begun + 1
            body = _body(rng, soak.output_tokens)
            if leaves:
                await ask_and_leave(server.address, COMPLETIONS, body, int(rng.integers(0, soak.output_tokens)))
            else:
                await ask(server.address, COMPLETIONS, body)
            num_done += 1
            advance(1)
            if num_done % every == 0 or num_done == soak.requests:
                samples.append((num_done, process.memory_info().rss))

    started_s = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(min(soak.at_once, soak.requests))))
    return samples, time.perf_counter() - started_s


def _settled(address: Address) -> Any:
    """The server's statistics once nothing runs any more, or after a minute."""
    ends_s = time.monotonic() + SETTLE_S
    while True:
        stats = get_json(address, "/v1/cache/stats")
        busy = stats["requests"]["running"] or stats["requests"]["waiting"] or stats["pool"]["leased_pages"]
        if not busy or time.monotonic() > ends_s:
            return stats
        time.sleep(POLL_S)


def _body(rng: np.random.Generator, output_tokens: int) -> dict[str, Any]:
    """A request with a prompt of random words; half of all begin with the same ones."""
    same = "Enter two gentlemen.\n" * 4 if rng.integers(2) else ""
    prompt = same + " ".join(rng.choice(WORDS, size=int(rng.integers(4, 64))))
    fixed = {"temperature": 0, "ignore_eos": True, "stream_options": {"include_usage": True}}
    return {**fixed, "prompt": prompt, "max_tokens": output_tokens}
