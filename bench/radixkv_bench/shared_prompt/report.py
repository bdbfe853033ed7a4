"""What bench/shared_prompt.py measured: as JSON and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from rich.console import Console

from radixkv_bench.common.machine import environment
from radixkv_bench.common.tables import number_table
from radixkv_bench.shared_prompt.measure import Round, percentile, speedup
from radixkv_bench.shared_prompt.oracle import Hits, best_hits, best_state_hits
from radixkv_bench.shared_prompt.workloads import Workload

Report = dict[str, Any]

HEADINGS = (
    "total\ns",
    "output\ntok/s",
    "TTFT\np50 s",
    "TTFT\np95 s",
    "tokens\ncomputed",
    "tokens\nreused",
    "peak KV\nMB",
    "radixkv\nfaster",
)


def build(workload: Workload, played: dict[str, list[Round]], *, tokens_equal: bool, config: dict[str, Any]) -> Report:
    """The JSON-ready report; the first of `played` is radixkv itself, the others are what it is compared with."""
    name, *baselines = played
    first = played[name][0]
    served = [(workload.prompt(number, first.outputs), answer.token_ids) for number, answer in first.answers.items()]
    hits = Hits(sum(len(prompt) for prompt, _ in served), first.usage.cached_tokens)
    prompt_tokens = hits.query_tokens
    return {
        "runs": {runner: _run(workload, rounds, prompt_tokens) for runner, rounds in played.items()},
        "speedup": {other: speedup(played[name], played[other]) for other in baselines},
        "tokens_equal": tokens_equal,
        "hit_rate": hits.rate,
        "best_hit_rate": _best_hits(served, config.get("state_interval_tokens")).rate,
        "config": {**config, **environment()},
    }


def _best_hits(served: Sequence[tuple[Sequence[int], Sequence[int]]], state_interval_tokens: int | None) -> Hits:
    """The best possible, to the token; of a model with recurrent layers, where states are kept."""
    if state_interval_tokens is None:
        return best_hits(served, page_size=1)
    return best_state_hits(served, state_interval_tokens)


def _run(workload: Workload, rounds: Sequence[Round], prompt_tokens: int) -> Report:
    """One runner's medians over its rounds."""
    total_s = median(done.total_s for done in rounds)
    output_tokens = len(workload.requests) * workload.output_tokens
    return {
        "total_s": total_s,
        "total_s_by_round": [done.total_s for done in rounds],
        "output_tokens_per_s": output_tokens / total_s,
        "ttft_p50_s": median(done.ttft_s(0.5) for done in rounds),
        "ttft_p95_s": median(done.ttft_s(0.95) for done in rounds),
        "ttft_p50_s_by_turn": [
            median(percentile(done.ttft_s_by_wave[wave], 0.5) for done in rounds) for wave in range(len(workload.waves))
        ],
        "requests": len(workload.requests),
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        **rounds[0].usage._asdict(),
    }


def print_table(report: Report, console: Console) -> None:
    """The comparison, a runner a row, then the hit rate."""
    console.print(report["config"]["title"], style="bold", highlight=False, soft_wrap=True)
    table = number_table(("",), HEADINGS, name_style="bold")
    for name, run in report["runs"].items():
        factor = report["speedup"].get(name)
        table.add_row(
            name,
            f"{run['total_s']:.2f}",
            f"{run['output_tokens_per_s']:.1f}",
            f"{run['ttft_p50_s']:.3f}",
            f"{run['ttft_p95_s']:.3f}",
            f"{run['computed_tokens']:,}",
            f"{run['cached_tokens']:,}",
            f"{run['peak_kv_bytes'] / 1e6:.1f}",
            "" if factor is None else f"{factor:.2f} ×",
        )
    console.print(table)
    _print_notes(report, console)


def _print_notes(report: Report, console: Console) -> None:
    console.print(
        f"Hit rate {report['hit_rate']:.1%} of the prompts' tokens; best possible, to the token, "
        f"{report['best_hit_rate']:.1%}. The last column: how many times as long as radixkv a runner took."
    )
    runs = report["runs"]
    turns = len(next(iter(runs.values()))["ttft_p50_s_by_turn"])
    if turns > 1:
        console.print("TTFT p50 by turn, s", style="bold")
        table = number_table(("",), (str(turn + 1) for turn in range(turns)), name_style="bold")
        for name, run in runs.items():
            table.add_row(name, *(f"{ttft:.3f}" for ttft in run["ttft_p50_s_by_turn"]))
        console.print(table)
    if report["tokens_equal"]:
        console.print(f"Greedy {report['config']['dtype']} tokens agree between all of them.", style="green")
