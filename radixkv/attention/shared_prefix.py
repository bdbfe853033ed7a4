"""Prefixes that several decodes of a batch share: read once for all of them (cascade attention).

Attention over a sequence in two parts is the sum of both parts' outputs, weighted by their shares of the softmax's
denominator, which their log-sum-exps give (Ye et al., "Cascade Inference", FlashInfer, 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixkv.attention.backend import AttentionParams

MIN_SEQUENCES = 4  # below either it is quicker to read the prefix once for each sequence
MIN_TOKENS = 128


class SharedPrefix(NamedTuple):
    """`sequences` (positions in a list of page tables) that all begin with `pages`."""

    sequences: NDArray[np.intp]
    pages: NDArray[np.int32]


def find_shared_prefixes(
    tables: Sequence[NDArray[np.int32]], kv_lens: NDArray[np.int32], page_size: int
) -> list[SharedPrefix]:
    """The groups of sequences for which reading their common pages once pays. O(pages).

    A sequence's last token is never in the shared part, so that something of its own is left.
    """
    by_first_page: dict[int, list[int]] = {}
    for i, table in enumerate(tables):
        by_first_page.setdefault(int(table[0]), []).append(i)
    found = []
    for sequences in by_first_page.values():
        longest = min((int(kv_lens[i]) - 1) // page_size for i in sequences)
        if len(sequences) < MIN_SEQUENCES or longest * page_size < MIN_TOKENS:
            continue
        same = np.ones(longest, bool)
        for i in sequences[1:]:
            same &= tables[i][:longest] == tables[sequences[0]][:longest]
        num_pages = longest if same.all() else int(same.argmin())
        if num_pages * page_size >= MIN_TOKENS:
            found.append(SharedPrefix(np.array(sequences), tables[sequences[0]][:num_pages]))
    return found


def attend_shared(q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> tuple[Tensor, Tensor]:
    """Attention of all queries over the same keys, as one dense product a KV head.

    Args:
        q: [sequences, num_q_heads, k_head_dim]
        k, v: [tokens, num_kv_heads, head_dim]

    Returns: outputs [sequences, num_q_heads, v_head_dim] and log-sum-exps [sequences, num_q_heads].
    """
    num_sequences, num_kv_heads = len(q), k.shape[1]
    grouped = q.view(num_sequences, num_kv_heads, -1, q.shape[2]).transpose(0, 1)
    rows = grouped.flatten(1, 2)  # [num_kv_heads, sequences * group, k_head_dim]
    scores = torch.bmm(rows * params.scale, k.permute(1, 2, 0))  # [num_kv_heads, sequences * group, tokens]
    if params.softcap is not None:
        scores = params.softcap * torch.tanh(scores / params.softcap)
    probabilities = torch.softmax(scores, dim=-1)
    # the likeliest key has the probability e^(its score - lse); two maxima cost less than torch.logsumexp
    lse = scores.amax(dim=-1) - probabilities.amax(dim=-1).log()
    out = torch.bmm(probabilities, v.transpose(0, 1))

    def by_sequence(values: Tensor) -> Tensor:
        return values.view(num_kv_heads, num_sequences, -1, *values.shape[2:]).transpose(0, 1).flatten(1, 2)

    return by_sequence(out), by_sequence(lse)


def merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> Tensor:
    """Attention over two parts from the attention over each; shapes as `attend_shared` returns them."""
    share = torch.sigmoid(lse - other_lse)[..., None]  # e^lse / (e^lse + e^other_lse)
    return torch.lerp(other_out, out, share)
