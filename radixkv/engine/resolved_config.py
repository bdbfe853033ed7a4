"""The settings that an engine runs with: "auto" and None resolved against the model and the machine."""

from __future__ import annotations

from dataclasses import dataclass, fields
from types import NoneType
from typing import get_args, get_type_hints

from radixkv.config import EngineConfig, SchedulePolicy, Speculate, TierWrites


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedConfig:
    """As `EngineConfig`, with a value for each setting that was "auto" or None.

    What may still be None says that there is no such thing: `window_cache_tokens` if every layer keeps every page,
    `state_slots` if no layer keeps a state, `window` without StreamingLLM, `long_extends` where the backend has one
    way, `disk_cache` and the other tiers, a bound of the rate at which they are written, and addresses of events.
    """

    dtype: str
    device: str
    page_size: int
    kv_cache_tokens: int
    window_cache_tokens: int | None
    state_slots: int | None
    state_interval_tokens: int
    window: int | None
    sinks: int
    kv_cache_dtype: str
    attention_backend: str
    long_extends: str | None
    eviction_policy: str
    schedule_policy: SchedulePolicy
    max_batch_tokens: int
    max_running_requests: int
    max_context_tokens: int
    max_skips: int
    cuda_graphs: bool | None
    fused_layers: bool
    speculate: Speculate
    prefix_cache: bool
    disk_cache: str | None
    disk_cache_gb: float
    host_cache_gb: float | None
    shared_cache: str | None
    tier_writes: TierWrites
    tier_write_mb_s: float | None
    warm_start_share: float
    kv_events: str | None
    kv_events_replay: str | None
    kv_events_topic: str
    seed: int

    @classmethod
    def of(cls, config: EngineConfig, **found: object) -> ResolvedConfig:
        """The settings of `config`, with what was found for those that were "auto" or None."""
        asked = {field.name: getattr(config, field.name) for field in fields(cls)}
        resolved = cls(**{**asked, **found})
        for name, kind in get_type_hints(cls).items():
            assert getattr(resolved, name) is not None or NoneType in get_args(kind), f"{name} was not resolved"
        return resolved

    def as_engine_config(self) -> EngineConfig:
        """The settings that make such an engine again on such a machine."""
        return EngineConfig(**{field.name: getattr(self, field.name) for field in fields(self)})
