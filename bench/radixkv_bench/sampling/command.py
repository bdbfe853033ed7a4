"""What it costs to change logits before a token is chosen, against the choice alone.

python bench/sampling.py --help
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from torch import Tensor

from radixkv import SamplingParams
from radixkv.engine.logit_edits import LogitEdits, RowEdits, edit_logits
from radixkv.engine.sampling import Sampler
from radixkv_bench.common.command import Outcome, command
from radixkv_bench.common.machine import environment
from radixkv_bench.common.options import RUN, SIZES
from radixkv_bench.common.tables import number_table

END_IDS = (0, 1)
ASKED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "presence and frequency": {"presence_penalty": 0.5, "frequency_penalty": 0.5},
    "repetition": {"repetition_penalty": 1.2},
    "bias of 100 tokens": {"logit_bias": dict.fromkeys(range(100), 1.0)},
    "min_tokens": {"max_tokens": 4096, "min_tokens": 4096},
    "a mask": {},
}


class Mask:
    """Forbids half of the tokens, by a mask that is there already."""

    def __init__(self, vocab_size: int) -> None:
        self._forbidden = torch.arange(vocab_size) % 2 == 1

    def start(self, token_ids: Sequence[int]) -> None:
        """Nothing to do."""

    def apply(self, logits: Tensor) -> None:
        """Forbid them."""
        logits.masked_fill_(self._forbidden, -torch.inf)


@command("sampling", plots=False)
def main(
    rows: Annotated[int, typer.Option(min=1, max=4096, rich_help_panel=SIZES, help="Rows of a batch.")] = 64,
    vocab_size: Annotated[
        int, typer.Option(min=200, rich_help_panel=SIZES, help="Tokens of the vocabulary.")
    ] = 151_936,
    prompt_tokens: Annotated[int, typer.Option(min=1, rich_help_panel=SIZES, help="Tokens of each prompt.")] = 1024,
    output_tokens: Annotated[
        int, typer.Option(min=1, rich_help_panel=SIZES, help="Tokens of each output so far.")
    ] = 256,
    rounds: Annotated[int, typer.Option(min=1, max=10_000, rich_help_panel=RUN, help="Rounds; medians count.")] = 30,
    seed: Annotated[int, typer.Option(min=0, rich_help_panel=RUN, help="Of logits and tokens.")] = 0,
) -> Outcome:
    """Time the greedy choice of a batch's tokens on the CPU, where all rows ask for something, a quarter, or none.

    "alone" is the choice without a look at what rows ask. Every figure is taken once a round, in turns.

    Exits with 2 if the command cannot be run.
    """
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.standard_normal((rows, vocab_size), np.float32))
    contenders: dict[tuple[str, int], Callable[[], object]] = {("alone", 0): partial(Sampler().likeliest, logits)}
    for name, asked in ASKED.items():
        for asking in (0,) if name == "nothing" else (rows, -(-rows // 4)):
            mask = Mask(vocab_size) if name == "a mask" else None
            edits = [_edits(asked, mask, vocab_size, prompt_tokens, output_tokens, rng) for _ in range(asking)]
            contenders[name, asking] = partial(choose, logits, [*edits, *[None] * (rows - asking)])
    times: dict[tuple[str, int], list[float]] = {key: [] for key in contenders}
    for _ in range(rounds + 1):
        for key, run in contenders.items():
            started = time.perf_counter()
            run()
            times[key].append(1e3 * (time.perf_counter() - started))
    medians = {key: float(np.median(taken[1:])) for key, taken in times.items()}
    report = {
        "rows": rows,
        "vocab_size": vocab_size,
        "choices": [
            {"asked": name, "rows_asking": asking, "ms": ms, "times_alone": ms / medians["alone", 0]}
            for (name, asking), ms in medians.items()
        ],
        "config": environment(),
    }
    return Outcome(report, partial(_print, report))


def choose(logits: Tensor, all_edits: Sequence[LogitEdits | None]) -> tuple[list[int], list[bool]]:
    """Choose the likeliest tokens, after the edits of the rows that have some."""
    edited = [RowEdits(row, edits) for row, edits in enumerate(all_edits) if edits is not None]
    if edited:
        edit_logits(logits, edited)
    return Sampler().likeliest(logits)


def _edits(
    asked: dict[str, Any],
    mask: Mask | None,
    vocab_size: int,
    prompt_tokens: int,
    output_tokens: int,
    rng: np.random.Generator,
) -> LogitEdits:
    prompt = rng.integers(0, vocab_size, prompt_tokens, dtype=np.int32)
    edits = LogitEdits.of(SamplingParams(**asked), prompt, END_IDS, mask)
    assert edits is not None, asked
    for token_id in rng.integers(0, vocab_size, output_tokens).tolist():
        edits.append(token_id)
    return edits


def _print(report: dict[str, Any], console: Console) -> None:
    console.print(f"{report['rows']} rows of {report['vocab_size']:,} logits", style="bold", highlight=False)
    table = number_table(("asked",), ("rows\nasking", "ms", "times\nalone"))
    for cell in report["choices"]:
        table.add_row(cell["asked"], str(cell["rows_asking"]), f"{cell['ms']:.3f}", f"{cell['times_alone']:.2f}")
    console.print(table)
