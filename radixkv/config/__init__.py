"""Settings, each described once: its type, default, bounds, unit and meaning stand at its field.

Checks, error messages, docstrings, flags of the command line, tables of docs/api.md and JSON schemas are made of that.
"""

from __future__ import annotations

from radixkv.config.cache_config import CacheConfig
from radixkv.config.cache_quota import CacheQuota
from radixkv.config.cluster_config import ClusterConfig
from radixkv.config.engine_config import (
    GB,
    KV_CACHE_DTYPES,
    SCHEDULE_POLICIES,
    EngineConfig,
    SchedulePolicy,
    Speculate,
    TierWrites,
)
from radixkv.config.limits import MAX_COUNT
from radixkv.config.sampling_params import MAX_LOGPROBS, SamplingParams
from radixkv.config.schema import schema_of
from radixkv.config.server_config import ServerConfig

__all__ = [
    "GB",
    "KV_CACHE_DTYPES",
    "MAX_COUNT",
    "MAX_LOGPROBS",
    "SCHEDULE_POLICIES",
    "CacheConfig",
    "CacheQuota",
    "ClusterConfig",
    "EngineConfig",
    "SamplingParams",
    "SchedulePolicy",
    "ServerConfig",
    "Speculate",
    "TierWrites",
    "schema_of",
]
