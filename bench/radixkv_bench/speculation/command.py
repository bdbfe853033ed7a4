"""What drafts from the cache bring: tokens a step on a trace, the speed of models, and the cost of drafting.

python bench/speculation.py --help
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from radixkv_bench.common.command import Outcome, command
from radixkv_bench.common.errors import BenchError
from radixkv_bench.common.machine import environment
from radixkv_bench.common.options import SIZES
from radixkv_bench.common.tables import number_table
from radixkv_bench.speculation import index_cost, ranks, trace


@command("speculation", plots=False)
def main(
    trace_folder: Annotated[
        Path | None,
        typer.Option(
            "--trace",
            help="Replay the recorded answers of a folder of JSON lines with input and output, instead of models.",
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Of the trace: a file of ranks of a byte-level BPE, as tiktoken has them.")
    ] = None,
    draft_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a draft at most, in a trace.")] = 16,
    index_tokens: Annotated[
        int, typer.Option(min=4096, rich_help_panel=SIZES, help="Tokens that are indexed where drafting is timed.")
    ] = 10_000_000,
    index_texts: Annotated[int, typer.Option(min=1, rich_help_panel=SIZES, help="Requests that draft from them.")] = 20,
) -> Outcome:
    """Count the tokens a step that drafts bring on a trace, or time models with and without drafts.

    \b
    --trace FOLDER --tokenizer RANKS --json speculation.json

    Exits with 2 if the command cannot be run.
    """
    if (trace_folder is None) != (tokenizer is None):
        raise BenchError("--trace and --tokenizer belong together; give both or none")
    figures: dict[str, Any] = {}
    if trace_folder is not None and tokenizer is not None:
        figures |= _replayed(trace_folder, tokenizer, draft_tokens)
    else:
        figures["index"] = index_cost.measure(index_tokens, index_texts)
    figures["config"] = {"draft_tokens": draft_tokens, **environment()}
    return Outcome(figures, partial(_show, figures))


def _replayed(folder: Path, tokenizer: Path, most: int) -> dict[str, Any]:
    calls = trace.read_calls(folder, ranks.load_encode(tokenizer))
    own = trace.replay(calls, most, own_sessions=True)
    everything = trace.replay(calls, most, own_sessions=False)
    return {
        "tokens_per_step_own_session": own.tokens_per_step,
        "tokens_per_step_all_sessions": everything.tokens_per_step,
        "calls": len(calls),
        "own_session": own.as_dict(),
        "all_sessions": everything.as_dict(),
    }


def _show(figures: dict[str, Any], console: Console) -> None:
    if "own_session" in figures:
        table = number_table(["drafts from"], ["tokens a step", "accepted of drafted", "µs a token"])
        for name in ("own_session", "all_sessions"):
            found = figures[name]
            table.add_row(
                name.replace("_", " "),
                f"{found['tokens_per_step']:.2f}",
                f"{found['accepted_tokens'] / max(1, found['drafted_tokens']):.0%}",
                f"{found['drafting_us_a_token']:.1f}",
            )
        console.print(table)
    if "index" in figures:
        index = figures["index"]
        console.print(
            f"{index['indexed_tokens']:,} tokens indexed: {index['drafting_us_a_token']:.1f} µs to draft for a token, "
            f"{index['bytes_a_token']:.0f} bytes a token; {index['storing_us_a_token']:.2f} µs a token to store, the "
            "tree's own work included",
            highlight=False,
        )
