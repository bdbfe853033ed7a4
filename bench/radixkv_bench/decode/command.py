"""A whole model's decode step against the time to read its weights and KV, and against Hugging Face's generate.

python bench/decode_step.py --help
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from radixkv_bench.common import machine, models, random_decoders
from radixkv_bench.common.command import Outcome, command, error_console
from radixkv_bench.common.errors import BenchError
from radixkv_bench.common.files import parse_numbers
from radixkv_bench.common.options import DTYPES, RUN, Device, Rounds, choose_dtype
from radixkv_bench.common.probes import Probes
from radixkv_bench.common.progress import counting_bar
from radixkv_bench.common.random_decoders import Decoder
from radixkv_bench.common.runners import RadixKVRunner
from radixkv_bench.decode import report as decode_report
from radixkv_bench.decode import runs as decode_runs
from radixkv_bench.decode.report import Report
from radixkv_bench.decode.runs import BatchTimes

PROMPT_TOKENS = {"cpu": 512, "cuda": 2048}


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


@command("decode_step")
def main(
    batch: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1,8,32",
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of each prompt.", show_default="512 on the CPU, 2048 on CUDA")
    ] = None,
    output_tokens: Annotated[int, typer.Option(min=2, help="Tokens each prompt is answered with.")] = 32,
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
    device: Device = "auto",
    backend: Annotated[str, typer.Option(rich_help_panel=RUN, help="radixkv: its attention backend.")] = "auto",
    rounds: Rounds = 3,
) -> Outcome:
    """Time prefill and decode of a random model, by radixkv and by Hugging Face's generate on the same weights, and
    compare a decode step with its floor: the time to read the weights and the batch's KV once, at the speed at which
    the machine was seen to read.

    \b
    --batch 1,8 --json step.json --plot step.png
    --random-model hidden=512,layers=8,heads=8,kv_heads=2 --prompt-tokens 128

    Exits with 2 if the command cannot be run.
    """
    models.quiet_transformers()
    where = machine.choose_device(device)
    choose_dtype(dtype)
    decoder = random_decoders.DEFAULTS[where.type]
    if random_model is not None:
        decoder = Decoder(decoder.family, models.parse_random_model(random_model), decoder.tied)
    tokens = PROMPT_TOKENS[where.type] if prompt_tokens is None else prompt_tokens
    task = Task(decoder, _parse_batches(batch), tokens, output_tokens, dtype, where, backend, rounds)
    report = measure(task, error_console())
    return Outcome(
        report.as_dict(), partial(decode_report.print_table, report), partial(decode_report.write_plot, report)
    )


def _parse_batches(text: str) -> tuple[int, ...]:
    batches = parse_numbers("--batch", text)
    if batches[0] < 1:
        raise BenchError(f"--batch must be 1 or more, not {text!r}")
    return batches


# -- measuring -------------------------------------------------------------------------------------------------------


def measure(task: Task, errors: Console, probes: Probes | None = None) -> Report:
    """Build the model and run all batch sizes, under a progress bar."""
    tokens = (task.prompt_tokens, task.output_tokens)
    model = random_decoders.build(task.decoder, sum(tokens), DTYPES[task.dtype], task.device)
    runners = decode_runs.make_runners(model, max(task.batches), *tokens, task.backend)
    ours = runners[0]
    probes = probes or Probes(task.device, gemms=False)
    all_times: list[BatchTimes] = []
    with counting_bar(errors) as progress:
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
            kv_token_bytes=ours.kv_bytes_per_token,
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
        "kv_bytes_per_token": ours.kv_bytes_per_token,
        "prompt_tokens": task.prompt_tokens,
        "output_tokens": task.output_tokens,
        "rounds": task.rounds,
        "dtype": task.dtype,
        "backend": ours.engine.config.attention_backend,
        **machine.describe(task.device),
    }
