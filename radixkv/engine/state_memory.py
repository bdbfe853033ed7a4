"""The engine's states of recurrent layers: how many, the pool that holds them, and who has which slot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from radixkv.cache.residency.state_slots import LEAST_SLOTS, StateSlots
from radixkv.config import EngineConfig
from radixkv.errors import ConfigError
from radixkv.memory.kv_pool import kv_budget_of
from radixkv.memory.state_pool import StatePool, StateShape, bytes_per_state

BUDGET_SHARE = 3  # states take one of so many parts of the budget for KV, where nothing else is asked for
FEW_SLOTS = 16  # states at least, where the pool of KV is small
SLOTS_PER_REQUEST = 4  # states at most, for each request that may run: one it reads, one it writes, two of its prefix


class StateMemory(NamedTuple):
    """What belongs together."""

    pool: StatePool
    slots: StateSlots


def make_state_memory(
    shapes: Sequence[StateShape], config: EngineConfig, kv_bytes_per_token: int, device: torch.device
) -> StateMemory:
    """As many states as `config` asks for, or as its memory for KV has room for.

    Raises: ConfigError.
    """
    num_slots = config.state_slots or _num_slots(bytes_per_state(shapes), config, kv_bytes_per_token, device)
    if num_slots < LEAST_SLOTS:
        raise ConfigError(
            f"state_slots must be at least {LEAST_SLOTS}: a request reads a state and writes one, and that after its "
            f"prompt stays beside them; got {num_slots}"
        )
    slots = StateSlots(num_slots, interval_tokens=config.state_interval_tokens)
    return StateMemory(StatePool(shapes, num_slots, device), slots)


def _num_slots(state_bytes: int, config: EngineConfig, kv_bytes_per_token: int, device: torch.device) -> int:
    running = config.max_running_requests or min(256, config.max_batch_tokens)
    most = SLOTS_PER_REQUEST * running
    if config.kv_cache_tokens is not None:
        budget = config.kv_cache_tokens * kv_bytes_per_token
    else:
        budget = kv_budget_of(device, config.mem_fraction) // BUDGET_SHARE
    return max(LEAST_SLOTS, min(most, max(FEW_SLOTS, budget // state_bytes)))
