"""Prefixes that several decodes of a batch share: read once for all of them (cascade attention).

Attention over a sequence in parts is the sum of the parts' outputs, weighted by their shares of the softmax's
denominator, which their log-sum-exps give (Ye et al., "Cascade Inference", FlashInfer, 2024). So the tokens of a node
that several sequences read become one dense product for all their queries, at every level of the tree where that pays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from radixkv.attention.metadata import AttentionMetadata, SharedNode


@dataclass(frozen=True, slots=True)
class BreakEven:
    """From where on reading a prefix once is faster than reading it for each sequence, as measured.

    Attributes:
        min_sequences: fewer readers never pay.
        min_tokens: neither does a shorter prefix.
        min_saved_tokens: nor one that spares fewer reads of a token, `tokens * (sequences - 1)`.
    """

    min_sequences: int
    min_tokens: int
    min_saved_tokens: int = 0

    def pays(self, num_sequences: int, num_tokens: int) -> bool:
        return (
            num_sequences >= self.min_sequences
            and num_tokens >= self.min_tokens
            and num_tokens * (num_sequences - 1) >= self.min_saved_tokens
        )


NEVER = BreakEven(min_sequences=1 << 30, min_tokens=0)


class SharedPart(NamedTuple):
    """A part of several sequences to be read once: their tokens `[first, last)`, which lie in `pages`."""

    sequences: NDArray[np.intp]  # places in the batch
    first: int
    last: int
    pages: NDArray[np.int32]


class CascadePlan(NamedTuple):
    """What is read once, and from where on each sequence of the batch reads alone (int32 [num_sequences])."""

    parts: list[SharedPart]
    private_starts: NDArray[np.int32]


NO_CASCADE = CascadePlan([], np.empty(0, np.int32))


def plan_cascade(metadata: AttentionMetadata, break_even: BreakEven) -> CascadePlan:
    """Choose the parts of the batch's shared nodes that pay. O(nodes + pages of the parts).

    The tokens of a node that does not pay are left to its children's parts, or to the sequences alone. The last token
    of a sequence is never shared, so something of its own is left.
    """
    starts = np.zeros(metadata.num_sequences, np.int32)  # up to where each sequence's tokens are in parts
    parts = []
    for node in metadata.shared_nodes:
        first = int(starts[node.sequences[0]])  # the same for all: they have shared every node above
        last = min(node.last, _longest_prefix(metadata, node.sequences))
        if last > first and break_even.pays(len(node.sequences), last - first):
            sequences = np.array(node.sequences, np.intp)
            parts.append(SharedPart(sequences, first, last, _pages(metadata, node, first, last)))
            starts[sequences] = last
    return CascadePlan(parts, starts)


def merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two parts from the attention over each.

    Args:
        out, other_out: [sequences, num_q_heads, v_head_dim]
        lse, other_lse: natural log-sum-exps [sequences, num_q_heads]
    """
    share = (lse - other_lse).sigmoid()[..., None]  # e^lse / (e^lse + e^other_lse)
    return other_out.lerp(out, share.to(out.dtype)), lse.logaddexp(other_lse)


def _longest_prefix(metadata: AttentionMetadata, sequences: Sequence[int]) -> int:
    """Tokens in whole pages of the shortest sequence, without its last token."""
    shortest = min(int(metadata.kv_lens[i]) for i in sequences) - 1
    return shortest // metadata.page_size * metadata.page_size


def _pages(metadata: AttentionMetadata, node: SharedNode, first: int, last: int) -> NDArray[np.int32]:
    start = int(metadata.kv_indptr[node.sequences[0]])
    return metadata.kv_indices[start + first // metadata.page_size : start + last // metadata.page_size]
