"""The engine's states of recurrent layers: how many, the pool that holds them, and who has which slot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from radixkv.cache.residency.state_slots import LEAST_SLOTS, StateSlots
from radixkv.config import EngineConfig
from radixkv.memory.kv_pool import kv_budget_of
from radixkv.memory.state_pool import StatePool, StateShape, bytes_per_state
from radixkv.memory.state_share import num_states_in, share_of_states

STATES_OF_CONVERSATIONS = 48  # beside a small pool of KV: for 16 that run side by side, and are kept


class StateMemory(NamedTuple):
    """What belongs together."""

    pool: StatePool
    slots: StateSlots


def make_state_memory(
    shapes: Sequence[StateShape], config: EngineConfig, kv_bytes_per_token: int, device: torch.device
) -> StateMemory:
    """As many states as `config` asks for, or as its memory for KV has room for."""
    num_slots = config.state_slots or _num_slots(bytes_per_state(shapes), config, kv_bytes_per_token, device)
    slots = StateSlots(num_slots, interval_tokens=config.state_interval_tokens)
    return StateMemory(StatePool(shapes, num_slots, device), slots)


def _num_slots(state_bytes: int, config: EngineConfig, kv_bytes_per_token: int, device: torch.device) -> int:
    if config.kv_cache_tokens is not None:
        share_bytes = max(config.kv_cache_tokens * kv_bytes_per_token, STATES_OF_CONVERSATIONS * state_bytes)
    else:
        share_bytes = share_of_states(kv_budget_of(device, config.mem_fraction))
    return max(LEAST_SLOTS, num_states_in(share_bytes, state_bytes, config.running_limit))
