"""RadixAttention prefix caching for Hugging Face models: shared prefixes are computed once.

    engine = radixkv.Engine.from_pretrained("demo")
    outputs = engine.generate(["…", "…"], radixkv.SamplingParams(max_tokens=64))

`RadixTree` and `PrefixCache` serve engines of your own, and need no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from radixkv import errors
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
from radixkv.config import CacheConfig, EngineConfig
from radixkv.replay.simulation import ReplayResult, replay_trace

if TYPE_CHECKING:
    from radixkv.engine.async_engine import AsyncEngine
    from radixkv.engine.engine import Engine
    from radixkv.engine.request import Progress, RequestMetrics, RequestOutput
    from radixkv.engine.results import EngineStats
    from radixkv.engine.sampling import SamplingParams, TokenLogprobs
    from radixkv.engine.session import KVUsage, Session

__version__ = "0.1.0"

__all__ = [
    "AsyncEngine",
    "CacheConfig",
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
    "SamplingParams",
    "Session",
    "SizeEstimate",
    "Stored",
    "TokenLogprobs",
    "TreeNode",
    "WindowPages",
    "errors",
    "prompt_keys",
    "replay_trace",
]

_LAZY = {  # what imports torch and transformers loads when it is asked for: the cache alone needs neither
    "AsyncEngine": "radixkv.engine.async_engine",
    "Engine": "radixkv.engine.engine",
    "EngineStats": "radixkv.engine.results",
    "Progress": "radixkv.engine.request",
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
