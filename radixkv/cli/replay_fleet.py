"""`radixkv replay --replicas`: reads its options, and shows what each router does with several replicas."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from radixkv.cli.display import percent, seconds
from radixkv.cli.replay_plot import COLORS, MARKERS, save, short_count
from radixkv.cli.replay_report import Replayed
from radixkv.cli.token_counts import token_count
from radixkv.cluster.router import ROUTERS, new_router
from radixkv.config import TierWrites
from radixkv.errors import ConfigError
from radixkv.replay.fleet import Fleet, FleetResult, Happening, Incident
from radixkv.replay.page_numbers import PagedTrace
from radixkv.replay.replicas import simulate_fleet

if TYPE_CHECKING:
    from rich.progress import Progress

MOST_REPLICAS = 4096
INCIDENTS: tuple[Incident, ...] = ("die", "drain", "join", "slow")


@dataclass(frozen=True, slots=True)
class FleetOptions:
    """What was asked for: one run for each of `fleets`, which differ in numbers and capacity, and `routers`."""

    fleets: tuple[Fleet, ...]
    routers: tuple[str, ...]

    @property
    def load(self) -> float:
        return self.fleets[0].load

    @property
    def shared_tokens(self) -> int:
        return self.fleets[0].shared_tokens


@dataclass(frozen=True, slots=True)
class FleetReport(Replayed):
    """What was replayed, and what came of it: with one cache of each capacity, and with replicas."""

    load: float
    shared_tokens: int
    one_cache: dict[int, float]
    results: list[FleetResult]

    def as_dict(self) -> dict[str, Any]:
        """All figures by name, for `--json`."""
        return self.what() | {
            "load": self.load,
            "shared_tokens": self.shared_tokens,
            "one_cache_hit_rate": next(iter(self.one_cache.values())),
            "replicas": [
                {
                    "router": result.router,
                    "replicas": result.num_replicas,
                    "capacity_tokens": result.capacity_tokens,
                    "hit_rate": result.hit_rate,
                    "shared_hit_rate": result.shared_hit_rate,
                    "one_cache_hit_rate": self.one_cache[result.capacity_tokens],
                    "share_of_one_cache": self.share_of(result),
                    "max_over_mean_work": result.max_over_mean_work,
                    "ttft_p50_s": result.ttft_percentile_s(50),
                    "ttft_p99_s": result.ttft_percentile_s(99),
                }
                for result in self.results
            ],
        }

    def share_of(self, result: FleetResult) -> float:
        """The hit rate of `result`, as a share of what one cache of the whole capacity hits; 1 if that is nothing."""
        alone = self.one_cache[result.capacity_tokens]
        return result.hit_rate / alone if alone else 1.0


# ------------------------------------------------------------------------------------------------------- command line


def check_of_use(policy: str, tiers: Sequence[str] | None, writes: Sequence[TierWrites]) -> None:
    """Raise ConfigError for options that simulated replicas have no use for."""
    if tiers:
        raise ConfigError("--replicas go with --capacity-tokens and --shared-tier, not with --tiers")
    if policy != "lru":
        raise ConfigError(f"simulated replicas evict in LRU order; --replicas does not go with --policy {policy}")
    if list(writes) != ["through"]:
        raise ConfigError("a shared tier gets all that is computed; --replicas needs --tier-writes through")


def asked_fleets(
    replicas: str | None,
    router: str | None,
    capacities: Sequence[int],
    *,
    load: float | None,
    shared_tier: str | None,
    decode_s: float | None,
    happenings: Sequence[str] | None,
) -> FleetOptions | None:
    """What the options ask for; None without `replicas`, which all others need. Raises: ConfigError."""
    if replicas is None:
        given = {"--router": router, "--load": load, "--shared-tier": shared_tier, "--decode-s": decode_s}
        _check_unused(given | {"--happening": happenings or None})
        return None
    return _fleet_options(
        replicas,
        "cost" if router is None else router,
        capacities,
        load=0.6 if load is None else load,
        shared_tier=shared_tier,
        decode_s=0.0 if decode_s is None else decode_s,
        happenings=happenings or (),
    )


def _check_unused(options: Mapping[str, object]) -> None:
    """Raise ConfigError if options were given that only replicas have a use for."""
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"{name} needs --replicas, the number of replicas to simulate")


def _fleet_options(
    replicas: str,
    router: str,
    capacities: Sequence[int],
    *,
    load: float,
    shared_tier: str | None,
    decode_s: float,
    happenings: Sequence[str],
) -> FleetOptions:
    """What the options ask for. Raises: ConfigError."""
    shared_tokens = 0
    if shared_tier is not None:
        count = token_count(shared_tier)
        if count is None:
            raise ConfigError(f"--shared-tier must be a number of tokens, such as 20M, not {shared_tier!r}")
        shared_tokens = count
    planned = tuple(_happening(text) for text in happenings)
    return FleetOptions(
        tuple(
            Fleet(number, capacity, shared_tokens, load, decode_s=decode_s, happenings=planned)
            for capacity, number in product(capacities, _replica_counts(replicas))
        ),
        tuple(_routers(router)),
    )


def _replica_counts(text: str) -> list[int]:
    counts = [int(part) if re.fullmatch(r"\s*[0-9]{1,9}\s*", part) else 0 for part in text.split(",")]
    if not all(1 <= count <= MOST_REPLICAS for count in counts):
        raise ConfigError(f"--replicas must be numbers from 1 to {MOST_REPLICAS:,}, comma-separated, not {text!r}")
    return list(dict.fromkeys(counts))


def _routers(text: str) -> list[str]:
    names = [part.strip() for part in text.split(",")]
    for name in names:
        if name not in ROUTERS:
            raise ConfigError(f"unknown router {name!r}; the routers are {', '.join(ROUTERS)}")
    return list(dict.fromkeys(names))


def _happening(text: str) -> Happening:
    """What `--happening` tells: requests, what, and a replica and a factor where they have a meaning.

    >>> _happening("6000:die:3"), _happening("100:slow:0:4").factor
    (Happening(after_requests=6000, what='die', replica=3, factor=1.0), 4.0)
    """
    match = re.fullmatch(r"(\d+):(?:(join)|(die|drain):(\d+)|(slow):(\d+):(\d+(?:\.\d+)?))", text.strip())
    if match is None or (match[7] and not float(match[7]) > 0):
        raise ConfigError(
            "--happening must be a number of requests and what happens then, such as 6000:die:3, 6000:drain:3, "
            f"6000:slow:3:4 (4 times) or 6000:join, not {text!r}"
        )
    word = match[2] or match[3] or match[5]
    (what,) = (incident for incident in INCIDENTS if incident == word)
    return Happening(int(match[1]), what, int(match[4] or match[6] or 0), float(match[7] or 1))


# --------------------------------------------------------------------------------------------------------------- work


def simulate_fleets(trace: PagedTrace, options: FleetOptions, progress: Progress) -> list[FleetResult]:
    """What each router does with each fleet."""
    runs = list(product(options.fleets, options.routers))
    bar = progress.add_task("", total=len(runs) * len(trace.requests))
    results = []
    for fleet, router in runs:
        progress.update(bar, description=f"{router}, {fleet.num_replicas} replicas")
        results.append(
            simulate_fleet(trace, fleet, new_router(router), router, on_progress=partial(progress.advance, bar))
        )
    return results


def print_fleet_table(report: FleetReport) -> None:
    """Print the results on stdout: a row for each router and number of replicas."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    alone = ", ".join(f"{percent(rate)} with {capacity:,} tokens" for capacity, rate in report.one_cache.items())
    table = Table(
        title=escape(report.title),
        caption=f"one cache: {alone}; ceiling, without limit: {percent(report.ceiling)}\n"
        f"p50 and p99: time to the first token, at a load of {percent(report.load)} without hits",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    columns = [name for name in _cells(report, report.results[0]) if name != "shared" or report.shared_tokens]
    for column in columns:
        table.add_column(column, justify="left" if column == "router" else "right")
    for result, following in zip_longest(report.results, report.results[1:]):
        ends = following is None or _group(following) != _group(result)
        cells = _cells(report, result)
        table.add_row(*(cells[column] for column in columns), end_section=ends)
    Console().print(table)


def _cells(report: FleetReport, result: FleetResult) -> dict[str, str]:
    return {
        "replicas": f"{result.num_replicas} × {short_count(result.capacity_tokens / result.num_replicas)}",
        "router": result.router,
        "hits": percent(result.hit_rate),
        "shared": percent(result.shared_hit_rate),
        "of one": percent(report.share_of(result)),
        "max/mean": f"{result.max_over_mean_work:.3f}",
        "p50": _short_s(result.ttft_percentile_s(50)),
        "p99": _short_s(result.ttft_percentile_s(99)),
    }


def _group(result: FleetResult) -> tuple[int, int]:
    return result.capacity_tokens, result.num_replicas


def _short_s(duration_s: float) -> str:
    return seconds(duration_s) if duration_s < 100 else f"{duration_s:,.0f} s"


def write_fleet_plot(report: FleetReport, path: Path) -> None:
    """Draw hit rate over TTFT, a line for each router through its numbers of replicas, into the image at `path`.

    Raises: ConfigError without matplotlib, and if the place cannot be written.
    """
    with save(path, report.title) as axes:
        axes.axhline(100, color="black", linestyle=":", linewidth=1.2, label="one cache")
        for index, router in enumerate(dict.fromkeys(result.router for result in report.results)):
            color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
            for number, capacity in enumerate(report.one_cache):
                results = [r for r in report.results if (r.router, r.capacity_tokens) == (router, capacity)]
                times_s = [result.ttft_percentile_s(50) for result in results]
                shares = [100 * report.share_of(result) for result in results]
                axes.plot(times_s, shares, color=color, marker=marker, label=router if number == 0 else None)
                if len(results) == 1:
                    continue
                for time_s, share, result in zip(times_s, shares, results, strict=True):
                    axes.annotate(str(result.num_replicas), (time_s, share), textcoords="offset points", xytext=(5, 4))
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("median time to the first token, seconds (at points: replicas)")
        axes.set_ylabel("hit rate, % of one cache's")
        axes.grid(alpha=0.25)
