"""What a trace is replayed as, and the runs that `radixkv replay` makes of it, with their progress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, product
from typing import TYPE_CHECKING

from radixkv.cli.replay_fleet import FleetOptions, simulate_fleets
from radixkv.cli.replay_options import KeyKind
from radixkv.cli.replay_tiers import tiers_text
from radixkv.config import TierWrites
from radixkv.errors import ConfigError
from radixkv.replay.belady import measure_reuse
from radixkv.replay.fleet import FleetResult
from radixkv.replay.page_numbers import number_pages
from radixkv.replay.simulation import BELADY, ReplayResult, replay_optimum, replay_trace, whole_pages
from radixkv.replay.tiered import TieredResult, TierSize, replay_tiers
from radixkv.replay.traces import BLOCKS, ExpandedBlocks, Request, Trace

if TYPE_CHECKING:
    from rich.progress import Progress


@dataclass(frozen=True, slots=True)
class Workload:
    """What is replayed: requests whose keys stand for `key_tokens` tokens, and how many keys make a page."""

    requests: list[Request] | ExpandedBlocks
    keys: KeyKind
    page_size: int
    key_tokens: int

    @property
    def page_tokens(self) -> int:
        return self.page_size * self.key_tokens


def workload(trace: Trace, keys: KeyKind | None, page_size: int) -> Workload:
    if trace.kind != BLOCKS:
        if keys is KeyKind.BLOCK:
            raise ConfigError(f'--keys block needs a trace of "{BLOCKS}", not of "{trace.kind}"')
        return Workload(trace.requests, KeyKind.TOKEN, page_size, 1)
    if keys is KeyKind.TOKEN:
        return Workload(ExpandedBlocks(trace.requests, trace.key_tokens), KeyKind.TOKEN, page_size, 1)
    return Workload(trace.requests, KeyKind.BLOCK, 1, trace.key_tokens)


def replay_policies(
    work: Workload, policies: Sequence[str], capacities: Sequence[int], progress: Progress
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


def simulate(
    work: Workload, fleets: FleetOptions, progress: Progress
) -> tuple[float, dict[int, float], list[FleetResult]]:
    """The ceiling, what one cache of each capacity hits, and what routers do with replicas."""
    for fleet in fleets.fleets:
        whole_pages(fleet.capacity_tokens // fleet.num_replicas, work.page_tokens)
    capacities = list(dict.fromkeys(fleet.capacity_tokens for fleet in fleets.fleets))
    ceiling, alone = replay_policies(work, ["lru"], capacities, progress)
    bar = progress.add_task("pages", total=len(work.requests))
    on_progress = partial(progress.advance, bar)
    trace = number_pages(work.requests, work.page_size, key_tokens=work.key_tokens, on_progress=on_progress)
    one_cache = {result.capacity_tokens: result.hit_rate for result in alone}
    return ceiling, one_cache, simulate_fleets(trace, fleets, progress)


def replay_hierarchies(
    work: Workload,
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
