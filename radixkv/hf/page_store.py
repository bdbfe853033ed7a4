"""Where a `RadixCache` keeps KV between calls: a prefix cache over a pool of pages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixkv.cache.cache_stats import CacheStats
from radixkv.cache.prefix_cache import PrefixCache
from radixkv.errors import ConfigError
from radixkv.memory.kv_pool import KVPool, pool_bytes_per_token
from radixkv.memory.kv_shape import LayerKV

Tokens = NDArray[np.int32]
LayerStates = tuple[Tensor, Tensor]
"""K and V of one sequence in one layer, each [num_kv_heads, tokens, head_dim]."""


class PageStore:
    """Keeps the KV of token sequences in pages, shares their prefixes and evicts what was not used for longest.

    No lease outlives a method, so whatever a caller does between two of them, nothing is pinned.
    """

    def __init__(self, num_pages: int, page_size: int, policy: str) -> None:
        """The pages come with `allocate`, when there is KV that tells its shape. Raises: ConfigError."""
        self.prefixes = PrefixCache(num_pages, page_size, policy, copy_page=self._copy_page, diagnostics=False)
        self._pool: KVPool | None = None
        self._devices: list[torch.device] = []  # of the model's layers, where they are not all on the pool's

    @property
    def max_tokens(self) -> int:
        """Tokens that all pages hold."""
        return self.prefixes.num_pages * self.prefixes.page_size

    @property
    def num_bytes(self) -> int:
        """Size of the pages; 0 before the first KV came."""
        return 0 if self._pool is None else self._pool.num_bytes

    @property
    def is_allocated(self) -> bool:
        """Whether the pages have their memory."""
        return self._pool is not None

    def stats(self) -> CacheStats:
        """What the prefix cache tells of itself."""
        return self.prefixes.stats()

    def peek(self, tokens: Tokens, namespace: str | None) -> int:
        """How many leading tokens are here, to the token. O(tokens)."""
        return self.prefixes.peek(tokens, extra_key=namespace)

    @property
    def pool(self) -> KVPool:
        """The pages' memory; there must be KV that told its shape."""
        assert self._pool is not None, "nothing was stored yet"
        return self._pool

    def allocate(self, states: Sequence[LayerStates]) -> None:
        """Make the pages, if they are not made yet, for KV like `states`: one sequence's of any length, a pair a layer.

        Raises: ConfigError if the memory does not suffice.
        """
        if self.is_allocated:
            return
        first = states[0][0]
        layers = [LayerKV(k.shape[0], k.shape[-1], v.shape[-1]) for k, v in states]
        sizes = {"num_pages": self.prefixes.num_pages, "page_size": self.prefixes.page_size}
        try:
            with torch.inference_mode(False):  # tensors made in inference mode cannot be written to outside of it
                self._pool = KVPool(layers, **sizes, dtype=first.dtype, device=first.device)
        except ConfigError as error:
            raise ConfigError(
                f"no room on {first.device} to keep the KV of {self.max_tokens} tokens of "
                f"{pool_bytes_per_token(layers, first.dtype)} bytes; give RadixCache a smaller max_tokens"
            ) from error
        self._devices = [k.device for k, _ in states]

    def like(self, batch_size: int) -> list[LayerStates]:
        """For each layer K and V of no tokens, [batch_size, num_kv_heads, 0, head_dim], where the model keeps them."""
        assert self._pool is not None, "nothing was stored yet"

        def empty(pages: Tensor, device: torch.device) -> Tensor:
            return pages.new_empty(batch_size, pages.shape[2], 0, pages.shape[3], device=device)

        layers = zip(self._pool.k, self._pool.v, self._devices, strict=True)
        return [(empty(k, device), empty(v, device)) for k, v, device in layers]

    def load(self, tokens: Tokens, namespace: str | None, first: int, into: Sequence[LayerStates]) -> None:
        """Copy the KV of `tokens[first:]` to `into`, a pair of tensors a layer. O(tokens).

        All of `tokens` must be here, as `peek` tells.
        """
        assert self._pool is not None, "nothing was stored yet"
        with self.prefixes.reading(tokens, extra_key=namespace) as pages:
            assert len(pages) == self.prefixes.pages_for(len(tokens)), "peek found all of them"
            slots = self._slots(pages, first, len(tokens))
            for layer, states in enumerate(into):
                for target, stored in zip(states, (self._pool.k[layer], self._pool.v[layer]), strict=True):
                    target.copy_(stored.flatten(0, 1)[slots].transpose(0, 1))

    def save(self, tokens: Tokens, namespace: str | None, states: Sequence[LayerStates]) -> None:
        """Keep the KV of `tokens`, evicting what was not used for longest; what exceeds all pages is left out.

        `states` hold the KV of at least these tokens, in order. O(tokens) for those that are not here yet.
        """
        tokens = tokens[: self.max_tokens]
        self.allocate(states)
        assert self._pool is not None, "allocate made it"
        pool = self._pool
        with self.prefixes.acquire(tokens, extra_key=namespace) as lease:
            new = slice(lease.cached_tokens, len(tokens))
            slots = self._slots(lease.pages, new.start, new.stop)
            for layer, (k, v) in enumerate(states):
                k_new, v_new = k[:, new].transpose(0, 1), v[:, new].transpose(0, 1)
                pool.write(layer, slots, k_new.to(pool.device), v_new.to(pool.device))
            lease.commit(tokens)

    def reset(self) -> None:
        """Forget everything and free the pages' memory."""
        self.prefixes.reset()
        self._pool = None
        self._devices = []

    def _slots(self, pages: NDArray[np.int32], first: int, last: int) -> Tensor:
        assert self._pool is not None, "there are pages to point to"
        positions = np.arange(first, last)
        page_size = self.prefixes.page_size
        slots = pages[positions // page_size].astype(np.int64) * page_size + positions % page_size
        return torch.from_numpy(slots).to(self._pool.device)

    def _copy_page(self, source: int, target: int, num_tokens: int) -> None:
        assert self._pool is not None, "what is copied was stored"
        self._pool.copy_page(source, target, num_tokens)
