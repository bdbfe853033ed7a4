"""`radixkv replay --tiers`: reads the option, and shows what each tier would have given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from radixkv.cli.display import percent
from radixkv.cli.replay_plot import COLORS, save, short_count
from radixkv.cli.replay_report import Replayed
from radixkv.cli.token_counts import token_count
from radixkv.errors import ConfigError
from radixkv.replay.tiered import TieredResult, TierSize

TIER_NAMES = ("pool", "host", "disk", "shared")


def tier_sizes(text: str) -> list[TierSize]:
    """The tiers that `--tiers` names. Raises: ConfigError.

    >>> tier_sizes("pool:1M,disk:20M")
    [TierSize(name='pool', capacity_tokens=1000000), TierSize(name='disk', capacity_tokens=20000000)]
    """
    sizes = []
    for part in text.split(","):
        name, _, count = part.strip().partition(":")
        tokens = token_count(count)
        if name not in TIER_NAMES or tokens is None:
            raise ConfigError(
                f"--tiers must be names of {', '.join(TIER_NAMES)} with numbers of tokens, such as "
                f"pool:1M,disk:20M, not {text!r}"
            )
        sizes.append(TierSize(name, tokens))
    names = [size.name for size in sizes]
    if names != [name for name in TIER_NAMES if name in names] or names[0] != "pool":
        raise ConfigError(f"--tiers must begin with the pool and go downwards ({', '.join(TIER_NAMES)}), not {text!r}")
    return sizes


def tiers_text(sizes: Sequence[TierSize]) -> str:
    """Names and sizes of tiers, as `--tiers` takes them.

    >>> tiers_text([TierSize("pool", 500_000), TierSize("disk", 20_000_000)])
    'pool:500k,disk:20M'
    """
    return ",".join(f"{size.name}:{short_count(size.capacity_tokens)}" for size in sizes)


@dataclass(frozen=True, slots=True)
class TiersReport(Replayed):
    """What was replayed through tiers, and what came of it."""

    results: list[TieredResult]

    def as_dict(self) -> dict[str, Any]:
        """All figures by name, for `--json`."""
        results = [
            {
                "policy": result.policy,
                "tier_writes": result.writes,
                "hit_rate": result.hit_rate,
                "tiers": [asdict(tier) | {"hit_rate": result.share_of(tier)} for tier in result.tiers],
            }
            for result in self.results
        ]
        return self.what() | {"results": results}


def print_tiers_table(report: TiersReport) -> None:
    """Print the results on stdout: a row for each tier."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=escape(report.title),
        caption=f"so far: with the tiers above; ceiling, without limit: {percent(report.ceiling)}",
        box=box.SIMPLE,
    )
    for column in ("policy", "writes", "tier"):
        table.add_column(column)
    for column in ("capacity", "hit rate", "so far", "written", "evicted"):
        table.add_column(column, justify="right")
    for result in report.results:
        so_far = 0.0
        for number, tier in enumerate(result.tiers):
            so_far += result.share_of(tier)
            table.add_row(
                *((result.policy, result.writes if len(result.tiers) > 1 else "") if number == 0 else ("", "")),
                tier.name,
                short_count(tier.capacity_tokens),
                percent(result.share_of(tier)),
                percent(so_far),
                short_count(tier.written_tokens),
                short_count(tier.evicted_tokens),
                end_section=number == len(result.tiers) - 1,
            )
    Console().print(table)


def write_tiers_plot(report: TiersReport, path: Path) -> None:
    """Draw a bar of what each tier gave for each replay, into the image at `path`.

    Raises: ConfigError without matplotlib, and if the place cannot be written.
    """
    with save(path, report.title) as axes:
        rows = range(len(report.results))  # by number: sizes that differ by little have one label
        starts = [0.0] * len(rows)
        for number, name in enumerate(TIER_NAMES):
            shares = [
                100 * sum(result.share_of(tier) for tier in result.tiers if tier.name == name)
                for result in report.results
            ]
            if any(name == tier.name for result in report.results for tier in result.tiers):
                axes.barh(rows, shares, left=starts, label=name, color=COLORS[number], height=0.6)
            starts = [start + share for start, share in zip(starts, shares, strict=True)]
        axes.axvline(100 * report.ceiling, color="black", linestyle=":", linewidth=1.2, label="ceiling (no limit)")
        axes.set_axisbelow(True)
        axes.set_yticks(rows, labels=[_label(result) for result in report.results])
        axes.invert_yaxis()
        axes.set_xlabel("prompt tokens hit, %")
        axes.grid(axis="x", alpha=0.25)


def _label(result: TieredResult) -> str:
    sizes = "\n".join(f"{tier.name} {short_count(tier.capacity_tokens)}" for tier in result.tiers)
    writes = f", {result.writes}" if len(result.tiers) > 1 else ""
    return f"{result.policy}{writes}\n{sizes}"
