"""An eviction policy that notes what it is told."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.eviction.policies import LRUPolicy
from radixkv.cache.namespace import Namespace


class Told(LRUPolicy):
    """Keeps what it is told of requests: how many tokens they asked for and how many of them were matched."""

    def __init__(self) -> None:
        self.requests: list[tuple[int, int]] = []

    def requested(self, tokens: NDArray[np.int32], matched_tokens: int, namespace: Namespace) -> None:
        self.requests.append((len(tokens), matched_tokens))
