"""Where a `RadixCache` keeps KV between calls: a prefix cache over a pool of pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixkv.cache.cache_stats import CacheStats
from radixkv.cache.lease import Lease
from radixkv.cache.namespace import Namespace
from radixkv.cache.prefix_cache import PrefixCache
from radixkv.cache.residency.residency import HeldTokens
from radixkv.errors import ConfigError
from radixkv.hf.state_store import StateStore, default_slots
from radixkv.memory.kv_pool import KVPool, pool_bytes_per_token
from radixkv.memory.kv_shape import LayerKV

if TYPE_CHECKING:
    from radixkv.hf.probe import ProbedPrefixes

Tokens = NDArray[np.int32]
LayerStates = tuple[Tensor, Tensor]
"""K and V of one sequence in one layer, each [num_kv_heads, tokens, head_dim]."""


class PageStore:
    """Keeps the KV of token sequences in pages, shares their prefixes and evicts what was not used for longest.

    `states` keeps what recurrent layers need besides: then prefixes can be loaded that end where a state was saved. No
    lease outlives a method, so whatever a caller does between two of them, nothing is pinned.
    """

    def __init__(self, num_pages: int, page_size: int, policy: str, states: StateStore) -> None:
        """The pages come with `allocate`, when there is KV that tells its shape. Raises: ConfigError."""
        self.states = states
        self.prefixes = PrefixCache(
            num_pages, page_size, policy, copy_page=self._copy_page, residency=states.residency, diagnostics=False
        )
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
        """How many leading tokens can be loaded, to the token. O(tokens)."""
        return self.prefixes.peek(tokens, extra_key=namespace)

    def held(self, tokens: Tokens, namespace: str | None) -> int:
        """How many leading tokens have their KV here, a state after them or not. O(tokens)."""
        return self.prefixes.cached_path(tokens, extra_key=namespace)[0]

    @property
    def pool(self) -> KVPool:
        """The pages' memory; there must be KV that told its shape."""
        assert self._pool is not None, "nothing was stored yet"
        return self._pool

    def allocate(self, states: Sequence[LayerStates], recurrent: Sequence[Tensor] = ()) -> None:
        """Make the pages, if they are not made yet, for KV like `states`: one sequence's of any length, a pair a layer.

        `recurrent` is a state of recurrent layers. Raises: ConfigError if the memory does not suffice.
        """
        if self.is_allocated:
            return
        self.states.allocate(recurrent)
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

    def load_state(self, tokens: Tokens, namespace: str | None) -> list[Tensor]:
        """A copy of the state of recurrent layers after `tokens`, to which `peek` goes. O(tokens + state)."""
        _, path = self.prefixes.cached_path(tokens, extra_key=namespace)
        return self.states.read(HeldTokens(Namespace.of(namespace, None), tokens, [node.pages for node in path]))

    def save(
        self,
        tokens: Tokens,
        namespace: str | None,
        states: Sequence[LayerStates],
        recurrent: Mapping[int, Sequence[Tensor]],
    ) -> None:
        """Keep the KV of `tokens`, evicting what was not used for longest; what exceeds all pages is left out.

        Args:
            states: the KV of at least these tokens, in order.
            recurrent: states of recurrent layers, by how many of the tokens came before. Those are left out that come
                before another that is here.

        The pages must be allocated. O(tokens) for those that are not here yet.
        """
        tokens = tokens[: self.max_tokens]
        assert self._pool is not None, "allocate makes it"
        pool = self._pool
        with self.prefixes.acquire(tokens, extra_key=namespace) as lease:
            new = slice(lease.cached_tokens, len(tokens))
            slots = self._slots(lease.pages, new.start, new.stop)
            for layer, (k, v) in enumerate(states):
                k_new, v_new = k[:, new].transpose(0, 1), v[:, new].transpose(0, 1)
                pool.write(layer, slots, k_new.to(pool.device), v_new.to(pool.device))
            self._save_states(lease, tokens, recurrent)
            lease.commit(tokens)

    def _save_states(self, lease: Lease, tokens: Tokens, recurrent: Mapping[int, Sequence[Tensor]]) -> None:
        """Keep those after more tokens than the lease found, and share the tokens before them."""
        first = lease.cached_tokens
        for last in sorted(num for num in recurrent if lease.cached_tokens < num <= len(tokens)):
            lease.checkpoint_at(last)
            lease.cover(first, last)
            _, slot = lease.state_slots()
            self.states.write(slot, recurrent[last])
            lease.advance(last)
            lease.commit(tokens[:last])
            first = last

    def reset(self) -> None:
        """Forget everything and free the pages' memory."""
        self.prefixes.reset()
        self.states.reset()
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


def page_store(
    probed: ProbedPrefixes, num_pages: int, page_size: int, policy: str, state_slots: int | None
) -> PageStore:
    """A store of `num_pages` pages for KV and states as a model's that was probed. Raises: ConfigError.

    `state_slots` states have room; as many as fit into the memory of the pages, at least 16, if it is None.
    """
    token_bytes = sum(part[:, 0].numel() * part.element_size() for pair in probed.states for part in pair)
    max_tokens = num_pages * page_size
    num_slots = state_slots or default_slots(probed.state_shapes, max_tokens * token_bytes, num_pages)
    return PageStore(num_pages, page_size, policy, StateStore(probed.state_shapes, num_slots, max_tokens))
