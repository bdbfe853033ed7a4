"""What it brings to compute a shared prefix once: radixkv against no cache, and against Hugging Face's own ways.

python bench/shared_prompt.py --help
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import transformers
import typer
from rich.console import Console

import job
import models
import plot
import report as reports
from errors import BenchError, exit_code
from job import BASELINES, Settings

SIZES = "Sizes of the workload"
RUN = "How it is run"
FILES = "Files to write"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Count = int | None


@app.command()
def shared_prompt(
    workload: Annotated[
        str | None,
        typer.Option(
            help="few-shot: one long preamble, many questions. multi-turn: conversations side by side that grow. "
            "tree: thoughts that branch from common states. document: many questions on one document. "
            "none: nothing shared, to see what the cache costs. All of it is text from Python's standard library.",
            show_default="few-shot",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help="Your own prompts instead, one JSON object a line (.gz too), with one of the fields prompt, input, "
            "question (texts), turns (a list of texts: a conversation), token_ids or input_tok_ids.",
        ),
    ] = None,
    requests: Annotated[
        Count, typer.Option(rich_help_panel=SIZES, help="few-shot, document, none: requests. --prompts: rows read.")
    ] = None,
    prefix_tokens: Annotated[
        Count, typer.Option(rich_help_panel=SIZES, help="Tokens that all requests begin with.")
    ] = None,
    suffix_tokens: Annotated[
        Count, typer.Option(rich_help_panel=SIZES, help="Tokens of each request, turn or thought of its own.")
    ] = None,
    output_tokens: Annotated[
        Count, typer.Option(rich_help_panel=SIZES, help="Tokens each request is answered with.")
    ] = None,
    sessions: Annotated[
        Count, typer.Option(rich_help_panel=SIZES, help="multi-turn: conversations side by side.")
    ] = None,
    turns: Annotated[Count, typer.Option(rich_help_panel=SIZES, help="multi-turn: turns of each conversation.")] = None,
    depth: Annotated[Count, typer.Option(rich_help_panel=SIZES, help="tree: levels below the root.")] = None,
    branching: Annotated[Count, typer.Option(rich_help_panel=SIZES, help="tree: continuations of each state.")] = None,
    model: Annotated[
        str | None, typer.Option(help="A local directory or a hub id.", show_default="demo: it ships with radixkv")
    ] = None,
    random_model: Annotated[
        str | None,
        typer.Option(
            metavar="SIZES",
            help="A Llama with random weights instead, as in hidden=512,layers=8,heads=8,kv_heads=2; "
            "also intermediate=, vocab=, head_dim=.",
        ),
    ] = None,
    baselines: Annotated[
        str, typer.Option(rich_help_panel=RUN, help="What to compare with, comma-separated.")
    ] = ",".join(BASELINES),
    rounds: Annotated[
        int, typer.Option(rich_help_panel=RUN, help="Times everything is run, interleaved; the medians count.")
    ] = 3,
    page_size: Annotated[int, typer.Option(rich_help_panel=RUN, help="radixkv: tokens a page.")] = 16,
    kv_cache_tokens: Annotated[
        Count,
        typer.Option(
            rich_help_panel=RUN, help="radixkv: tokens the KV pool holds.", show_default="enough for everything"
        ),
    ] = None,
    hf_batch_size: Annotated[
        int, typer.Option(rich_help_panel=RUN, help="Prompts in one call of Hugging Face's generate.")
    ] = 8,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", rich_help_panel=FILES, metavar="FILE.json", help="Write all figures as JSON."),
    ] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", rich_help_panel=FILES, metavar="FILE.png", help="Draw the figures.")
    ] = None,
) -> int:
    """Run the same prompts through radixkv with its cache on, with its cache off, and through Hugging Face's generate
    and generate_batch; check that all of them answer with the same greedy float32 tokens; compare.

    Without options: a few-shot prompt on the model that ships with radixkv. Others to try:

    \b
    --workload multi-turn --sessions 8 --turns 6 --plot turns.png
    --random-model hidden=512,layers=8,heads=8,kv_heads=2 --requests 16
    --prompts mine.jsonl --model path/to/model --json mine.json

    Exits with 1 if tokens differ, with 2 if the command cannot be run.
    """
    given = {
        "requests": requests,
        "prefix_tokens": prefix_tokens,
        "suffix_tokens": suffix_tokens,
        "output_tokens": output_tokens,
        "sessions": sessions,
        "turns": turns,
        "depth": depth,
        "branching": branching,
    }
    settings = Settings(
        baselines=tuple(name.strip() for name in baselines.split(",") if name.strip()),
        rounds=rounds,
        page_size=page_size,
        kv_cache_tokens=kv_cache_tokens,
        hf_batch_size=hf_batch_size,
    )
    sizes = {name: value for name, value in given.items() if value is not None}
    _check_files(json_file, plot_file)
    task = _task(workload, prompts, sizes, model, random_model)
    return _run(task, settings, json_file, plot_file)


def _task(
    workload: str | None, prompts: Path | None, sizes: dict[str, int], model: str | None, random_model: str | None
) -> job.Task:
    """The task that the command describes; BenchError where two options contradict each other."""
    if workload is not None and prompts is not None:
        raise BenchError("--workload and --prompts both say what to ask; give one of them")
    if model is not None and random_model is not None:
        raise BenchError("--model and --random-model both say which model to run; give one of them")
    source = model or "demo" if random_model is None else models.parse_random_model(random_model)
    if prompts is not None:
        return job.prompts_file_task(prompts, sizes, source)
    return job.named_workload_task(workload or "few-shot", sizes, source)


def _check_files(json_file: Path | None, plot_file: Path | None) -> None:
    """Find out before the run, not after it, that its figures have no place to go."""
    for path in (json_file, plot_file):
        if path is not None and not path.resolve().parent.is_dir():
            raise BenchError(f"cannot write {path}: there is no directory {path.parent}")
    if plot_file is not None:
        plot.check_plot(plot_file)


def _run(task: job.Task, settings: Settings, json_file: Path | None, plot_file: Path | None) -> int:
    """Run, print, write; the exit code."""
    errors = Console(stderr=True, soft_wrap=True)
    report, differences = job.run(task, settings, errors)
    reports.print_table(report, Console())
    if json_file is not None:
        reports.write_json(report, json_file)
    if plot_file is not None:
        plot.write_plot(report, plot_file)
    for written in filter(None, (json_file, plot_file)):
        errors.print(f"wrote {written}", highlight=False)
    for line in differences:
        errors.print(line, style="red", highlight=False)
    return 1 if differences else 0


def main() -> int:
    """The command; every mistake of its user is one line on stderr and exit code 2."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    return exit_code(app, "shared_prompt")


if __name__ == "__main__":
    sys.exit(main())
