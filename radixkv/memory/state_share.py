"""How a memory is shared between KV and the states of recurrent layers, where nothing else is asked for."""

from __future__ import annotations

BUDGET_SHARE = 3  # states take one of so many parts of the memory for KV
FEW_STATES = 16  # states at least, where that is little
STATES_PER_REQUEST = 4  # states at most, for each request that may run: one it reads, one it writes, two of its prefix


def share_of_states(budget_bytes: int) -> int:
    """What states may take of the memory for KV and states together, rounded down.

    >>> share_of_states(300)
    100
    """
    return budget_bytes // BUDGET_SHARE


def num_states_in(share_bytes: int, state_bytes: int, running_limit: int) -> int:
    """As many states as `share_bytes` hold; a few at least, and no more than so many running requests make use of.

    >>> num_states_in(1000, 10, running_limit=256), num_states_in(1000, 10, running_limit=8), num_states_in(9, 10, 256)
    (100, 32, 16)
    """
    return min(STATES_PER_REQUEST * running_limit, max(FEW_STATES, share_bytes // state_bytes))
