"""What `radixkv replay` found: the figures, as JSON and as a table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from radixkv.cli.display import percent
from radixkv.replay.simulation import BELADY, ReplayResult


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """What was replayed, and what came of it. `page_tokens` tokens are hit, stored and evicted together."""

    trace: str
    requests: int
    tokens: int
    malformed_lines: int
    keys: str
    page_tokens: int
    ceiling: float
    results: list[ReplayResult]

    def as_dict(self) -> dict[str, Any]:
        """All figures by name, for `--json`."""
        return {
            "trace": self.trace,
            "requests": self.requests,
            "tokens": self.tokens,
            "malformed_lines": self.malformed_lines,
            "keys": self.keys,
            "page_tokens": self.page_tokens,
            "ceiling": self.ceiling,
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
        title=f"{escape(Path(report.trace).name)}: {report.requests:,} requests, {report.tokens:,} tokens",
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
