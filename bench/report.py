"""What was measured, as a table, as JSON and as a picture."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from rich import box
from rich.console import Console
from rich.table import Table

from errors import BenchError
from measure import Round, percentile, speedup
from oracle import Hits, best_hits
from workloads import Workload

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
        "best_hit_rate": best_hits(served, page_size=1).rate,
        "config": {**config, **environment()},
    }


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


def environment() -> dict[str, Any]:
    """The machine and the versions that the figures belong to."""
    return {
        "dtype": "float32",
        "device": "cpu",
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _processor() -> str:
    """The processor's name, as the kernel gives it where there is /proc/cpuinfo."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_json(report: Report, path: Path) -> None:
    """Write `report`; BenchError if the place cannot be written."""
    try:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise BenchError(f"cannot write {path}: {error.strerror}") from None


def print_table(report: Report, console: Console) -> None:
    """The comparison, a runner a row, then the hit rate."""
    console.print(report["config"]["title"], style="bold", highlight=False, soft_wrap=True)
    table = _table(*HEADINGS)
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


def _table(*headings: str) -> Table:
    """A table of a name and numbers that fits 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("", style="bold", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True, min_width=6)
    return table


def _print_notes(report: Report, console: Console) -> None:
    console.print(
        f"Hit rate {report['hit_rate']:.1%} of the prompts' tokens; best possible, to the token, "
        f"{report['best_hit_rate']:.1%}. The last column: how many times as long as radixkv a runner took."
    )
    runs = report["runs"]
    turns = len(next(iter(runs.values()))["ttft_p50_s_by_turn"])
    if turns > 1:
        console.print("TTFT p50 by turn, s", style="bold")
        table = _table(*(str(turn + 1) for turn in range(turns)))
        for name, run in runs.items():
            table.add_row(name, *(f"{ttft:.3f}" for ttft in run["ttft_p50_s_by_turn"]))
        console.print(table)
    if report["tokens_equal"]:
        console.print(f"Greedy {report['config']['dtype']} tokens agree between all of them.", style="green")
