"""`radixkv replay`: what a cache of this size and policy would have hit on a trace of requests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from radixkv.cache.eviction.policies import POLICIES
from radixkv.cli.replay_fleet import (
    FleetOptions,
    FleetReport,
    check_of_use,
    check_unused,
    fleet_options,
    print_fleet_table,
    simulate_fleets,
    write_fleet_plot,
)
from radixkv.cli.replay_plot import check_plot, write_plot
from radixkv.cli.replay_report import ReplayReport, print_table
from radixkv.cli.replay_tiers import TiersReport, print_tiers_table, tier_sizes, tiers_text, write_tiers_plot
from radixkv.cli.setting_options import count_option, setting_option
from radixkv.cli.token_counts import token_count
from radixkv.cli.trace_source import load_tokenizer, progress_on_stderr, read_trace_file
from radixkv.cluster.router import ROUTERS
from radixkv.config import CacheConfig, TierWrites
from radixkv.config.checks import checked_choice
from radixkv.errors import ConfigError
from radixkv.replay.belady import measure_reuse
from radixkv.replay.fleet import FleetResult
from radixkv.replay.page_numbers import number_pages
from radixkv.replay.simulation import BELADY, ReplayResult, replay_optimum, replay_trace, whole_pages
from radixkv.replay.tiered import TieredResult, TierSize, replay_tiers
from radixkv.replay.traces import BLOCKS, MOONCAKE_BLOCK_TOKENS, ExpandedBlocks, Request, Trace

if TYPE_CHECKING:
    from rich.progress import Progress

WRITES: tuple[TierWrites, ...] = get_args(TierWrites)

REPLAY_EPILOG = f"""
**Traces** are files of JSON lines, one object a request; the first good line tells which kind a file is:

- "hash_ids" with "input_length", as Mooncake publishes them: ids of prefix-chained blocks of --block-tokens tokens.
  Each block is hit, stored and evicted as a whole; with --keys token it becomes pseudo-random tokens.

- "token_ids" or "input_tok_ids": token ids, with those of the output in "output_token_ids" or "output_tok_ids".

- "input", "prompt" or "text": text, with the text of the "output"; needs --tokenizer.

- "conversations" (ShareGPT), "messages" (OpenAI) or "turns" (aiperf): one request a turn; needs --tokenizer.

JSON arrays, CSV with a column of prompts, plain text (one prompt a line), gzip and UTF-16 are read too. CSV that only
counts tokens (Azure, BurstGPT) is refused: shared prefixes cannot be known from counts.

Prompts are looked up; prompts and outputs are stored, but for the last token, as an engine does. Hits are whole pages.
"timestamp" (milliseconds or seconds, from 0 or since 1970, or ISO 8601) or "arrival_time_ns" drives policies that look
at the time.

**Policies**: {", ".join(POLICIES)}.

**What cannot be exceeded**: the *ceiling* is what a cache without limit hits. *{BELADY}*, always computed, is the
clairvoyant optimum: of all caches of this size that hold whole pages, and all pages of the request that runs, none
hits more, whatever it evicts and whatever it knows of the future.

**Tiers**: with --tiers, what the pool lacks is looked for in the tiers below it, which keep pages in LRU order. Pages
go down as `tier_writes` of an engine says: "through", when they were computed; "selective", when they were found a
second time; "back", when the pool evicts them. Loads take no time here.

**Replicas**: with --replicas, so many replicas share the capacity in equal parts, and a router sends each request to
one of them, in virtual time. Arrivals are those of the trace, stretched to --load. *cost* is the
router of radixkv; {", ".join(name for name in ROUTERS if name != "cost")} are rules to compare with.

**Examples**

Four sizes, two policies: `radixkv replay trace.jsonl --capacity-tokens 1000000,2000000,4000000,8000000 --policy
lru,slru`

With a picture, and figures for a script: `radixkv replay trace.jsonl --capacity-tokens 250000,500000 --plot hits.png
--json hits.json`

Whether a disk below the pool is worth it: `radixkv replay trace.jsonl --tiers pool:1M --tiers pool:1M,disk:20M`

Eight replicas with an eighth of the capacity each, or one pool: `radixkv replay trace.jsonl --capacity-tokens 8M
--replicas 1,8 --router cost,random,consistent-hash`

Texts of an agent, as Qwen3 would see them: `radixkv replay agent.jsonl --capacity-tokens 50000 --tokenizer
Qwen/Qwen3-8B`
"""


class KeyKind(StrEnum):
    """What the keys of a trace of blocks are."""

    BLOCK = "block"
    TOKEN = "token"


def replay(
    trace_file: Annotated[
        Path, typer.Argument(metavar="TRACE", help="A file of JSON lines; see below.", show_default=False)
    ],
    capacity_tokens: Annotated[
        str | None,
        typer.Option(help="Sizes of the cache in tokens, separated by commas; 1M is 1,000,000.", show_default=False),
    ] = None,
    tiers: Annotated[
        list[str] | None,
        typer.Option(
            help="Instead: the pool and what lies below it, such as pool:1M,disk:20M, in tokens. May be given several "
            "times.",
            show_default=False,
        ),
    ] = None,
    tier_writes: Annotated[
        str, typer.Option(help=f"When pages go down to the tiers: {', '.join(WRITES)}, separated by commas.")
    ] = WRITES[0],
    replicas: Annotated[
        str | None,
        typer.Option(
            help="Simulate so many replicas that share the capacity; several numbers are separated by commas.",
            show_default=False,
        ),
    ] = None,
    router: Annotated[
        str | None,
        typer.Option(
            help=f"With --replicas: {', '.join(ROUTERS)}, separated by commas.  [default: cost]", show_default=False
        ),
    ] = None,
    load: Annotated[
        float | None,
        typer.Option(
            help="With --replicas: how much of the time they would compute if nothing were cached.  [default: 0.6]",
            show_default=False,
        ),
    ] = None,
    shared_tier: Annotated[
        str | None,
        typer.Option(
            help="With --replicas: a tier below them that all share, in tokens, such as 20M.", show_default=False
        ),
    ] = None,
    decode_s: Annotated[
        float | None,
        typer.Option(
            "--decode-s",
            help="With --replicas: how long a request decodes after its first token; each that does makes prompts "
            "there take 2 % longer.  [default: 0]",
            show_default=False,
        ),
    ] = None,
    happening: Annotated[
        list[str] | None,
        typer.Option(
            help="With --replicas: what happens after so many requests, such as 6000:die:3, 6000:drain:3, "
            "6000:slow:3:4 or 6000:join. May be given several times.",
            show_default=False,
        ),
    ] = None,
    policy: Annotated[str, typer.Option(help="Eviction policies, separated by commas.")] = "lru",
    page_size: Annotated[
        int, setting_option(CacheConfig, "page_size", more="Blocks that are keys are pages themselves.")
    ] = 16,
    block_tokens: Annotated[
        int, count_option("Tokens that each of a trace's hash_ids stands for.")
    ] = MOONCAKE_BLOCK_TOKENS,
    keys: Annotated[
        KeyKind | None,
        typer.Option(help="What a trace of hash_ids is replayed as.  [default: block]", show_default=False),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help='For a trace of texts: "demo", a directory or a hub id.', show_default=False)
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at a malformed line instead of skipping it.")] = False,
    limit: Annotated[int | None, count_option("Requests to read at most.", show_default=False)] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="OUT", help="Write all figures there.", show_default=False)
    ] = None,
    plot_file: Annotated[
        Path | None,
        typer.Option("--plot", metavar="OUT.png", help="Draw hit rate over size there.", show_default=False),
    ] = None,
) -> None:
    """Replay a trace of requests through the radix tree, and tell what each policy hits at each size.

    Shown are the share of prompt tokens found in the cache, the tokens evicted, and the time that the tree takes for
    a request.
    """
    _check_one_of(capacity_tokens, tiers)
    capacities = [] if capacity_tokens is None else _capacities(capacity_tokens)
    hierarchies, writes = _hierarchies(tiers or []), _writes(tier_writes)
    policies = _policies(policy, has_optimum=tiers is None)
    only_fleets: dict[str, object] = {"--router": router, "--load": load, "--shared-tier": shared_tier}
    only_fleets |= {"--decode-s": decode_s, "--happening": happening or None}
    fleets = None
    if replicas is None:
        check_unused(only_fleets)
    else:
        check_of_use(policy, tiers, writes)
        fleets = fleet_options(
            replicas,
            "cost" if router is None else router,
            capacities,
            load=0.6 if load is None else load,
            shared_tier=shared_tier,
            decode_s=0.0 if decode_s is None else decode_s,
            happenings=happening or (),
        )
    _check_places(json_file, plot_file)
    encode = None if tokenizer is None else load_tokenizer(tokenizer)
    report: FleetReport | TiersReport | ReplayReport
    with progress_on_stderr() as progress:
        trace, num_skipped = read_trace_file(
            trace_file, progress, strict=strict, block_tokens=block_tokens, encode=encode, limit=limit
        )
        work = _workload(trace, keys, page_size)
        read = (str(trace_file), len(trace.requests), trace.num_tokens, num_skipped, work.keys, work.page_tokens)
        if fleets is not None:
            ceiling, one_cache, simulated = _simulate(work, fleets, progress)
            report = FleetReport(*read, ceiling, fleets.load, fleets.shared_tokens, one_cache, simulated)
        elif tiers is not None:
            ceiling, _ = _replay_all(work, policies, capacities, progress)
            report = TiersReport(*read, ceiling, _replay_tiers(work, policies, hierarchies, writes, progress))
        else:
            report = ReplayReport(*read, *_replay_all(work, policies, capacities, progress))
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
        checked_choice("--tier-writes", name, WRITES)
    return [known for name in names for known in WRITES if known == name]


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


# --------------------------------------------------------------------------------------------------------------- work


@dataclass(frozen=True, slots=True)
class _Workload:
    """What is replayed: requests whose keys stand for `key_tokens` tokens, and how many keys make a page."""

    requests: list[Request] | ExpandedBlocks
    keys: KeyKind
    page_size: int
    key_tokens: int

    @property
    def page_tokens(self) -> int:
        return self.page_size * self.key_tokens


def _workload(trace: Trace, keys: KeyKind | None, page_size: int) -> _Workload:
    if trace.kind != BLOCKS:
        if keys is KeyKind.BLOCK:
            raise ConfigError(f'--keys block needs a trace of "{BLOCKS}", not of "{trace.kind}"')
        return _Workload(trace.requests, KeyKind.TOKEN, page_size, 1)
    if keys is KeyKind.TOKEN:
        return _Workload(ExpandedBlocks(trace.requests, trace.key_tokens), KeyKind.TOKEN, page_size, 1)
    return _Workload(trace.requests, KeyKind.BLOCK, 1, trace.key_tokens)


def _replay_all(
    work: _Workload, policies: Sequence[str], capacities: Sequence[int], progress: Progress
) -> tuple[float, list[ReplayResult]]:
    """The ceiling, and what each policy does with each capacity."""
    for capacity in capacities:
        whole_pages(capacity, work.page_tokens)
    rounds = 1 + len(capacities) * sum(policy != BELADY for policy in policies)
    bar = progress.add_task("", total=rounds * len(work.requests))
    page_size, key_tokens = work.page_size, work.key_tokens
    on_progress = partial(progress.advance, bar)
    progress.update(bar, description="what is used again")
    reuse = measure_reuse(work.requests, page_size, key_tokens=key_tokens, on_progress=on_progress)
    results = []
    for capacity, policy in product(capacities, policies):
        if policy == BELADY:
            results.append(replay_optimum(reuse, capacity, work.page_tokens))
            continue
        progress.update(bar, description=f"{policy}, {capacity:,} tokens")
        results.append(
            replay_trace(work.requests, policy, capacity, page_size, key_tokens=key_tokens, on_progress=on_progress)
        )
    return reuse.ceiling, results


def _simulate(
    work: _Workload, fleets: FleetOptions, progress: Progress
) -> tuple[float, dict[int, float], list[FleetResult]]:
    """The ceiling, what one cache of each capacity hits, and what routers do with replicas."""
    for fleet in fleets.fleets:
        whole_pages(fleet.capacity_tokens // fleet.num_replicas, work.page_tokens)
    capacities = list(dict.fromkeys(fleet.capacity_tokens for fleet in fleets.fleets))
    ceiling, alone = _replay_all(work, ["lru"], capacities, progress)
    bar = progress.add_task("pages", total=len(work.requests))
    on_progress = partial(progress.advance, bar)
    trace = number_pages(work.requests, work.page_size, key_tokens=work.key_tokens, on_progress=on_progress)
    one_cache = {result.capacity_tokens: result.hit_rate for result in alone}
    return ceiling, one_cache, simulate_fleets(trace, fleets, progress)


def _replay_tiers(
    work: _Workload,
    policies: Sequence[str],
    hierarchies: Sequence[Sequence[TierSize]],
    writes: Sequence[TierWrites],
    progress: Progress,
) -> list[TieredResult]:
    """What each policy does with each of several tiers, for each way of writing."""
    for size in chain.from_iterable(hierarchies):
        whole_pages(size.capacity_tokens, work.page_tokens)
    runs = [
        (tiers, policy, when)
        for tiers, policy in product(hierarchies, policies)
        for when in (writes if len(tiers) > 1 else writes[:1])
    ]
    bar = progress.add_task("", total=len(runs) * len(work.requests))
    results = []
    for tiers, policy, when in runs:
        progress.update(bar, description=f"{policy}, {tiers_text(tiers)}, {when}")
        results.append(
            replay_tiers(
                work.requests,
                tiers,
                policy,
                when,
                work.page_size,
                key_tokens=work.key_tokens,
                on_progress=partial(progress.advance, bar),
            )
        )
    return results
