"""Case "http": streams over HTTP against `Engine.generate` on the same prompts, and where the rest goes."""

from __future__ import annotations

import pstats
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from transformers import AutoTokenizer

from radixkv import Engine, SamplingParams, demo_model
from radixkv_bench.common import corpus
from radixkv_bench.common.device_timing import OnStep
from radixkv_bench.common.errors import BenchError
from radixkv_bench.serving.client import COMPLETIONS, Address
from radixkv_bench.serving.raw_client import stream_all
from radixkv_bench.serving.servers import RunningServer, Settings, radixkv_server

MODEL = "demo"
PARTS = {  # of the processor time, by what is in the path of a function's file; the first that fits
    "JSON and events": ("/json/", "serving/streaming.py", "serving/openai_completions.py", "serving/openai_usage.py"),
    "detokenising": ("engine/detokenizer.py", "tokenization", "/tokenizers/"),
    "radixkv's server": ("radixkv/serving/",),
    "handing over": ("engine/async_engine.py", "engine/core_thread.py", "engine/results.py", "engine/intake.py"),
    "HTTP protocol": ("/h11/", "/uvicorn/"),
    "FastAPI, Starlette": ("/fastapi/", "/starlette/", "/pydantic", "/anyio/"),
    "event loop, sockets": ("/asyncio/", "selectors.py", "socket.py"),
    "model and sampling": ("radixkv/", "/torch/", "/transformers/", "/numpy/", "/numba/", "radixkv.kernels"),
}
OTHER = "other"
THREADS = ("loop", "engine")  # of the server, that are profiled


def texts(count: int, tokens: int, seed: int) -> list[str]:
    """Different texts of so many tokens: pieces of Python's standard library."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model.path())
    source = "".join(text for _, text in corpus.module_sources())
    width = tokens * 8  # characters: more than a token has
    first = seed * count * width
    pieces = [source[(first + i * width) % len(source) :][:width] for i in range(count)]
    cut = [str(tokenizer.decode(tokenizer.encode(piece, add_special_tokens=False)[:tokens])) for piece in pieces]
    if len(set(cut)) < count:
        raise BenchError(f"there are no {count} different prompts of {tokens} tokens; ask for fewer or longer ones")
    return cut


def measure(
    streams: int, prompt_tokens: int, output_tokens: int, rounds: int, seed: int, settings: Settings, advance: OnStep
) -> dict[str, Any]:
    """Serve the same prompts both ways, in turns; then once more with a profiler on each thread of the server."""
    engine = Engine.from_pretrained(MODEL, **settings)
    params = SamplingParams(max_tokens=output_tokens, temperature=0, ignore_eos=True)
    alone: list[float] = []
    http: list[float] = []
    used: list[dict[str, float]] = []
    with radixkv_server(MODEL, settings) as server:
        for number in range(rounds + 1):
            prompts = texts(streams, prompt_tokens, seed + number)
            engine_speed = _engine_speed(engine, prompts, params)
            http_speed, costs = _http_speed(server, prompts, output_tokens)
            if number:  # the first one warms up
                alone.append(engine_speed)
                http.append(http_speed)
                used.append(costs)
            advance(1)
    prompts = texts(streams, prompt_tokens, seed + rounds + 1)
    parts = {thread: _parts(thread, prompts, output_tokens, settings) for thread in THREADS}
    advance(1)
    return {
        "streams": streams,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "engine_tokens_a_second": median(alone),
        "http_tokens_a_second": median(http),
        "ratio": median(over / direct for over, direct in zip(http, alone, strict=True)),
        "processor_us_a_token": {name: median(costs[name] for costs in used) for name in used[0]},
        "profile_us_a_token": parts,
    }


def _engine_speed(engine: Engine, prompts: Sequence[str], params: SamplingParams) -> float:
    started_s = time.perf_counter()
    outputs = engine.generate(list(prompts), params)
    return sum(len(output.token_ids) for output in outputs) / (time.perf_counter() - started_s)


def _http_speed(server: RunningServer, prompts: Sequence[str], output_tokens: int) -> tuple[float, dict[str, float]]:
    """Tokens a second, and the processor time of a token in µs: of the client, and of the server's threads."""
    before, client_s = _thread_seconds(server.pid), time.process_time()
    num_tokens, total_s = _stream_all(server.address, prompts, output_tokens)
    client_s = time.process_time() - client_s
    after = _thread_seconds(server.pid)
    spent = {thread: seconds - before.get(thread, 0.0) for thread, seconds in after.items()}
    loop_s = spent.pop(server.pid)
    seconds = {"client": client_s, "event loop": loop_s, "engine and model": sum(spent.values())}
    return num_tokens / total_s, {name: 1e6 * value / num_tokens for name, value in seconds.items()}


def _stream_all(address: Address, prompts: Sequence[str], output_tokens: int) -> tuple[int, float]:
    """Output tokens of all streams, and how long they took together."""
    fixed = {"max_tokens": output_tokens, "temperature": 0, "ignore_eos": True}
    bodies = [{**fixed, "prompt": prompt, "stream_options": {"include_usage": True}} for prompt in prompts]
    started_s = time.perf_counter()
    replies = stream_all(address, COMPLETIONS, bodies)
    ended_s = max(reply.last_s for reply in replies)
    return sum(reply.output_tokens for reply in replies), ended_s - started_s


def _thread_seconds(pid: int) -> dict[int, float]:
    """Processor time of each thread of a process; the main one has the number of the process."""
    return {thread.id: thread.user_time + thread.system_time for thread in psutil.Process(pid).threads()}


def _parts(thread: str, prompts: Sequence[str], output_tokens: int, settings: Settings) -> dict[str, float]:
    """Processor time of a token in one of the server's threads, in µs, by part of the program.

    A profiler makes Python's functions slower than they are: the parts are to be compared with each other alone.
    """
    with tempfile.TemporaryDirectory(prefix="radixkv-bench-") as folder:
        out = Path(folder) / "profile"
        with radixkv_server(MODEL, settings, profile=(str(out), thread)) as server:
            num_tokens, _ = _stream_all(server.address, prompts, output_tokens)
        seconds = by_part(pstats.Stats(str(out)))
    return {part: 1e6 * value / num_tokens for part, value in sorted(seconds.items(), key=lambda item: -item[1])}


def by_part(stats: pstats.Stats) -> dict[str, float]:
    """Seconds of each part. What is written in C counts for the functions that call it."""
    seconds: dict[str, float] = {}
    recorded: dict[tuple[str, int, str], Any] = stats.stats  # type: ignore[attr-defined]
    for (file, _, _), (_, _, own_s, _, callers) in recorded.items():
        shares = [(file, own_s)]
        if file == "~" and callers:
            shares = [(caller[0], times[2]) for caller, times in callers.items()]
        for place, share_s in shares:
            seconds[_part_of(place)] = seconds.get(_part_of(place), 0.0) + share_s
    return seconds


def _part_of(file: str) -> str:
    return next((part for part, marks in PARTS.items() if any(mark in file for mark in marks)), OTHER)
