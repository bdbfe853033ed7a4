"""Applies masks of tokens to logits in place, compiled by Numba: a step of decoding waits for it."""

from __future__ import annotations

import numba as nb
import numpy as np

from radixkv.kernels.compiling import can_cache


@nb.njit(cache=can_cache())
def forbid_tokens(logits, rows, words):
    """Set logits to minus infinity whose bit is 0.

    Args:
        logits: float32 [any rows, vocab_size], C-contiguous.
        rows: int64 [outputs], the row of each.
        words: uint32 [outputs, words], token t in bit t % 32 of word t // 32.
    """
    vocab_size = logits.shape[1]
    for i in range(len(rows)):
        row = logits[rows[i]]
        for w in range(words.shape[1]):
            word = words[i, w]
            if word == np.uint32(0xFFFFFFFF):
                continue
            for bit in range(min(32, vocab_size - 32 * w)):
                if not (word >> np.uint32(bit)) & np.uint32(1):
                    row[32 * w + bit] = -np.inf
