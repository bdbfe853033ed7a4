"""What the HTTP server costs and brings: against `transformers serve`, against the engine alone, and under load.

python bench/serving.py --help
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import typer

from radixkv_bench.common.command import Outcome, command, error_console
from radixkv_bench.common.device_timing import OnStep
from radixkv_bench.common.errors import BaselineError, BenchError
from radixkv_bench.common.machine import environment
from radixkv_bench.common.models import parse_random_model, quiet_transformers
from radixkv_bench.common.options import RUN, SIZES, Rounds
from radixkv_bench.common.progress import add_steps, quiet_bar
from radixkv_bench.serving import conversations, http_cost, report, retokenised, schema_cost, soak

MB_39 = "hidden=512,layers=8,heads=8,kv_heads=2"
CASES = ("transformers", "http", "schema", "retokenised")
KNOWN = (*CASES, "soak")


def _count(help_text: str, least: int = 1, most: int | None = None) -> Any:
    return typer.Option(min=least, max=most, rich_help_panel=SIZES, help=help_text)


@command("serving", plots=False)
def main(
    cases: Annotated[
        str, typer.Option(rich_help_panel=RUN, help=f"What to measure, comma-separated: {', '.join(CASES)}.")
    ] = ",".join(CASES),
    soak_only: Annotated[
        bool, typer.Option("--soak", rich_help_panel=RUN, help="Instead: many streams, then requests that are cut off.")
    ] = False,
    random_model: Annotated[
        str, typer.Option(metavar="SIZES", help="transformers: a Llama with random weights, as in shared_prompt.py.")
    ] = MB_39,
    clients: Annotated[int, _count("transformers: clients that converse side by side.")] = 16,
    system_tokens: Annotated[int, _count("transformers: tokens that all conversations begin with.")] = 1024,
    turns: Annotated[int, _count("transformers: turns of each conversation.")] = 6,
    user_tokens: Annotated[int, _count("transformers: tokens of a user's turn.")] = 64,
    output_tokens: Annotated[int, _count("transformers: tokens of an answer.")] = 32,
    streams: Annotated[int, _count("http: streams at once.")] = 64,
    batch: Annotated[int, _count("schema: streams at once.")] = 16,
    prompt_tokens: Annotated[int, _count("http, schema, retokenised: tokens of a prompt.", 4, 1024)] = 64,
    stream_tokens: Annotated[int, _count("http, schema: tokens of an answer.", 2, schema_cost.MAX_OUTPUT_TOKENS)] = 256,
    answers: Annotated[int, _count("retokenised: answers of --stream-tokens at most.")] = 200,
    soak_streams: Annotated[int, _count("--soak: streams at once.")] = 500,
    soak_stream_tokens: Annotated[int, _count("--soak: tokens of each.")] = 64,
    soak_requests: Annotated[int, _count("--soak: requests after them.", 4)] = 10_000,
    soak_at_once: Annotated[int, _count("--soak: of them at a time.")] = 64,
    soak_tokens: Annotated[int, _count("--soak: tokens of each.", 2)] = 16,
    attention_backend: Annotated[
        str, typer.Option(rich_help_panel=RUN, help="radixkv: as in `EngineConfig`.")
    ] = "auto",
    kv_cache_tokens: Annotated[
        int, typer.Option(min=1024, rich_help_panel=RUN, help="http, schema, --soak: tokens the KV pool holds.")
    ] = 65_536,
    rounds: Rounds = 3,
    seed: Annotated[int, typer.Option(min=0, rich_help_panel=RUN, help="Of the prompts.")] = 0,
) -> Outcome:
    """Measure servers that this command starts on free ports of 127.0.0.1, and ends. All ratios are of one run.

    transformers: conversations with radixkv and with `transformers serve --continuous-batching`, in float32.
    http: streams of the demo model against Engine.generate, and where the rest of the time goes.
    schema: decoding with and without a JSON schema.
    retokenised: how many answers are tokenised otherwise when they come back as text, and the cached tokens that costs.

    Exits with 1 if a stream of the soak does not finish or pages stay leased, with 2 if the command cannot be run.
    """
    quiet_transformers()
    chosen = ("soak",) if soak_only else tuple(name.strip() for name in cases.split(",") if name.strip())
    if unknown := set(chosen) - set(KNOWN):
        raise BenchError(f"--cases must be of {', '.join(KNOWN)}; {', '.join(sorted(unknown))} is not among them")
    backend = {"attention_backend": attention_backend}
    demo = {**backend, "kv_cache_tokens": kv_cache_tokens}
    talk = conversations.Talk(clients, system_tokens, turns, user_tokens, output_tokens)
    load = soak.Soak(soak_streams, soak_stream_tokens, soak_requests, soak_at_once, soak_tokens)
    measures: dict[str, tuple[int, Callable[[OnStep], dict[str, Any]]]] = {
        "transformers": (
            2 * rounds,
            lambda advance: conversations.measure(
                talk, parse_random_model(random_model), rounds, seed, backend, advance
            ),
        ),
        "http": (
            rounds + 2,
            lambda advance: http_cost.measure(streams, prompt_tokens, stream_tokens, rounds, seed, demo, advance),
        ),
        "soak": (soak_streams + soak_requests, lambda advance: soak.measure(load, seed, demo, advance)),
        "schema": (
            rounds + 1,
            lambda advance: schema_cost.measure(batch, prompt_tokens, stream_tokens, rounds, seed, demo, advance),
        ),
    }
    measures["retokenised"] = (
        answers,
        lambda advance: retokenised.measure(answers, prompt_tokens, stream_tokens, seed, demo, advance),
    )
    figures = {name: _run(name, *measures[name]) for name in measures if name in chosen}
    found = {"cases": figures, "config": environment()}
    failures = soak.failures(figures["soak"]) if "soak" in figures else []
    return Outcome(found, partial(report.print_tables, found), None, failures)


def _run(name: str, steps: int, measure: Callable[[OnStep], dict[str, Any]]) -> dict[str, Any]:
    """The figures of a case, or why it was left out."""
    with quiet_bar(error_console()) as progress:
        try:
            return measure(add_steps(progress, name, steps))
        except BaselineError as error:
            return {"left_out": str(error)}
