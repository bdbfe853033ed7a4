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
    from radixkv.cache.events import Cleared, Event, Observer, PageRun, Removed, Stored
    from radixkv.cache.eviction.policy import EvictionPolicy
    from radixkv.cache.insight.explanation import Explanation
    from radixkv.cache.lease import Lease
    from radixkv.cache.page_keys import prompt_keys
    from radixkv.cache.prefix_cache import PrefixCache
    from radixkv.cache.residency.window_pages import WindowPages
    from radixkv.cache.tree.node import InsertResult, MatchResult, TreeNode
    from radixkv.cache.tree.radix_tree import RadixTree
    from radixkv.config import CacheConfig, CacheQuota, EngineConfig, SamplingParams
    from radixkv.engine.async_engine import AsyncEngine
    from radixkv.engine.engine import Engine
    from radixkv.engine.logit_edits import LogitsTransform
    from radixkv.engine.outputs import Progress, RequestMetrics, RequestOutput, Usage
    from radixkv.engine.results import EngineStats, ResetCache
    from radixkv.engine.sampling import TokenLogprobs
    from radixkv.engine.session import KVUsage, Session
    from radixkv.replay.simulation import ReplayResult, replay_trace

__version__ = "0.1.0"

__all__ = [
    "AsyncEngine",
    "CacheConfig",
    "CacheQuota",
    "CacheStats",
    "Cleared",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "Event",
    "EvictionPolicy",
    "Explanation",
    "InsertResult",
    "KVUsage",
    "Lease",
    "LogitsTransform",
    "MatchResult",
    "Observer",
    "PageRun",
    "PrefixCache",
    "Progress",
    "RadixTree",
    "Removed",
    "ReplayResult",
    "RequestMetrics",
    "RequestOutput",
    "ResetCache",
    "SamplingParams",
    "Session",
    "SizeEstimate",
    "Stored",
    "TokenLogprobs",
    "TreeNode",
    "Usage",
    "WindowPages",
    "errors",
    "prompt_keys",
    "replay_trace",
]

_LAZY = {  # loaded when asked for: the cache needs no torch, and the command line must be able to catch Ctrl-C early
    "AsyncEngine": "radixkv.engine.async_engine",
    "CacheConfig": "radixkv.config",
    "CacheQuota": "radixkv.config",
    "CacheStats": "radixkv.cache.cache_stats",
    "Cleared": "radixkv.cache.events",
    "Engine": "radixkv.engine.engine",
    "EngineConfig": "radixkv.config",
    "EngineStats": "radixkv.engine.results",
    "Event": "radixkv.cache.events",
    "EvictionPolicy": "radixkv.cache.eviction.policy",
    "Explanation": "radixkv.cache.insight.explanation",
    "InsertResult": "radixkv.cache.tree.node",
    "KVUsage": "radixkv.engine.session",
    "Lease": "radixkv.cache.lease",
    "LogitsTransform": "radixkv.engine.logit_edits",
    "MatchResult": "radixkv.cache.tree.node",
    "Observer": "radixkv.cache.events",
    "PageRun": "radixkv.cache.events",
    "PrefixCache": "radixkv.cache.prefix_cache",
    "Progress": "radixkv.engine.outputs",
    "RadixTree": "radixkv.cache.tree.radix_tree",
    "Removed": "radixkv.cache.events",
    "ReplayResult": "radixkv.replay.simulation",
    "RequestMetrics": "radixkv.engine.outputs",
    "RequestOutput": "radixkv.engine.outputs",
    "ResetCache": "radixkv.engine.results",
    "SamplingParams": "radixkv.config",
    "Session": "radixkv.engine.session",
    "SizeEstimate": "radixkv.cache.cache_stats",
    "Stored": "radixkv.cache.events",
    "TokenLogprobs": "radixkv.engine.sampling",
    "TreeNode": "radixkv.cache.tree.node",
    "Usage": "radixkv.engine.outputs",
    "WindowPages": "radixkv.cache.residency.window_pages",
    "prompt_keys": "radixkv.cache.page_keys",
    "replay_trace": "radixkv.replay.simulation",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'radixkv' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
