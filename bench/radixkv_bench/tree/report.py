"""What bench/radix_tree.py measured: as tables, as JSON, and as a picture (matplotlib, from the `bench` extra)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from radixkv_bench.common import pictures
from radixkv_bench.common.tables import number_table
from radixkv_bench.tree.growth import EVICT_FIRST, LASTING, NO_PROBES, SHAPES, UNLIMITED, Growth, Probed, Shape
from radixkv_bench.tree.memory import EDGE_TOKENS, OPERATIONS, CopyRace, Metadata, Replay
from radixkv_bench.tree.tail import SLOW_US, Pause, Tail

GROWTH_LIMIT = 2.0
COPY_LIMIT = 3.0
BYTES_LIMITS = {1: 10.0, 16: 5.0}  # by page size

COLORS = ("#c8553d", "#588b8b", "#e0a458", "#4f6d9a", "#8a6ba1", "#7a9e4f", "#b5838d", "#3d405b")
MARKERS = "os^Dv<>P"


@dataclass(frozen=True, slots=True)
class Target:
    """A figure that ought not to be above `limit`."""

    value: float
    limit: float

    @property
    def met(self) -> bool:
        return self.value <= self.limit


@dataclass(frozen=True, slots=True)
class Report:
    """What was measured; `config` tells how and where."""

    growth: list[Growth]
    memcpy: list[CopyRace]
    probes: list[Probed]
    metadata: list[Metadata]
    replay: list[Replay]
    config: dict[str, Any]
    tails: list[Tail] = field(default_factory=list)
    pauses: list[Pause] = field(default_factory=list)

    def targets(self) -> dict[str, Target]:
        """The figures that have a limit, by what they are about."""
        unprobed = next((row.nodes for row in self.probes if row.probes == NO_PROBES), 1)
        return {
            **{_about(row): Target(row.ratio, GROWTH_LIMIT) for row in self.growth if row.operation not in UNLIMITED},
            **{_about(row): Target(row.ratio, COPY_LIMIT) for row in self.memcpy if row.edges == 1},
            **{_about(row): Target(row.nodes / unprobed, 1.0) for row in self.probes if row.probes not in LASTING},
            **{_about(row): Target(row.bytes_per_token, BYTES_LIMITS[row.page_size]) for row in self.metadata},
            **{_about(row): Target(row.max_us, SLOW_US) for row in self.tails},
        }

    def as_dict(self) -> dict[str, Any]:
        """All figures by name, for `--json`."""
        targets = {about: {**asdict(target), "met": target.met} for about, target in self.targets().items()}
        return {"targets": targets, **asdict(self)}


def _about(row: Growth | CopyRace | Probed | Metadata | Tail) -> str:
    match row:
        case Tail():
            return f"{row.operation}: slowest of {row.calls:,} calls with {row.leaves:,} leaves"
        case Growth():
            return f"{row.operation}: {row.shape} tree, largest to smallest"
        case CopyRace():
            edges = "one edge" if row.edges == 1 else f"{row.edges} edges"
            return f"match of {row.tokens} tokens in {edges} to a copy"
        case Probed():
            return f"nodes after probes ({row.probes}) to none"
        case Metadata():
            return f"bytes a token at page size {row.page_size}, {row.page_ids} page ids"


# -- tables ----------------------------------------------------------------------------------------------------------


def print_tables(report: Report, console: Console) -> None:
    """A table for each thing that was measured, and how many targets were met."""
    targets = report.targets()
    if report.growth:  # the whole bench was run
        for shape in Shape:
            _print_growth(shape, [row for row in report.growth if row.shape is shape], targets, console)
        _print_copies(report.memcpy, targets, console)
        _print_probes(report.probes, targets, console)
        _print_metadata(report.metadata, targets, console)
    if report.tails:
        _print_tails(report.tails, report.pauses, console)
    if report.replay:
        _print_replay(report.replay, console)
    missed = [about for about, target in targets.items() if not target.met]
    console.print(f"{len(targets) - len(missed)} of {len(targets)} targets met.", style="red" if missed else "green")
    for about in missed:
        target = targets[about]
        console.print(f"missed: {about}: {target.value:.2f}, not ≤ {target.limit:g}", style="red", highlight=False)


def _print_growth(shape: Shape, growth: list[Growth], targets: dict[str, Target], console: Console) -> None:
    _print_title(f"µs a call by number of leaves: {SHAPES[shape]}", console)
    table = number_table(("",), (*(f"{size:,}" for size in growth[0].leaves), "grows", "target"))
    for row in growth:
        ratio = f"{row.ratio:.2f} ×" if row.ratio < 100 else f"{row.ratio:,.0f} ×"
        table.add_row(row.operation, *map(_us, row.us), ratio, _target(targets.get(_about(row))))
    console.print(table)


def _print_copies(races: list[CopyRace], targets: dict[str, Target], console: Console) -> None:
    _print_title("Match of a whole path, against a copy of its tokens", console)
    table = number_table(("",), ("edges", "match µs", "copy µs", "ratio", "target"))
    for row in races:
        times = (_us(row.match_us), _us(row.copy_us), f"{row.ratio:.2f} ×")
        table.add_row(f"{row.tokens:,} tokens", f"{row.edges}", *times, _target(targets.get(_about(row))))
    console.print(table)


def _print_probes(probes: list[Probed], targets: dict[str, Target], console: Console) -> None:
    _print_title("After probes, of prefixes that end within an edge", console)
    table = number_table(("",), ("µs each", "nodes", "deepest", "mean depth", "match µs", "target"))
    for row in probes:
        cost = "" if row.probes == NO_PROBES else _us(row.probe_us)
        shape = (f"{row.nodes:,}", f"{row.max_depth}", f"{row.mean_depth:.2f}")
        table.add_row(row.probes, cost, *shape, _us(row.match_us), _target(targets.get(_about(row))))
    console.print(table)


def _print_metadata(metadata: list[Metadata], targets: dict[str, Target], console: Console) -> None:
    _print_title("Bytes of metadata for each cached token", console)
    table = number_table(("",), ("tokens", "nodes", "keys", "page ids", "all", "target"))
    for row in metadata:
        parts = (row.key_bytes_per_token, row.page_bytes_per_token, row.bytes_per_token)
        table.add_row(
            f"page size {row.page_size}, {row.page_ids}",
            f"{row.tokens:,}",
            f"{row.nodes:,}",
            *(f"{part:.2f}" for part in parts),
            _target(targets[_about(row)]),
        )
    console.print(table)


def _print_tails(tails: list[Tail], pauses: list[Pause], console: Console) -> None:
    _print_title(f"µs a call, each timed by itself, {tails[0].calls:,} calls of each operation in turn", console)
    headings = ("median", "p99", "p99.9", "slowest", "calls\n> 1 ms", "by the\nclock")
    table = number_table(("leaves", ""), headings)
    for row in tails:
        times = (_us(us) for us in (row.median_us, row.p99_us, row.p999_us, row.max_us))
        table.add_row(f"{row.leaves:,}", row.operation, *times, f"{row.slow_calls:,}", f"{row.waited_calls:,}")
    console.print(table)
    for pause in pauses:
        console.print(
            f"A full collection by Python beside {pause.leaves:,} leaves: {pause.collect_ms:.1f} ms, and "
            f"{pause.frozen_ms:.1f} ms after gc.freeze()."
        )


def _print_replay(replays: list[Replay], console: Console) -> None:
    _print_title("Replay of the trace, µs a request", console)
    table = number_table(("",), (*OPERATIONS, "sum", "loop", "hit rate"))
    for row in replays:
        split = (_us(row.us[operation]) for operation in OPERATIONS)
        total = (_us(sum(row.us.values())), _us(row.loop_us), f"{row.hit_rate:.2%}")
        table.add_row(f"page size {row.page_size}", *split, *total)
    console.print(table)
    console.print(f"Each operation includes {replays[0].clock_us:.2f} µs for the clock; the loop ran without.")


def _print_title(text: str, console: Console) -> None:
    console.print(text, style="bold", highlight=False, soft_wrap=True)


def _us(us: float) -> str:
    return f"{us:.2f}" if us < 1000 else f"{us:,.0f}"


def _target(target: Target | None) -> str:
    if target is None:
        return ""
    return f"≤ {target.limit:g} [green]met[/]" if target.met else f"≤ {target.limit:g} [red]missed[/]"


# -- picture ---------------------------------------------------------------------------------------------------------


def write_plot(report: Report, path: Path) -> None:
    """Draw time over leaves for each shape, and matches against copies, side by side, into the image at `path`.

    Raises: BenchError without matplotlib, and if the place cannot be written.
    """
    figure = pictures.new_figure(13, 4)
    *by_shape, copies = figure.subplots(1, len(Shape) + 1, width_ratios=(*(1 for _ in Shape), 0.9))
    for axes, shape in zip(by_shape, Shape, strict=True):
        # one call that may take a second would press all others flat: the tables have it
        _draw_growth(axes, shape, [r for r in report.growth if r.shape is shape and r.operation != EVICT_FIRST])
        axes.sharey(by_shape[0])
    by_shape[-1].legend(fontsize=7.5, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _draw_copies(copies, report.memcpy)
    pictures.save_figure(figure, path)


def _draw_growth(axes: Any, shape: Shape, growth: list[Growth]) -> None:
    for index, row in enumerate(growth):
        style = {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)]}
        axes.plot(row.leaves, row.us, markersize=5, linewidth=1.2, label=row.operation, **style)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("leaves")
    axes.set_title(f"{shape}: µs a call", fontsize=10)
    _tidy(axes)


def _draw_copies(axes: Any, races: list[CopyRace]) -> None:
    lines = {"one edge": lambda race: race.edges == 1, f"edges of {EDGE_TOKENS} tokens": lambda race: race.edges > 1}
    for index, (label, belongs) in enumerate(lines.items()):
        line = list(filter(belongs, races))
        style = {"color": COLORS[index], "marker": MARKERS[index]}
        axes.plot([race.tokens for race in line], [race.ratio for race in line], label=label, **style)
    axes.axhline(COPY_LIMIT, color="black", linestyle=":", linewidth=1.2, label="target")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of the path")
    axes.set_title("match of a whole path / copy of its tokens", fontsize=10)
    axes.legend(fontsize=8, frameon=False)
    _tidy(axes)


def _tidy(axes: Any) -> None:
    pictures.tidy(axes)
    axes.grid(axis="y", alpha=0.25)
