"""What the live page shows, as it is taken from the engine and as it is sent."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

from radixkv.cache.cache_stats import SizeEstimate
from radixkv.cache.insight.explanation import Explanation
from radixkv.cache.insight.history import Timeline
from radixkv.cache.insight.tree_view import TreeView, TreeViewer
from radixkv.cache.namespace import Namespace
from radixkv.cache.token_ids import TOKEN_BYTES
from radixkv.engine.core import EngineCore
from radixkv.engine.results import EngineStats
from radixkv.tiers.tier import TierStats

MAX_NODES = 20_000
NODES_A_PART = 1000  # that the engine's thread looks at between two steps
MAX_REQUESTS = 64
TEXT_TOKENS = 32  # of an edge whose text is sent
WHAT_IF_FACTORS = (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)

MayRead: TypeAlias = Callable[[Namespace], bool]


class LiveNode(NamedTuple):
    """A node of the tree; times are those of the day, in seconds."""

    id: int
    parent: int | None
    namespace: Namespace
    num_tokens: int
    hits: int
    last_used_at: float | None
    is_pinned: bool
    kept_until: float | None
    num_hidden: int  # children that are in the tree and not in the view
    first_ids: bytes
    last_access: int  # the tick of `last_used_at`


class LiveRequest(NamedTuple):
    """A request that has not ended."""

    id: int
    namespace: Namespace
    is_running: bool
    prompt_tokens: int
    cached_tokens: int | None
    output_tokens: int
    arrived_at: float


class Miss(NamedTuple):
    """A prompt that was not cached to its end."""

    at: float
    namespace: Namespace
    explanation: Explanation


class EngineView(NamedTuple):
    """What an engine held at one moment. `look_s` is how long the engine's thread took to tell."""

    tree: TreeView
    stats: EngineStats
    what_if: tuple[SizeEstimate, ...]
    requests: tuple[LiveRequest, ...]
    timeline: Timeline
    clock_offset_s: float  # from the cache's clock to the time of day
    look_s: float


class EngineViewer:
    """Looks at an engine again and again, in the engine's thread: part by part, so that no step waits for long.

    It looks at the tree only if that may have changed since.
    """

    def __init__(self, max_nodes: int = MAX_NODES) -> None:
        self._viewer = TreeViewer(max_nodes)
        self._tree: TreeView | None = None
        self._parts: Iterator[TreeView | None] | None = None  # of the look that was begun
        self._look_s = 0.0
        self._seen: object = None
        self._what_if: tuple[SizeEstimate, ...] = ()
        self._clock_offset_s: float | None = None

    def look(self, core: EngineCore) -> EngineView | None:
        """Look at the next part of `core`. Returns: what it holds, once all was looked at; None before.

        O(NODES_A_PART), and the logarithm of that for a node with more children than are shown.
        """
        begun_at = time.perf_counter()
        if self._parts is None:
            self._begin(core)
        parts = self._parts
        if parts is not None:
            tree = next(parts)
            self._look_s += time.perf_counter() - begun_at
            if tree is None:
                return None
            self._tree, self._parts = tree, None
        return self._view(core, begun_at)

    def _begin(self, core: EngineCore) -> None:
        """Begin to look at the tree, if it may have changed since it was looked at."""
        cache, stats = core.cache, core.stats().cache
        self._look_s = 0.0
        seen = (cache.tick, stats.total_tokens, stats.protected_tokens, stats.num_leases)
        if self._tree is None or seen != self._seen:
            self._parts, self._seen = cache.view(self._viewer, NODES_A_PART), seen
            self._what_if = cache.estimate_hit_rates(WHAT_IF_FACTORS)

    def _view(self, core: EngineCore, begun_at: float) -> EngineView:
        assert self._tree is not None, "it is looked at first"
        if self._clock_offset_s is None:
            self._clock_offset_s = time.time() - core.cache.now_s
        return EngineView(
            tree=self._tree,
            stats=core.stats(),
            what_if=self._what_if,
            requests=_requests(core, time.time() - time.perf_counter()),
            timeline=core.cache.timeline(),
            clock_offset_s=self._clock_offset_s,
            look_s=self._look_s + time.perf_counter() - begun_at,
        )


def _requests(core: EngineCore, offset_s: float) -> tuple[LiveRequest, ...]:
    return tuple(
        LiveRequest(
            id=request.id,
            namespace=request.cache_options.namespace,
            is_running=request.lease is not None,
            prompt_tokens=len(request.prompt_ids),
            cached_tokens=request.cached_tokens,
            output_tokens=len(request.output_ids),
            arrived_at=round(request.arrived_at + offset_s, 1),
        )
        for request in core.requests[:MAX_REQUESTS]
    )


def live_nodes(view: EngineView, known: Mapping[int, LiveNode]) -> dict[int, LiveNode]:
    """The nodes of `view` by number, parents first. O(nodes).

    Of a node that stays the same, what is `known` of it from the view before is taken over, so that `changed` is quick.
    """
    tree, offset_s = view.tree, view.clock_offset_s
    shown_children: dict[int, int] = {}
    for parent in tree.parents:
        if parent is not None:
            shown_children[parent] = shown_children.get(parent, 0) + 1
    nodes: dict[int, LiveNode] = {}
    for place, (number, parent, num_tokens) in enumerate(zip(tree.ids, tree.parents, tree.num_tokens(), strict=True)):
        namespace = tree.namespaces[place]
        if namespace is None:
            assert parent is not None, number
            namespace = nodes[parent].namespace
        before, tick, keep_until = known.get(number), tree.last_access[place], tree.keep_until[place]
        if before is not None and before.last_access == tick:
            last_used_at = before.last_used_at  # stays as it was told, though the cache remembers it less well later
        else:
            used_at = view.timeline.seconds_at(tick)
            last_used_at = None if used_at is None else round(used_at + offset_s, 1)
        node = LiveNode(
            id=number,
            parent=parent,
            namespace=namespace,
            num_tokens=num_tokens,
            hits=tree.hits[place],
            last_used_at=last_used_at,
            is_pinned=tree.pinned[place],
            kept_until=round(keep_until + offset_s) if keep_until else None,
            num_hidden=max(0, tree.num_children[place] - shown_children.get(number, 0)),  # parts may differ
            first_ids=tree.token_ids[place][: TEXT_TOKENS * TOKEN_BYTES],
            last_access=tick,
        )
        nodes[number] = before if before is not None and before == node else node
    return nodes


def changed(nodes: Mapping[int, LiveNode], shown: Mapping[int, LiveNode]) -> tuple[list[LiveNode], list[int]]:
    """The nodes that someone who was `shown` those must be sent, parents first, and the numbers of those that are gone.

    O(nodes).
    """
    new = [node for number, node in nodes.items() if shown.get(number) is not node]
    return new, [number for number in shown if number not in nodes]


def name_of(namespace: Namespace) -> str:
    """How people are shown a namespace. A salt is a secret: all that is told is that there is one."""
    name = "shared" if namespace.extra_key is None else namespace.extra_key
    return name if namespace.cache_salt is None else f"{name} (salted)"


def node_row(node: LiveNode, text: str | None) -> list[Any]:
    """A node as it is sent."""
    return [
        node.id,
        node.parent,
        node.num_tokens,
        node.hits,
        node.last_used_at,
        int(node.is_pinned),
        node.kept_until,
        node.num_hidden,
        name_of(node.namespace) if node.parent is None else text,
    ]


def summary(view: EngineView, nodes: Mapping[int, LiveNode]) -> dict[str, Any]:
    """Everything but nodes and misses, as it is sent."""
    stats, cache = view.stats, view.stats.cache
    return {
        "tree": {
            "nodes": len(nodes),
            "tokens": sum(node.num_tokens for node in nodes.values()),
            "total_tokens": cache.total_tokens,
            "is_whole": not any(node.num_hidden for node in nodes.values()),
        },
        "pool": {
            "pages": cache.num_pages,
            "page_size": cache.page_size,
            "free_pages": cache.free_pages,
            "leased_pages": cache.leased_pages,
            "pinned_pages": cache.protected_tokens // cache.page_size,
            "evictable_pages": cache.evictable_tokens // cache.page_size,
            "bytes": stats.pool_bytes,
        },
        **({} if (states := states_row(stats)) is None else {"states": states}),
        "tiers": [tier_row(tier) for tier in stats.tiers],
        "hit_rate": cache.hit_rate,
        "query_tokens": cache.query_tokens,
        "hit_tokens": cache.hit_tokens,
        "evicted_tokens": cache.evicted_tokens,
        "what_if": [estimate._asdict() for estimate in view.what_if],
        "requests": {
            "running": stats.running,
            "waiting": stats.waiting,
            "generated_tokens": stats.generated_tokens,
            "tokens_per_step": round(stats.tokens_per_step, 2) if stats.speculation or stats.forced_tokens else None,
            "first": [{**request._asdict(), "namespace": name_of(request.namespace)} for request in view.requests],
        },
    }


def states_row(stats: EngineStats) -> dict[str, int] | None:
    """The states of recurrent layers, as they are sent; None without such layers."""
    cache = stats.cache
    if not cache.states:
        return None
    return {
        "total": cache.states,
        "free": cache.free_states,
        "evictable": cache.evictable_states,
        "leased": cache.states - cache.free_states - cache.evictable_states,
        "taken_back": cache.states_taken_back,
        "bytes": stats.state_pool_bytes,
    }


def tier_row(tier: TierStats) -> dict[str, Any]:
    """What a tier below the pool holds and gave, as it is sent."""
    return {
        "name": tier.name,
        "bytes": tier.store.bytes,
        "capacity_bytes": tier.store.capacity_bytes,
        "loaded_tokens": tier.loaded_tokens,
        "is_slow": tier.is_slow,
    }


def miss_row(miss: Miss, decode: Callable[[Any], str | None], *, may_read: bool) -> dict[str, Any]:
    """A miss as it is sent. What tells of the prompt's text is left out unless it may be read."""
    found = miss.explanation
    near = found.near_miss if may_read else None
    return {
        "at": round(miss.at, 1),
        "namespace": name_of(miss.namespace),
        "prompt_tokens": found.num_tokens,
        "cached_tokens": found.cached_tokens,
        "reason": found.reason,
        "evicted_ago_s": None if found.evicted_ago_s is None else round(found.evicted_ago_s, 1),
        "evicted_tokens": found.evicted_tokens,
        "asked_text": None if near is None else decode(near.asked_ids),
        "cached_text": None if near is None else decode(near.cached_ids),
    }
