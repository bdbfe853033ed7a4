"""Numbers the layers that attend, where others of the model keep states."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from radixkv.attention.backend import AttentionParams
from radixkv.models.paged_attention import AttentionContext
from radixkv.models.recurrent.facade import FlattenedCache


class NumberedContext:
    """Stands before a context that knows attention layers by their place among these.

    Args:
        cache: the one that the model was handed: where layers share an attention module, it knows which one runs.
        number: of the attention layer with that index in the model.
    """

    def __init__(self, context: AttentionContext, cache: FlattenedCache, number: Callable[[int], int]) -> None:
        self._context = context
        self._cache = cache
        self._number = number

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor:
        """As `AttentionContext.attend`."""
        return self._context.attend(self._number(self._running(layer)), q, k, v, params)

    def attend_latent(self, layer: int, q: Tensor, k: Tensor, latent_dim: int, params: AttentionParams) -> Tensor:
        """As `AttentionContext.attend_latent`."""
        return self._context.attend_latent(self._number(self._running(layer)), q, k, latent_dim, params)

    def _running(self, layer: int) -> int:
        updated, self._cache.updated_layer = self._cache.updated_layer, None
        return layer if updated is None else updated
