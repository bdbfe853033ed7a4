"""`radixkv replay`: what a cache of this size and policy would have hit on a trace of requests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from radixkv.cache.eviction.policies import POLICIES
from radixkv.cli import replay_options as options
from radixkv.cli.replay_fleet import (
    FleetReport,
    asked_fleets,
    check_of_use,
    print_fleet_table,
    write_fleet_plot,
)
from radixkv.cli.replay_plot import check_plot, write_plot
from radixkv.cli.replay_report import ReplayReport, print_table
from radixkv.cli.replay_tiers import TiersReport, print_tiers_table, tier_sizes, write_tiers_plot
from radixkv.cli.replay_work import replay_hierarchies, replay_policies, simulate, workload
from radixkv.cli.token_counts import token_count
from radixkv.cli.trace_source import load_tokenizer, progress_on_stderr, read_trace_file
from radixkv.config import TierWrites
from radixkv.config.checks import checked_choice
from radixkv.errors import ConfigError
from radixkv.replay.simulation import BELADY
from radixkv.replay.tiered import TierSize
from radixkv.replay.traces import MOONCAKE_BLOCK_TOKENS

REPLAY_EPILOG = options.EPILOG


def replay(
    trace_file: options.TraceFile,
    capacity_tokens: options.CapacityTokens = None,
    tiers: options.TierTexts = None,
    tier_writes: options.Writes = options.WRITES[0],
    replicas: options.Replicas = None,
    router: options.Router = None,
    load: options.Load = None,
    shared_tier: options.SharedTier = None,
    decode_s: options.DecodeS = None,
    happening: options.Happening = None,
    policy: options.Policy = "lru",
    page_size: options.PageSize = 16,
    block_tokens: options.BlockTokens = MOONCAKE_BLOCK_TOKENS,
    keys: options.Keys = None,
    tokenizer: options.Tokenizer = None,
    strict: options.Strict = False,
    limit: options.Limit = None,
    json_file: options.JsonFile = None,
    plot_file: options.PlotFile = None,
) -> None:
    """Replay a trace of requests through the radix tree, and tell what each policy hits at each size.

    Shown are the share of prompt tokens found in the cache, the tokens evicted, and the time that the tree takes for
    a request.
    """
    _check_one_of(capacity_tokens, tiers)
    capacities = [] if capacity_tokens is None else _capacities(capacity_tokens)
    hierarchies, writes = _hierarchies(tiers or []), _writes(tier_writes)
    policies = _policies(policy, has_optimum=tiers is None)
    if replicas is not None:
        check_of_use(policy, tiers, writes)
    fleets = asked_fleets(
        replicas, router, capacities, load=load, shared_tier=shared_tier, decode_s=decode_s, happenings=happening
    )
    _check_places(json_file, plot_file)
    encode = None if tokenizer is None else load_tokenizer(tokenizer)
    report: FleetReport | TiersReport | ReplayReport
    with progress_on_stderr() as progress:
        trace, num_skipped = read_trace_file(
            trace_file, progress, strict=strict, block_tokens=block_tokens, encode=encode, limit=limit
        )
        work = workload(trace, keys, page_size)
        read = (str(trace_file), len(trace.requests), trace.num_tokens, num_skipped, work.keys, work.page_tokens)
        if fleets is not None:
            ceiling, one_cache, simulated = simulate(work, fleets, progress)
            report = FleetReport(*read, ceiling, fleets.load, fleets.shared_tokens, one_cache, simulated)
        elif tiers is not None:
            ceiling, _ = replay_policies(work, policies, capacities, progress)
            report = TiersReport(*read, ceiling, replay_hierarchies(work, policies, hierarchies, writes, progress))
        else:
            report = ReplayReport(*read, *replay_policies(work, policies, capacities, progress))
    _show(report, json_file, plot_file)


def _show(report: FleetReport | TiersReport | ReplayReport, json_file: Path | None, plot_file: Path | None) -> None:
    """Write `report` where it was asked for, and print it."""
    _write_json(report.as_dict(), json_file)
    match report:
        case FleetReport():
            plot, table = partial(write_fleet_plot, report), partial(print_fleet_table, report)
        case TiersReport():
            plot, table = partial(write_tiers_plot, report), partial(print_tiers_table, report)
        case ReplayReport():
            plot, table = partial(write_plot, report), partial(print_table, report)
    if plot_file is not None:
        plot(plot_file)
    table()


# ------------------------------------------------------------------------------------------------------- command line


def _check_one_of(capacity_tokens: str | None, tiers: Sequence[str] | None) -> None:
    if (capacity_tokens is None) == (not tiers):
        given = "neither" if capacity_tokens is None else "both"
        raise ConfigError(f"give --capacity-tokens or --tiers, not {given}")


def _capacities(text: str) -> list[int]:
    counts = [token_count(part) for part in text.split(",")]
    capacities = [count for count in counts if count is not None]
    if len(capacities) < len(counts):
        raise ConfigError(f"--capacity-tokens must be positive numbers of tokens, comma-separated, not {text!r}")
    return list(dict.fromkeys(capacities))


def _hierarchies(texts: Sequence[str]) -> list[tuple[TierSize, ...]]:
    """Each of them once."""
    return list(dict.fromkeys(tuple(tier_sizes(text)) for text in texts))


def _policies(text: str, *, has_optimum: bool) -> list[str]:
    """The names in `text`, and the optimum unless there is none."""
    names = [part.strip() for part in text.split(",")]
    optimum = [BELADY] if has_optimum else []
    for name in names:
        if name not in (*POLICIES, *optimum):
            allowed = " and ".join([", ".join(POLICIES), *optimum])
            raise ConfigError(f"unknown eviction policy {name!r}; the policies are {allowed}")
    return list(dict.fromkeys([*names, *optimum]))


def _writes(text: str) -> list[TierWrites]:
    names = dict.fromkeys(part.strip() for part in text.split(","))
    for name in names:
        checked_choice("--tier-writes", name, options.WRITES)
    return [known for name in names for known in options.WRITES if known == name]


def _check_places(json_file: Path | None, plot_file: Path | None) -> None:
    """Raise ConfigError, before the work begins, if one of the files cannot be written."""
    if json_file is not None:
        _check_place("--json", json_file)
    if plot_file is not None:
        _check_place("--plot", plot_file)
        check_plot(plot_file)


def _check_place(option: str, path: Path) -> None:
    if path.is_dir():
        raise ConfigError(f"{option} {path} is a directory; name a file in it")
    if not path.parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no directory {path.parent}")


def _write_json(figures: dict[str, Any], json_file: Path | None) -> None:
    if json_file is not None:
        _write(json_file, json.dumps(figures, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
