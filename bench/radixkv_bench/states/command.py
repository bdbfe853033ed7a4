"""Prefills of a model with recurrent layers, with states kept on their way and without."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console

from radixkv import Engine, EngineConfig, SamplingParams
from radixkv_bench.common import models
from radixkv_bench.common.command import Outcome, command, error_console
from radixkv_bench.common.errors import BenchError
from radixkv_bench.common.machine import environment
from radixkv_bench.common.options import RUN, ModelName, RandomModelSizes, Rounds, choose_model, size
from radixkv_bench.common.progress import add_steps, quiet_bar
from radixkv_bench.common.tables import number_table

DEFAULT_MODEL = "hidden=512,layers=8,heads=8,kv_heads=2,recurrent=3"
KEPT, NONE, AGAIN = "kept", "none kept", "none kept, again"  # the last one tells how much chance does
SAME_STEPS = "none kept, in steps of the interval"  # what keeping alone costs: shorter steps have a speed of their own
ONE = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)


@command("states", plots=False)
def main(
    model: ModelName = None,
    random_model: RandomModelSizes = None,
    prompt_tokens: Annotated[int, size("Tokens of each prompt, all of them new.", least=2)] = 4096,
    interval_tokens: Annotated[int, size("A state is kept at multiples of it.", least=1)] = 1024,
    rounds: Rounds = 7,
    threads: Annotated[int, typer.Option(min=1, rich_help_panel=RUN, help="Threads of torch.")] = 2,
) -> Outcome:
    """Compute prompts with a state kept at each --interval-tokens and at their ends, and without the cache, which keeps
    none: in steps as long as they are by default, and in steps of --interval-tokens, as those that keep states are. In
    turn, in another order each round.

    Exits with 2 if the command cannot be run.
    """
    models.quiet_transformers()
    torch.set_num_threads(threads)
    chosen = choose_model(model, random_model or (DEFAULT_MODEL if model is None else None))
    loaded = models.load(chosen) if isinstance(chosen, str) else models.build_random(chosen, prompt_tokens + 16)
    keeping = EngineConfig(kv_cache_tokens=2 * prompt_tokens + 64, state_interval_tokens=interval_tokens)
    plain = EngineConfig(
        kv_cache_tokens=2 * prompt_tokens + 64, state_interval_tokens=2 * prompt_tokens, prefix_cache=False
    )
    taken: dict[str, list[float]] = {KEPT: [], NONE: [], AGAIN: [], SAME_STEPS: []}
    with Engine(models.twin(loaded), None, keeping) as kept, ExitStack() as others:
        plain = replace(plain, long_extends=kept.config.long_extends)  # which is chosen by timing: once for all
        short = replace(plain, max_batch_tokens=interval_tokens)
        none, in_short_steps = (
            others.enter_context(Engine(models.twin(loaded), None, config)) for config in (plain, short)
        )
        progress = others.enter_context(quiet_bar(error_console()))
        if kept.config.state_slots is None:
            raise BenchError(f"{chosen} has no recurrent layers")
        engines = {KEPT: kept, NONE: none, AGAIN: none, SAME_STEPS: in_short_steps}
        advance = add_steps(progress, "prefills", (rounds + 1) * len(taken))
        for number in range(-1, rounds):  # the first one warms up
            names = list(taken)
            for name in [*names[number % len(names) :], *names[: number % len(names)]]:
                seconds = _prefill_s(engines[name], number, prompt_tokens)
                if number >= 0:
                    taken[name].append(seconds)
                advance(1)
        slots = kept.cache.stats()
    figures = {
        "model": str(chosen),
        "prompt_tokens": prompt_tokens,
        "interval_tokens": interval_tokens,
        "rounds": rounds,
        "prefill_s": taken,
        "speed": {name: _speed(taken[NONE], taken[name]) for name in (KEPT, AGAIN, SAME_STEPS)},
        "speed_in_equal_steps": _speed(taken[SAME_STEPS], taken[KEPT]),
        "states": slots.states,
        "states_used": slots.states - slots.free_states,
        "config": environment(),
    }
    return Outcome(figures, partial(_show, figures))


def _prefill_s(engine: Engine, number: int, prompt_tokens: int) -> float:
    vocab = engine.model.config.get_text_config().vocab_size
    prompt = np.random.default_rng(number + 1).integers(3, vocab, prompt_tokens).tolist()
    engine.reset_cache()
    (output,) = engine.generate([prompt], ONE)
    return output.metrics.ttft_s


def _speed(without: list[float], with_: list[float]) -> float:
    """The median over the rounds of how fast it was in comparison."""
    return median(one / other for one, other in zip(without, with_, strict=True))


def _show(figures: dict[str, Any], console: Console) -> None:
    table = number_table(["states"], ["prefill", "speed"])
    for name, seconds in figures["prefill_s"].items():
        speed = figures["speed"].get(name)
        table.add_row(name, f"{median(seconds):.2f} s", "" if speed is None else f"{speed:.1%}")
    console.print(table)
    console.print(
        f"{figures['prompt_tokens']:,} tokens, a state at each {figures['interval_tokens']:,} and at the end: "
        f"{figures['states_used']} of {figures['states']} states used. In equal steps, keeping them leaves "
        f"{figures['speed_in_equal_steps']:.1%} of the speed."
    )
