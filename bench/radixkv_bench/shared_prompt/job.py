"""From what the command asks for to a report: model and workload, runners, rounds, checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from radixkv import EngineConfig
from radixkv_bench.common import models
from radixkv_bench.common.errors import BenchError
from radixkv_bench.common.models import RandomModel
from radixkv_bench.common.progress import counting_bar
from radixkv_bench.common.runners import GenerateRunner, RadixKVRunner, Runner
from radixkv_bench.shared_prompt import prompts_file, workloads
from radixkv_bench.shared_prompt import report as reports
from radixkv_bench.shared_prompt.hf_runners import GenerateBatchRunner
from radixkv_bench.shared_prompt.measure import Disagreement, Round, disagreements, interleave, warm_up
from radixkv_bench.shared_prompt.workloads import Workload

RADIXKV, NOCACHE, GENERATE, GENERATE_BATCH = "radixkv", "radixkv-nocache", "hf-generate", "hf-generate-batch"
BASELINES = (NOCACHE, GENERATE, GENERATE_BATCH)
PROMPTS_FILE_SIZES = {"requests": 32, "output_tokens": 16}
"""Rows read of a prompts file and tokens each is answered with, where the command says nothing."""


@dataclass(frozen=True)
class Settings:
    """How a workload is run; checked when made."""

    baselines: tuple[str, ...] = BASELINES
    rounds: int = 3
    page_size: int = 16
    kv_cache_tokens: int | None = None
    hf_batch_size: int = 8

    def __post_init__(self) -> None:
        for name in self.baselines:
            if name not in BASELINES:
                raise BenchError(f"unknown baseline {name!r}; the baselines are {', '.join(BASELINES)}")


@dataclass(frozen=True)
class Task:
    """A workload and the unmodified model that it is run on, with the sizes and names that the report states."""

    workload: Workload
    model: Any
    config: dict[str, Any]


def named_workload_task(name: str, given: dict[str, int], model: str | RandomModel) -> Task:
    """The workload `name`, its own sizes replaced by those `given`, on `model`."""
    sizes = workloads.sizes(name, given)
    encode = models.load_encode(_tokenizer(model))
    return _task(workloads.build(name, sizes, encode), model, {"workload": name, **sizes})


def prompts_file_task(path: Path, given: dict[str, int], model: str | RandomModel) -> Task:
    """The prompts in the file at `path` on `model`."""
    workloads.check_known("--prompts", given, tuple(PROMPTS_FILE_SIZES))
    sizes = {**PROMPTS_FILE_SIZES, **given}
    encode = models.load_encode(_tokenizer(model))
    workload = prompts_file.read(path, encode, rows=sizes["requests"], output_tokens=sizes["output_tokens"])
    return _task(workload, model, {"workload": "prompts", "prompts": path.name, **sizes})


def _tokenizer(model: str | RandomModel) -> str:
    """Whose tokenizer to use: a random model has none and takes the demo model's."""
    return model if isinstance(model, str) else "demo"


def _task(workload: Workload, model: str | RandomModel, config: dict[str, Any]) -> Task:
    """Load the model and check that every prompt fits it."""
    if isinstance(model, str):
        loaded, name = models.load(model), {"model": model}
    else:
        loaded, name = models.build_random(model, workload.longest_tokens), {"random_model": str(model)}
    _check_fits(workload, loaded)
    title = (
        f"{workload.name}: {len(workload.requests)} requests, {workload.prompt_tokens:,} prompt tokens, "
        f"{workload.output_tokens} out each\n{' '.join(name.values())}"
    )
    return Task(workload, loaded, {"title": title, **name, **config})


def _check_fits(workload: Workload, model: Any) -> None:
    """BenchError if a prompt with its answer is longer than the model's context, or holds an id it does not know."""
    limit, vocab_size = models.context_tokens(model), model.config.get_text_config().vocab_size
    if limit is not None and workload.longest_tokens > limit:
        raise BenchError(
            f"the longest prompt with its answer has {workload.longest_tokens} tokens, but the model's context ends at "
            f"{limit}; make the prompts shorter or take --random-model, which serves any length"
        )
    largest = max(max(request.tokens) for request in workload.requests)
    if largest >= vocab_size:
        raise BenchError(
            f"the prompts hold the id {largest}, but the model knows only ids below {vocab_size}; take the model "
            "they are for, or --random-model with a larger vocab"
        )


def run(task: Task, settings: Settings, progress_console: Console) -> tuple[reports.Report, list[str]]:
    """Run the task with all runners. Returns the report, and a line for each way in which tokens differed."""
    runners = make_runners(task, settings)
    played = _play(task.workload, runners, settings.rounds, progress_console)
    reference = GENERATE if GENERATE in played else runners[-1].name
    found = list(dict.fromkeys(disagreements(played, reference)))
    config = {**task.config, "rounds": settings.rounds, "page_size": settings.page_size}
    config["hf_batch_size"] = settings.hf_batch_size
    for resolved in (runner.engine.config for runner in runners if isinstance(runner, RadixKVRunner)):
        if resolved.state_slots is not None:
            config["state_interval_tokens"] = resolved.state_interval_tokens
    report = reports.build(task.workload, played, tokens_equal=not found, config=config)
    return report, [explain(task, played[reference][0], difference) for difference in found]


def make_runners(task: Task, settings: Settings) -> list[Runner]:
    """radixkv first, then the baselines; each has an instance of the model of its own, with the same weights."""
    workload, model = task.workload, task.model
    rounded_up = workload.unshared_tokens + settings.page_size * len(workload.requests)
    config = EngineConfig(
        dtype="float32",
        device="cpu",
        page_size=settings.page_size,
        kv_cache_tokens=settings.kv_cache_tokens or rounded_up,
    )
    own = RadixKVRunner(RADIXKV, model, config)
    made: list[Runner] = [own]
    for name in settings.baselines:
        if name == NOCACHE:
            made.append(RadixKVRunner(name, model, replace(config, prefix_cache=False)))
        elif name == GENERATE:
            made.append(GenerateRunner(name, model, settings.hf_batch_size, own.kv_bytes_per_token))
        else:
            made.append(GenerateBatchRunner(name, model, GenerateBatchRunner.pool_tokens(workload)))
    return made


def _play(workload: Workload, runners: Sequence[Runner], rounds: int, console: Console) -> dict[str, list[Round]]:
    """All rounds, under a progress bar that counts waves."""
    with counting_bar(console) as progress:
        bar = progress.add_task("warming up", total=rounds * len(runners) * len(workload.waves))
        warm_up(workload, runners)

        def on_play(name: str, number: int) -> None:
            progress.update(bar, description=f"round {number + 1} of {rounds}: {name}")

        return interleave(workload, runners, rounds, on_play=on_play, on_wave=lambda: progress.advance(bar))


def explain(task: Task, reference: Round, found: Disagreement) -> str:
    """One line on where two runners differ, and how close the unmodified model's choice is there."""
    prompt = task.workload.prompt(found.request, reference.outputs)
    best = models.top_two(task.model, prompt + reference.outputs[found.request][: found.position])
    return (
        f"tokens differ: at token {found.position} of request {found.request} {found.name} gives {found.token} and "
        f"{found.other} gives {found.other_token}; the unmodified model alone prefers {best.first} to {best.second} "
        f"there by {best.gap:.2g} of logit"
    )
