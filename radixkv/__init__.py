"""RadixAttention prefix caching for Hugging Face models: shared prefixes are computed once.

    engine = radixkv.Engine.from_pretrained("demo")
    outputs = engine.generate(["…", "…"], radixkv.SamplingParams(max_tokens=64))

`RadixTree` and `PrefixCache` serve engines of your own, and need no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from radixkv import errors

if TYPE_CHECKING:
    from radixkv.cache.cache_stats import CacheStats, SizeEstimate
    from radixkv.cache.events import CacheObserver
    from radixkv.cache.eviction.policy import EvictionPolicy
    from radixkv.cache.insight.explanation import Explanation
    from radixkv.cache.lease import Lease
    from radixkv.cache.prefix_cache import PrefixCache
    from radixkv.cache.residency.window_pages import WindowPages
    from radixkv.cache.tree.node import InsertResult, MatchResult, TreeNode
    from radixkv.cache.tree.radix_tree import RadixTree
    from radixkv.config import CacheConfig, EngineConfig
    from radixkv.engine.engine import Engine
    from radixkv.engine.request import RequestMetrics, RequestOutput
    from radixkv.engine.results import EngineStats, StreamChunk
    from radixkv.engine.sampling import SamplingParams, TokenLogprobs
    from radixkv.engine.session import KVUsage, Session
    from radixkv.replay.simulation import ReplayResult, replay_trace

__version__ = "0.1.0"

__all__ = [
    "CacheConfig",
    "CacheObserver",
    "CacheStats",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "EvictionPolicy",
    "Explanation",
    "InsertResult",
    "KVUsage",
    "Lease",
    "MatchResult",
    "PrefixCache",
    "RadixTree",
    "ReplayResult",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "Session",
    "SizeEstimate",
    "StreamChunk",
    "TokenLogprobs",
    "TreeNode",
    "WindowPages",
    "errors",
    "replay_trace",
]

_LAZY = {  # loaded when asked for: the cache needs no torch, and the command line must be able to catch Ctrl-C early
    "CacheStats": "radixkv.cache.cache_stats",
    "SizeEstimate": "radixkv.cache.cache_stats",
    "CacheObserver": "radixkv.cache.events",
    "EvictionPolicy": "radixkv.cache.eviction.policy",
    "Explanation": "radixkv.cache.insight.explanation",
    "Lease": "radixkv.cache.lease",
    "PrefixCache": "radixkv.cache.prefix_cache",
    "WindowPages": "radixkv.cache.residency.window_pages",
    "InsertResult": "radixkv.cache.tree.node",
    "MatchResult": "radixkv.cache.tree.node",
    "TreeNode": "radixkv.cache.tree.node",
    "RadixTree": "radixkv.cache.tree.radix_tree",
    "CacheConfig": "radixkv.config",
    "EngineConfig": "radixkv.config",
    "ReplayResult": "radixkv.replay.simulation",
    "replay_trace": "radixkv.replay.simulation",
    "Engine": "radixkv.engine.engine",
    "EngineStats": "radixkv.engine.results",
    "StreamChunk": "radixkv.engine.results",
    "RequestMetrics": "radixkv.engine.request",
    "RequestOutput": "radixkv.engine.request",
    "SamplingParams": "radixkv.engine.sampling",
    "TokenLogprobs": "radixkv.engine.sampling",
    "KVUsage": "radixkv.engine.session",
    "Session": "radixkv.engine.session",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'radixkv' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
