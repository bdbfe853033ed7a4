"""What tiers below the pool bring, and what they cost.

python bench/tiers.py --help
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Annotated

import torch
import typer
from rich.console import Console

from radixkv_bench.common import machine, models
from radixkv_bench.common.command import Outcome, command, error_console
from radixkv_bench.common.errors import BenchError
from radixkv_bench.common.options import RUN, ModelName, RandomModelSizes, Rounds, choose_model, size
from radixkv_bench.common.tables import number_table
from radixkv_bench.tiers.cases import CASES
from radixkv_bench.tiers.workload import Figures, Sizes


@command("tiers", plots=False)
def main(
    cases: Annotated[str, typer.Option(rich_help_panel=RUN, help="Which cases, comma-separated.")] = ",".join(CASES),
    prompt_tokens: Annotated[int, size("restart, idle-cost, throttled: tokens of a prompt.", least=64)] = 1024,
    sessions: Annotated[int, size("working-set: conversations side by side.", least=1)] = 8,
    turns: Annotated[int, size("working-set: turns of each.", least=1)] = 6,
    turn_tokens: Annotated[int, size("working-set: tokens that a turn adds.", least=1)] = 128,
    new_tokens: Annotated[int, size("Tokens of each answer.", least=1)] = 8,
    model: ModelName = None,
    random_model: RandomModelSizes = None,
    rounds: Rounds = 3,
) -> Outcome:
    """Measure disk_cache: a restart, a pool too small, prompts that are not stored, and a disk slower than computing.

    Everything is random tokens, on the CPU. Exits with 2 if the command cannot be run.
    """
    chosen = cases.split(",")
    for name in chosen:
        if name not in CASES:
            raise BenchError(f"--cases: unknown case {name!r}; the cases are {', '.join(CASES)}")
    source = choose_model(model, random_model)
    longest = max(prompt_tokens + 4 * new_tokens, turns * (turn_tokens + new_tokens) + new_tokens)
    loaded = models.load(source) if isinstance(source, str) else models.build_random(source, longest)
    sizes = Sizes(prompt_tokens, sessions, turns, turn_tokens, new_tokens, rounds, loaded.config.vocab_size)
    found: dict[str, Figures] = {}
    for name in chosen:
        error_console().print(f"{name} …", highlight=False)
        found[name] = CASES[name](copy.deepcopy(loaded), sizes)
    figures = {"machine": machine.describe(torch.device("cpu")), "model": str(source), "cases": found}
    return Outcome(figures, partial(_print, found))


def _print(found: dict[str, Figures], console: Console) -> None:
    for name, figures in found.items():
        table = number_table([name], ["figure"])
        for figure, value in figures.items():
            table.add_row(figure, f"{value:,.0f}" if value >= 100 else f"{value:.3f}")
        console.print(table)
