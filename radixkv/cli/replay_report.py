"""What `radixkv replay` found: the figures, as JSON and as a table."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from radixkv.cli.display import percent
from radixkv.replay.simulation import BELADY, ReplayResult


@dataclass(frozen=True, slots=True)
class Replayed:
    """What was replayed. `page_tokens` tokens are hit, stored and evicted together."""

    trace: str
    requests: int
    tokens: int
    malformed_lines: int
    keys: str
    page_tokens: int
    ceiling: float

    @property
    def title(self) -> str:
        """What tables and pictures are called."""
        return f"{Path(self.trace).name}: {self.requests:,} requests, {self.tokens:,} tokens"

    def what(self) -> dict[str, Any]:
        """What was replayed, by name."""
        return {field.name: getattr(self, field.name) for field in fields(Replayed)}


@dataclass(frozen=True, slots=True)
class ReplayReport(Replayed):
    """What was replayed, and what came of it."""

    results: list[ReplayResult]

    def as_dict(self) -> dict[str, Any]:
        """All figures by name, for `--json`."""
        return self.what() | {
            "results": [
                {
                    "policy": result.policy,
                    "capacity_tokens": result.capacity_tokens,
                    "hit_rate": result.hit_rate,
                    "evicted_tokens": result.evicted_tokens,
                    "us_per_request": result.us_per_request,
                }
                for result in self.results
            ],
        }


def print_table(report: ReplayReport) -> None:
    """Print the results on stdout."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=escape(report.title),
        caption=f"{BELADY}: the clairvoyant optimum; ceiling, without limit: {percent(report.ceiling)}",
        box=box.SIMPLE,
    )
    for column in ("capacity", "policy", "hit rate", "evicted tokens", "µs a request"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for result in report.results:
        table.add_row(
            f"{result.capacity_tokens:,}",
            result.policy,
            percent(result.hit_rate),
            f"{result.evicted_tokens:,}",
            f"{result.us_per_request:,.1f}",
            end_section=result.policy == report.results[-1].policy,
        )
    Console().print(table)
