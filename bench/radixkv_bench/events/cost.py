"""What publishing events costs an engine that decodes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from rich.console import Console

from radixkv import Engine, EngineConfig, SamplingParams
from radixkv.cache.events import PageRun, Prefix, Stored
from radixkv.cache.namespace import SHARED
from radixkv.publish.publisher import EventPublisher
from radixkv.publish.requirements import PACKAGES
from radixkv_bench.common import models
from radixkv_bench.common.command import Outcome, command, error_console
from radixkv_bench.common.machine import environment
from radixkv_bench.common.options import RUN, ModelName, RandomModelSizes, Rounds, choose_model, size
from radixkv_bench.common.progress import add_steps, quiet_bar
from radixkv_bench.common.tables import number_table

LARGE = Stored(PageRun(Prefix(SHARED, 16), bytes(4 * 65536), bytes(4 * 4096)), "pool")
NUM_LARGE = 30  # fill the buffers of the connection
LOCAL = "tcp://127.0.0.1:0"
OFF, AGAIN, READ, STALLED = "off", "off again", "read", "stalled"  # the second one tells how much chance does
READER = """
import sys, zmq
live = zmq.Context().socket(zmq.SUB)
live.setsockopt(zmq.SUBSCRIBE, b"")
live.connect(sys.argv[1])
print("ready", flush=True)
while True:
    live.recv_multipart()
"""


class Turn(NamedTuple):
    """A batch of requests: tokens decoded a second, and the processor's time of the process for all of it."""

    decode_tokens_s: float
    processor_s: float


@command("kv_events", plots=False)
def main(
    model: ModelName = None,
    random_model: RandomModelSizes = None,
    batch: Annotated[int, size("Requests that decode together.", least=1)] = 8,
    prompt_tokens: Annotated[int, size("Tokens of each prompt, all of them new.", least=1)] = 256,
    output_tokens: Annotated[int, size("Tokens each is answered with.", least=2)] = 64,
    rounds: Rounds = 9,
    threads: Annotated[int, typer.Option(min=1, rich_help_panel=RUN, help="Threads of torch.")] = 1,
) -> Outcome:
    """Decode without events, with a consumer in another process that reads them, and with one that never reads and
    whose queue is full. One engine does all in turn, in another order each round; without events it does so twice,
    which tells how much the machine's other work changes.

    Exits with 2 if the command cannot be run.
    """
    models.quiet_transformers()
    torch.set_num_threads(threads)
    chosen = choose_model(model, random_model)
    loaded = (
        models.load(chosen) if isinstance(chosen, str) else models.build_random(chosen, prompt_tokens + output_tokens)
    )
    engine = Engine(loaded, None, EngineConfig(kv_cache_tokens=4 * batch * (prompt_tokens + output_tokens + 32)))
    turns: dict[str, list[Turn]] = {OFF: [], AGAIN: [], READ: [], STALLED: []}
    with engine, quiet_bar(error_console()) as progress:
        advance = add_steps(progress, "turns", (rounds + 1) * len(turns))
        for number in range(-1, rounds):  # the first one warms up
            names = list(turns)
            for name in [*names[number % len(names) :], *names[: number % len(names)]]:
                turn = _play(engine, name, number, batch, prompt_tokens, output_tokens)
                if number >= 0:
                    turns[name].append(turn)
                advance(1)
    figures = {
        "model": str(chosen),
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "rounds": rounds,
        "turns": {name: [turn._asdict() for turn in played] for name, played in turns.items()},
        "ratios": {name: _ratios(turns[OFF], turns[name]) for name in (AGAIN, READ, STALLED)},
        "config": environment(),
    }
    return Outcome(figures, partial(_show, figures))


def _play(engine: Engine, name: str, number: int, batch: int, prompt_tokens: int, output_tokens: int) -> Turn:
    generator = np.random.default_rng(number + 1)
    vocab = engine.model.config.get_text_config().vocab_size
    prompts = [generator.integers(3, vocab, prompt_tokens).tolist() for _ in range(batch)]
    params = SamplingParams(max_tokens=output_tokens, temperature=0, ignore_eos=True)
    engine.reset_cache()
    with _published(engine, name):
        started_at = time.process_time()
        outputs = engine.generate(prompts, params)
        processor_s = time.process_time() - started_at
    first_s = max(output.metrics.ttft_s for output in outputs)
    decode_s = max(output.metrics.total_s for output in outputs) - first_s
    return Turn(batch * (output_tokens - 1) / decode_s, processor_s)


@contextmanager
def _published(engine: Engine, name: str) -> Iterator[None]:
    """Publish the events of the engine's cache to such a consumer."""
    if name in (OFF, AGAIN):
        yield
        return
    publisher = EventPublisher(engine.cache, LOCAL, max_unread=1 if name == STALLED else 10_000)
    consumer = _stalled(publisher) if name == STALLED else _reading(publisher)
    try:
        with consumer:
            yield
    finally:
        publisher.close()


@contextmanager
def _reading(publisher: EventPublisher) -> Iterator[None]:
    command = [sys.executable, "-c", READER, publisher.sources.endpoint]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


@contextmanager
def _stalled(publisher: EventPublisher) -> Iterator[None]:
    """A consumer that reads nothing, and whose queue is full."""
    zmq = PACKAGES.module("zmq")
    context = zmq.Context()
    try:
        live = context.socket(zmq.SUB)
        live.setsockopt(zmq.SUBSCRIBE, b"")
        live.setsockopt(zmq.RCVHWM, 1)
        live.setsockopt(zmq.RCVBUF, 4096)
        live.connect(publisher.sources.endpoint)
        num_sent = 0
        while num_sent < NUM_LARGE or not live.poll(0):
            publisher.queue(LARGE)
            num_sent += 1
            while publisher.next_seq < num_sent:  # each one is a message
                time.sleep(0.001)
        yield
    finally:
        context.destroy(linger=0)


def _ratios(off: list[Turn], on: list[Turn]) -> dict[str, float]:
    """Medians of what each round said, as on / off."""
    pairs = list(zip(off, on, strict=True))
    return {
        "decode_tokens_s": median(b.decode_tokens_s / a.decode_tokens_s for a, b in pairs),
        "processor_s": median(b.processor_s / a.processor_s for a, b in pairs),
    }


def _show(figures: dict[str, Any], console: Console) -> None:
    console.print(
        f"{figures['model']}: {figures['batch']} requests of {figures['prompt_tokens']} + {figures['output_tokens']} "
        f"tokens, median of {figures['rounds']} rounds",
        style="bold",
        highlight=False,
    )
    table = number_table(("events",), ("decode\ntokens/s", "of off", "processor\ns", "of off"))
    for name, turns in figures["turns"].items():
        ratios = figures["ratios"].get(name, {"decode_tokens_s": 1.0, "processor_s": 1.0})
        table.add_row(
            name,
            f"{median(turn['decode_tokens_s'] for turn in turns):,.0f}",
            f"{ratios['decode_tokens_s']:.1%}",
            f"{median(turn['processor_s'] for turn in turns):.3f}",
            f"{ratios['processor_s']:.1%}",
        )
    console.print(table)
