"""A whole model's decode step against the time to read its weights and KV, and against Hugging Face's generate.

python bench/decode_step.py --help
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import decode_report
import decode_runs
import machine
import models
import random_decoders
from decode_report import Report
from decode_runs import BatchTimes, GenerateRunner, RadixKVRunner
from errors import BenchError, exit_code
from probes import Probes
from random_decoders import Decoder

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
PROMPT_TOKENS = {"cpu": 512, "cuda": 2048}

RUN = "How it is run"
FILES = "Files to write"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, slots=True)
class Task:
    """What is measured, and how often."""

    decoder: Decoder
    batches: Sequence[int]
    prompt_tokens: int
    output_tokens: int
    dtype: str
    device: torch.device
    backend: str
    rounds: int


@app.command()
def decode_step(
    batch: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1,8,32",
    prompt_tokens: Annotated[
        int | None, typer.Option(help="Tokens of each prompt.", show_default="512 on the CPU, 2048 on CUDA")
    ] = None,
    output_tokens: Annotated[int, typer.Option(help="Tokens each prompt is answered with.")] = 32,
    random_model: Annotated[
        str | None,
        typer.Option(
            metavar="SIZES",
            help="Sizes of the model, whose weights are random, as in hidden=512,layers=8,heads=8,kv_heads=2; "
            "also intermediate=, vocab=, head_dim=.",
            show_default="a Qwen2 of 387M weights on the CPU, the shape of Llama 3.1 8B on CUDA",
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="|".join(DTYPES), help="Of weights and KV.")] = "bfloat16",
    device: Annotated[
        str, typer.Option(rich_help_panel=RUN, help="cpu, cuda, or auto: CUDA if there is one.")
    ] = "auto",
    backend: Annotated[str, typer.Option(rich_help_panel=RUN, help="radixkv: its attention backend.")] = "auto",
    rounds: Annotated[
        int, typer.Option(rich_help_panel=RUN, help="Times everything is run, interleaved; the medians count.")
    ] = 3,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", rich_help_panel=FILES, metavar="FILE.json", help="Write all figures as JSON."),
    ] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", rich_help_panel=FILES, metavar="FILE.png", help="Draw the figures.")
    ] = None,
) -> int:
    """Time prefill and decode of a random model, by radixkv and by Hugging Face's generate on the same weights, and
    compare a decode step with its floor: the time to read the weights and the batch's KV once, at the speed at which
    the machine was seen to read.

    \b
    --batch 1,8 --json step.json --plot step.png
    --random-model hidden=512,layers=8,heads=8,kv_heads=2 --prompt-tokens 128

    Exits with 2 if the command cannot be run.
    """
    where = machine.choose_device(device)
    decoder = random_decoders.DEFAULTS[where.type]
    if random_model is not None:
        decoder = Decoder(decoder.family, models.parse_random_model(random_model), decoder.tied)
    tokens = PROMPT_TOKENS[where.type] if prompt_tokens is None else prompt_tokens
    task = Task(decoder, _parse_batches(batch), tokens, output_tokens, dtype, where, backend, rounds)
    _check(task, json_file, plot_file)
    errors = Console(stderr=True, soft_wrap=True)
    report = measure(task, errors)
    decode_report.print_table(report, Console())
    if json_file is not None:
        decode_report.write_json(report, json_file)
    if plot_file is not None:
        decode_report.write_plot(report, plot_file)
    for written in filter(None, (json_file, plot_file)):
        errors.print(f"wrote {written}", highlight=False)
    return 0


def _parse_batches(text: str) -> tuple[int, ...]:
    try:
        batches = tuple(sorted({int(size) for size in text.split(",")}))
    except ValueError:
        raise BenchError(f"--batch must be numbers, comma-separated, not {text!r}") from None
    if batches[0] < 1:
        raise BenchError(f"--batch must be 1 or more, not {text!r}")
    return batches


def _check(task: Task, json_file: Path | None, plot_file: Path | None) -> None:
    """Find out before the run, not after it, that it cannot be done."""
    for name, value, least in (
        ("--prompt-tokens", task.prompt_tokens, 1),
        ("--output-tokens", task.output_tokens, 2),
        ("--rounds", task.rounds, 1),
    ):
        if value < least:
            raise BenchError(f"{name} must be at least {least}, not {value}")
    if task.dtype not in DTYPES:
        raise BenchError(f"--dtype must be one of {', '.join(DTYPES)}, not {task.dtype!r}")
    for path in (json_file, plot_file):
        machine.check_place(path)
    if plot_file is not None:
        decode_report.check_plot(plot_file)


# -- measuring -------------------------------------------------------------------------------------------------------


def measure(task: Task, errors: Console, probes: Probes | None = None) -> Report:
    """Build the model and run all batch sizes, under a progress bar."""
    tokens = (task.prompt_tokens, task.output_tokens)
    model = random_decoders.build(task.decoder, sum(tokens), DTYPES[task.dtype], task.device)
    ours = RadixKVRunner(model, max(task.batches), *tokens, task.backend)
    runners = (ours, GenerateRunner(model))
    probes = probes or Probes(task.device, gemms=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    all_times: list[BatchTimes] = []
    with Progress(*columns, console=errors, transient=True) as progress:
        bar = progress.add_task("", total=len(task.batches) * task.rounds * len(runners))
        for batch in task.batches:
            turns = decode_runs.play(
                runners,
                batch,
                *tokens,
                vocab=task.decoder.sizes.vocab,
                rounds=task.rounds,
                probes=probes,
                device=task.device,
            )
            for name, times in turns:
                progress.update(bar, description=f"batch {batch}: {name}", completed=_turns([*all_times, times]))
            all_times.append(times)
    rows = [
        decode_report.row(
            times,
            prompt_tokens=task.prompt_tokens,
            output_tokens=task.output_tokens,
            weight_bytes=random_decoders.bytes_a_step(model),
            kv_token_bytes=ours.engine.kv_bytes_per_token,
        )
        for times in all_times
    ]
    probe_gb_s = median(speed for times in all_times for speed in times.read_gb_s)
    return Report(rows, probe_gb_s, _config(task, model, ours))


def _turns(all_times: Sequence[BatchTimes]) -> int:
    return sum(len(timings) for times in all_times for timings in times.timings.values())


def _config(task: Task, model: Any, ours: RadixKVRunner) -> dict[str, Any]:
    """How it was run, and the machine and the versions that the figures belong to."""
    parameters = sum(tensor.numel() for tensor in model.parameters())
    size = f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.0f}M"
    return {
        "title": f"{task.decoder.family} of {size} weights in {task.dtype}: {task.prompt_tokens} tokens in, "
        f"{task.output_tokens} out",
        "model": str(task.decoder),
        "parameters": parameters,
        "weight_bytes_a_step": random_decoders.bytes_a_step(model),
        "kv_bytes_per_token": ours.engine.kv_bytes_per_token,
        "prompt_tokens": task.prompt_tokens,
        "output_tokens": task.output_tokens,
        "rounds": task.rounds,
        "dtype": task.dtype,
        "backend": ours.engine.config.attention_backend,
        **machine.describe(task.device),
    }


def main() -> int:
    """The command; every mistake of its user is one line on stderr and exit code 2."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return exit_code(app, "decode_step")


if __name__ == "__main__":
    sys.exit(main())
