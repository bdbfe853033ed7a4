"""Biases of scores by the place of the key, such as ALiBi's."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

ALIGNED_TOKENS = 64  # compiled kernels read whole vectors, and a table that is too short grows by more than a token


class KeyBias:
    """What a head adds to the score of each key, by the key's position.

    ALiBi (Press et al., "Train Short, Test Long", 2022) subtracts from a score the distance of query and key, times a
    slope of the head. That is `slope * j` for a key at position j, less `slope * p` for a query at p, which the softmax
    does not see: only the key's part counts. Models differ in slopes and in how they round the products, so here a
    table says what they add; a layer's scores get `table[h, j] - table[h, p]`, which is small where it counts.

    Args:
        make: makes the table, [num_q_heads, n] of any float dtype, of n first positions.
    """

    def __init__(self, make: Callable[[int], Tensor]) -> None:
        self._make = make
        self._table: Tensor | None = None

    def table(self, num_tokens: int) -> Tensor:
        """float32 [num_q_heads, n], contiguous, of at least so many positions; it grows twofold. O(1), mostly."""
        table = self._table  # another engine with the same model may exchange it
        if table is None or table.shape[1] < num_tokens:
            size = max(num_tokens, 0 if table is None else 2 * table.shape[1])
            self._table = table = self._make(-(-size // ALIGNED_TOKENS) * ALIGNED_TOKENS).float().contiguous()
        return table

    def between(self, q_positions: Tensor, kv_len: int, heads: slice = slice(None)) -> Tensor:
        """What is added to the scores of queries at those positions and of keys [0, kv_len), in those heads.

        q_positions is int64 [queries]. Returns: float32 [heads, queries, kv_len].
        """
        table = self.table(kv_len)[heads]
        return table[:, None, :kv_len] - table[:, q_positions, None]
