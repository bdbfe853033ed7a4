"""How many lookups a second an index of replicas answers."""

from __future__ import annotations

import random
import time
from functools import partial
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from radixkv.cache.page_keys import root_key
from radixkv.cluster.index.replica_index import ReplicaIndex
from radixkv_bench.common.command import Outcome, command
from radixkv_bench.common.errors import BenchError
from radixkv_bench.common.machine import environment
from radixkv_bench.common.options import RUN, Rounds, size

NAMESPACE = root_key(None, None)
VOCAB = 128_000


@command("replica_index", plots=False)
def main(
    replicas: Annotated[int, size("Replicas, all of which hold the system prompts.", least=1)] = 64,
    prompts: Annotated[int, size("Conversations in the index.", least=1)] = 400,
    prompt_tokens: Annotated[int, size("Tokens of each.", least=64)] = 13_700,
    system_tokens: Annotated[int, size("Tokens of a system prompt, which begins some of them.", least=1)] = 4096,
    system_prompts: Annotated[int, size("System prompts.", least=1)] = 8,
    holders: Annotated[int, size("Replicas that hold a conversation, each one up to another point.", least=1)] = 3,
    page_size: Annotated[int, size("Tokens a page.", least=1)] = 16,
    rounds: Rounds = 5,
    seed: Annotated[int, typer.Option(min=0, rich_help_panel=RUN, help="Of the prompts.")] = 0,
) -> Outcome:
    """Look all prompts up, in turn, in one thread. Each is longer than what any replica holds of it.

    Exits with 2 if the command cannot be run.
    """
    if holders > replicas or system_tokens >= prompt_tokens:
        raise BenchError("--holders must be at most --replicas, and --system-tokens less than --prompt-tokens")
    index, asked = _fill(replicas, prompts, prompt_tokens, system_tokens, system_prompts, holders, page_size, seed)
    rates = [_rate(index, asked) for _ in range(rounds)]
    figures = {
        "replicas": replicas,
        "prompts": prompts,
        "prompt_tokens": prompt_tokens,
        "holders": holders,
        "tokens_in_index": index.num_tokens,
        "lookups_per_s": median(rates),
        "slowest_round_per_s": min(rates),
        "config": environment(),
    }
    return Outcome(figures, partial(_show, figures))


def _fill(
    replicas: int,
    num_prompts: int,
    prompt_tokens: int,
    system_tokens: int,
    system_prompts: int,
    holders: int,
    page_size: int,
    seed: int,
) -> tuple[ReplicaIndex, list[bytes]]:
    """An index, and the prompts to look up in it."""
    rng, generator = random.Random(seed), np.random.default_rng(seed)
    index = ReplicaIndex(page_size, max_pages=2 * num_prompts * (prompt_tokens // page_size + 1))
    systems = [generator.integers(VOCAB, size=system_tokens, dtype=np.int32) for _ in range(system_prompts)]
    asked = []
    num_pages, system_pages = prompt_tokens // page_size, system_tokens // page_size
    for number in range(num_prompts):
        system = number % system_prompts
        rest = generator.integers(VOCAB, size=prompt_tokens - system_tokens, dtype=np.int32)
        tokens = np.concatenate([systems[system], rest]).tobytes()
        names = [*range(system * num_pages, system * num_pages + system_pages)]
        first = (system_prompts + number) * num_pages
        names += range(first, first + num_pages - system_pages)
        if number < system_prompts:
            for replica in range(replicas):
                index.store(
                    f"replica-{replica}", None, NAMESPACE, names[:system_pages], tokens[: 4 * system_pages * page_size]
                )
        for replica in rng.sample(range(replicas), holders):
            held = rng.randint(system_pages, num_pages)
            index.store(f"replica-{replica}", None, NAMESPACE, names[:held], tokens[: 4 * held * page_size])
        asked.append(tokens)
    index.check_invariants()
    return index, asked


def _rate(index: ReplicaIndex, asked: list[bytes]) -> float:
    """Lookups a second of one core's time."""
    started_at = time.process_time()
    for tokens in asked:
        index.lookup(tokens, NAMESPACE)
    return len(asked) / (time.process_time() - started_at)


def _show(figures: dict[str, Any], console: Console) -> None:
    console.print(
        f"{figures['lookups_per_s']:,.0f} lookups a second of processor time (slowest round "
        f"{figures['slowest_round_per_s']:,.0f}): prompts of {figures['prompt_tokens']:,} tokens, "
        f"{figures['replicas']} replicas, {figures['tokens_in_index']:,} tokens in the index",
        highlight=False,
    )
