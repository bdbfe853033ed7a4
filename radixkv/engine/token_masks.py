"""Masks of tokens, one bit for each, as libraries of grammars make them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixkv.kernels import numba_masks


def compile_masks() -> None:
    """Compile what `forbid_tokens` calls on the CPU, or load it from disk, so that no step waits for it."""
    forbid_tokens(torch.zeros(1, 1, dtype=torch.float32, device="cpu"), [0], np.ones((1, 1), np.uint32))


def forbid_tokens(logits: Tensor, rows: Sequence[int], words: NDArray[np.uint32]) -> None:
    """Set logits of forbidden tokens to minus infinity, in place. O(logits of the rows).

    Args:
        logits: float32 [any rows, vocab_size], C-contiguous.
        rows: the row that each of `words` is for.
        words: [len(rows), words]; bit t % 32 of word t // 32 is 1 if token t may come.
    """
    if logits.device.type == "cpu":
        numba_masks.forbid_tokens(logits.numpy(), np.array(rows, np.int64), words)
        return
    bits = np.unpackbits(words.view(np.uint8), axis=1, count=logits.shape[1], bitorder="little")
    forbidden = torch.from_numpy(bits == 0).to(logits.device)
    if len(rows) == len(logits):
        logits.masked_fill_(forbidden, -torch.inf)
    else:
        index = torch.tensor(rows, dtype=torch.int64, device=logits.device)
        logits[index] = logits[index].masked_fill_(forbidden, -torch.inf)
