"""What drafts from the cache bring: tokens a step on a trace, the speed of models, and the cost of drafting.

python bench/speculation.py --help
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from radixkv_bench.common import models
from radixkv_bench.common.command import Outcome, command, error_console
from radixkv_bench.common.errors import BenchError
from radixkv_bench.common.files import parse_numbers
from radixkv_bench.common.machine import environment
from radixkv_bench.common.options import DTYPES, SIZES, Rounds, choose_dtype
from radixkv_bench.common.progress import counting_bar
from radixkv_bench.common.tables import number_table
from radixkv_bench.speculation import index_cost, ranks, speed, trace
from radixkv_bench.speculation.speed import Row

MODELS = ("demo", "hidden=512,layers=8,heads=8,kv_heads=2")


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
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A model to time: demo, a directory, a hub id, or sizes of a random Llama, as in "
            "hidden=512,layers=8,heads=8,kv_heads=2. May be given several times.",
            show_default="demo, and a random Llama of 39M weights",
        ),
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1,8,32",
    dtype: Annotated[str, typer.Option(metavar="|".join(DTYPES), help="Of models' weights and KV.")] = "float32",
    prompt_tokens: Annotated[int, typer.Option(min=8, rich_help_panel=SIZES, help="Tokens of each prompt.")] = 64,
    output_tokens: Annotated[int, typer.Option(min=4, rich_help_panel=SIZES, help="Tokens of each answer.")] = 96,
    rounds: Rounds = 5,
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
        figures["models"] = _timed(
            model or [*MODELS], parse_numbers("--batch", batch), prompt_tokens, output_tokens, rounds, dtype
        )
        figures["index"] = index_cost.measure(index_tokens, index_texts)
    figures["config"] = {"draft_tokens": draft_tokens, "dtype": dtype, **environment()}
    failures = [
        f"{row['model']}, batch {row['batch']}: drafts changed the answers"
        for row in figures.get("models", ())
        if not row["same_tokens"]
        and dtype == "float32"  # in 16 bit the last bit may differ, and with it a close choice
    ]
    return Outcome(figures, partial(_show, figures), failures=failures)


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


def _timed(
    names: list[str], batches: tuple[int, ...], prompt_tokens: int, output_tokens: int, rounds: int, dtype: str
) -> list[dict[str, Any]]:
    if batches[0] < 1:
        raise BenchError(f"--batch must be 1 or more, not {batches[0]}")
    kind = choose_dtype(dtype)
    models.quiet_transformers()
    rows: list[Row] = []
    with counting_bar(error_console()) as progress:
        bar = progress.add_task("", total=len(names) * len(batches) * 2)
        for name in names:
            chosen = models.parse_random_model(name) if "=" in name else name
            rows += speed.measure(
                name,
                speed.load(chosen, prompt_tokens + output_tokens).to(kind),
                batches,
                prompt_tokens=prompt_tokens,
                output_tokens=output_tokens,
                rounds=rounds,
                done=partial(progress.advance, bar),
            )
    return [row.as_dict() for row in rows]


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
    if "models" in figures:
        table = number_table(
            ["model", "answers", "tokens"], ["batch", "speed-up", "tokens/step", "accepted/drafted", "tokens/s"]
        )
        for row in figures["models"]:
            table.add_row(
                row["model"].partition(",layers")[0],
                "repeat" if row["repeats"] else "do not",
                "the same" if row["same_tokens"] else "others",
                str(row["batch"]),
                f"{row['ratio']:.2f}",
                f"{row['tokens_per_step']:.2f}",
                f"{row['accepted_tokens']}/{row['drafted_tokens']}",
                f"{row['on_tokens_s']:.0f}",
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
