"""FlashInfer's paged latent attention (MLA; Ye et al., "FlashInfer", MLSys 2025), in a few calls.

Written against FlashInfer 0.6.18:

- One kernel runs decodes and extends, all of a batch in one call: queries are the last tokens of their sequences.
- `plan` reads qo_indptr, kv_indptr and kv_lens on the CPU, int32, and would wait for the device if they lay there; the
  page indices alone are wanted on the device. As a plan of `flashinfer_paged` it leaves asynchronous copies behind.
- `run` passes on the strides of pages, tokens and heads, so latents and rotary keys may be views of one tensor, and so
  may the two parts of the queries; only the values of one vector must lie together.
- What a CUDA graph captures depends on the number of sequences and heads alone: the lengths reach the kernel through
  the wrapper's own buffers, which `plan` fills.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixkv.kernels.flashinfer_paged import _Staging, load


@dataclass(frozen=True, slots=True)
class LatentKind:
    """The properties that layers with one plan share.

    Attributes:
        num_heads: of the queries.
        latent_dim, rope_dim: values of a latent and of a rotary key.
        page_size: tokens a page.
        dtype: of queries, latents and outputs.
        scale: factor on the scores.
    """

    num_heads: int
    latent_dim: int
    rope_dim: int
    page_size: int
    dtype: torch.dtype
    scale: float


class LatentBatch(NamedTuple):
    """The queries and pages of a batch, int32 on the CPU."""

    qo_indptr: NDArray[np.int32]  # [sequences + 1]
    kv_indptr: NDArray[np.int32]  # [sequences + 1], of the pages
    kv_indices: NDArray[np.int32]
    kv_lens: NDArray[np.int32]  # [sequences], tokens


class LatentGraphBuffers(NamedTuple):
    """The buffers that a CUDA graph reads its plan from, int32 on the device."""

    qo_indptr: Tensor  # [sequences + 1]
    kv_indptr: Tensor  # [sequences + 1]
    kv_indices: Tensor  # [pages of all sequences at most]
    kv_lens: Tensor  # [sequences]

    @classmethod
    def empty(cls, num_sequences: int, max_pages: int, device: torch.device) -> LatentGraphBuffers:
        sizes = (num_sequences + 1, num_sequences + 1, max_pages, num_sequences)
        return cls(*(torch.zeros(size, dtype=torch.int32, device=device) for size in sizes))

    def holds(self, num_sequences: int, max_pages: int) -> bool:
        """Whether a batch of that many sequences and pages fits."""
        return num_sequences <= len(self.kv_lens) and max_pages <= len(self.kv_indices)

    def first(self, num_sequences: int) -> LatentGraphBuffers:
        """A view of the part for that many sequences."""
        size = num_sequences + 1
        return LatentGraphBuffers(
            self.qo_indptr[:size], self.kv_indptr[:size], self.kv_indices, self.kv_lens[:num_sequences]
        )


class PagedLatents:
    """Causal attention of the last tokens of some sequences over their latents.

    Args:
        workspace: uint8 on the device; may be shared by all that runs on one stream.
        graph: makes a wrapper for as many sequences as the buffers have, whose `run` may be captured in a CUDA graph.
    """

    def __init__(self, kind: LatentKind, workspace: Tensor, graph: LatentGraphBuffers | None = None) -> None:
        self._kind = kind
        self._staging = _Staging(workspace.device, None if graph is None else graph.kv_indices)
        self._wrapper = load().BatchMLAPagedAttentionWrapper(
            workspace,
            use_cuda_graph=graph is not None,
            qo_indptr=None if graph is None else graph.qo_indptr,
            kv_indptr=None if graph is None else graph.kv_indptr,
            kv_indices=None if graph is None else graph.kv_indices,
            kv_len_arr=None if graph is None else graph.kv_lens,
        )

    def plan(self, batch: LatentBatch) -> None:
        """Get ready for a batch. Waits for no more than the copies of the last plan."""
        kind = self._kind
        with self._staging.free():
            self._wrapper.plan(
                torch.from_numpy(batch.qo_indptr),
                torch.from_numpy(batch.kv_indptr),
                self._staging.send(batch.kv_indices),
                torch.from_numpy(batch.kv_lens),
                kind.num_heads,
                kind.latent_dim,
                kind.rope_dim,
                kind.page_size,
                True,  # causal
                kind.scale,
                kind.dtype,
                kind.dtype,
            )

    def run(self, q: Tensor, pages: Tensor) -> Tensor:
        """Attention of q [queries, num_heads, latent_dim + rope_dim].

        `pages` [num_pages, page_size, latent_dim + rope_dim] hold latents, each with its rotary key behind it.
        Returns: [queries, num_heads, latent_dim].
        """
        q_latent, q_rope = q.tensor_split([self._kind.latent_dim], dim=-1)
        latents, rotary_keys = pages.tensor_split([self._kind.latent_dim], dim=-1)
        out = q.new_empty(q_latent.shape)
        self._wrapper.run(q_latent, q_rope, latents, rotary_keys, out=out)
        return out
