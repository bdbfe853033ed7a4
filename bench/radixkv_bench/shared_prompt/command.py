"""What it brings to compute a shared prefix once: radixkv against no cache, and against Hugging Face's own ways.

python bench/shared_prompt.py --help
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from radixkv_bench.common import models
from radixkv_bench.common.command import Outcome, command, error_console
from radixkv_bench.common.errors import BenchError
from radixkv_bench.common.options import RUN, ModelName, RandomModelSizes, Rounds, choose_model, size
from radixkv_bench.shared_prompt import job, plot
from radixkv_bench.shared_prompt import report as reports
from radixkv_bench.shared_prompt.job import BASELINES, Settings

Count = int | None
ALL_BASELINES = ",".join(BASELINES)


Workload = Annotated[
    str | None,
    typer.Option(
        help="few-shot: one long preamble, many questions. multi-turn: conversations side by side that grow. "
        "tree: thoughts that branch from common states. document: many questions on one document. "
        "none: nothing shared, to see what the cache costs. All of it is text from Python's standard library.",
        show_default="few-shot",
    ),
]
PromptsFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.jsonl",
        help="Your own prompts instead, one JSON object a line (.gz too), with one of the fields prompt, input, "
        "question (texts), turns (a list of texts: a conversation), token_ids or input_tok_ids.",
    ),
]
Baselines = Annotated[str, typer.Option(rich_help_panel=RUN, help="What to compare with, comma-separated.")]
PageSize = Annotated[int, typer.Option(min=1, rich_help_panel=RUN, help="radixkv: tokens a page.")]
PoolTokens = Annotated[
    Count,
    typer.Option(
        min=1, rich_help_panel=RUN, help="radixkv: tokens the KV pool holds.", show_default="enough for everything"
    ),
]
BatchSize = Annotated[
    int, typer.Option(min=1, rich_help_panel=RUN, help="Prompts in one call of Hugging Face's generate.")
]


@command("shared_prompt")
def main(
    workload: Workload = None,
    prompts: PromptsFile = None,
    requests: Annotated[Count, size("few-shot, document, none: requests. --prompts: rows read.")] = None,
    prefix_tokens: Annotated[Count, size("Tokens that all requests begin with.")] = None,
    suffix_tokens: Annotated[Count, size("Tokens of each request, turn or thought of its own.")] = None,
    output_tokens: Annotated[Count, size("Tokens each request is answered with.")] = None,
    sessions: Annotated[Count, size("multi-turn: conversations side by side.")] = None,
    turns: Annotated[Count, size("multi-turn: turns of each conversation.")] = None,
    depth: Annotated[Count, size("tree: levels below the root.")] = None,
    branching: Annotated[Count, size("tree: continuations of each state.")] = None,
    model: ModelName = None,
    random_model: RandomModelSizes = None,
    baselines: Baselines = ALL_BASELINES,
    rounds: Rounds = 3,
    page_size: PageSize = 16,
    kv_cache_tokens: PoolTokens = None,
    hf_batch_size: BatchSize = 8,
) -> Outcome:
    """Run the same prompts through radixkv with its cache on, with its cache off, and through Hugging Face's generate
    and generate_batch; check that all of them answer with the same greedy float32 tokens; compare.

    Without options: a few-shot prompt on the model that ships with radixkv. Others to try:

    \b
    --workload multi-turn --sessions 8 --turns 6 --plot turns.png
    --random-model hidden=512,layers=8,heads=8,kv_heads=2 --requests 16
    --prompts mine.jsonl --model path/to/model --json mine.json

    Exits with 1 if tokens differ, with 2 if the command cannot be run.
    """
    models.quiet_transformers()
    sizes = _given(
        requests=requests,
        prefix_tokens=prefix_tokens,
        suffix_tokens=suffix_tokens,
        output_tokens=output_tokens,
        sessions=sessions,
        turns=turns,
        depth=depth,
        branching=branching,
    )
    settings = Settings(
        baselines=tuple(name.strip() for name in baselines.split(",") if name.strip()),
        rounds=rounds,
        page_size=page_size,
        kv_cache_tokens=kv_cache_tokens,
        hf_batch_size=hf_batch_size,
    )
    task = _task(workload, prompts, sizes, model, random_model)
    report, differences = job.run(task, settings, error_console())
    return Outcome(report, partial(reports.print_table, report), partial(plot.write_plot, report), differences)


def _given(**sizes: Count) -> dict[str, int]:
    """The sizes that the command line sets."""
    return {name: value for name, value in sizes.items() if value is not None}


def _task(
    workload: str | None, prompts: Path | None, sizes: dict[str, int], model: str | None, random_model: str | None
) -> job.Task:
    """The task that the command describes; BenchError where two options contradict each other."""
    if workload is not None and prompts is not None:
        raise BenchError("--workload and --prompts both say what to ask; give one of them")
    source = choose_model(model, random_model)
    if prompts is not None:
        return job.prompts_file_task(prompts, sizes, source)
    return job.named_workload_task(workload or "few-shot", sizes, source)
