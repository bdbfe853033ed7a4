"""FlashInfer's paged attention and sampling (Ye et al., "FlashInfer", MLSys 2025), in a few calls.

The one place where it is imported, and only when something here is made. Written against FlashInfer 0.6.18:

- Index arrays are int32. `plan` reads indptr and last_page_len on the CPU, and would wait for the device if they lay
  there; the page indices alone are wanted on the device, and are sent through pinned memory.
- `plan` leaves asynchronous copies out of pinned buffers, its own and ours, which must have ended before the next one.
- A window of `w` tokens, the query's own included, is `window_left = w - 1`. Log-sum-exps are of base 2.
- `run` fills a new output with zeros unless it is given one.
- KV in 4 bits (NVFP4) is uint8: byte j has component 2j in its low bits and 2j + 1 in its high ones. A float8 e4m3 for
  each 16 components lies in pages of the same order.
- Only fa2's kernels on tensor cores read it. Decodes on CUDA cores are not given the scales, and raise no error.
- `run` multiplies the scores' scale by `k_scale`, and the output by `v_scale`, in place, in a kernel of its own.
- `plan` of a prefill never splits such KV over many processors. Decodes leave splitting on: a graph must have it, since
  only a split plan marks which of the graph's blocks have work.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TENSOR_CORES_FROM_GROUP = 4  # smaller groups leave most of a tensor core's tile empty
NO_WINDOW = -1

PrefillBackend = Literal["fa2", "fa3", "auto"]


def load() -> Any:
    """The module flashinfer. Raises: ImportError that says how to get it."""
    try:
        import flashinfer
    except ImportError as error:
        raise ImportError(f"FlashInfer cannot be imported ({error}); pip install radixkv[flashinfer]") from error
    return flashinfer


@dataclass(frozen=True, slots=True)
class AttentionKind:
    """The properties that layers with one plan share.

    Attributes:
        page_size: tokens a page.
        dtype: of queries and outputs.
        kv_dtype: of KV: `dtype`, a float of 8 bits, or uint8 that holds two codes of 4 bits.
        scale: factor on the scores.
        window_left: keys before its own that a token sees; NO_WINDOW sees all.
        softcap: scores become softcap * tanh(score / softcap); 0 leaves them.
        global_scale: factor on all codes of 4 bits, besides their blocks' scales; None for other KV.
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    scale: float
    window_left: int = NO_WINDOW
    softcap: float = 0.0
    global_scale: float | None = None

    @property
    def has_block_scales(self) -> bool:
        """Whether KV is codes of 4 bits, with scales in pages of their own."""
        return self.global_scale is not None

    @property
    def uses_tensor_cores(self) -> bool:
        """Whether decodes run on tensor cores.

        Without them only groups of 1, 2, 3, 4, 6 and 8 are known, and no scales of blocks.
        """
        return self.has_block_scales or self.num_q_heads // self.num_kv_heads >= TENSOR_CORES_FROM_GROUP

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Positional arguments of every `plan`, after the pages."""
        return self.num_q_heads, self.num_kv_heads, self.head_dim, self.page_size

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of every `plan`."""
        return {
            "window_left": self.window_left,
            "logits_soft_cap": self.softcap,
            "q_data_type": self.dtype,
            "kv_data_type": self.kv_dtype,
            "sm_scale": self.scale,
        }


class KVPages(NamedTuple):
    """The KV of a layer.

    Attributes:
        k, v: [num_pages, page_size, num_kv_heads, head_dim] of the kind's `kv_dtype`; head_dim / 2 bytes where a byte
            holds two codes.
        block_scales: of codes of 4 bits, K's and V's: float8 e4m3 [num_pages, page_size, num_kv_heads, head_dim / 16].
    """

    k: Tensor
    v: Tensor
    block_scales: tuple[Tensor, Tensor] | None = None

    def run_options(self, kind: AttentionKind) -> dict[str, Any]:
        """What every `run` over these pages must be told besides."""
        assert (self.block_scales is not None) == kind.has_block_scales, "pages of another kind"
        if self.block_scales is None:
            return {}
        return {"kv_cache_sf": self.block_scales, "k_scale": kind.global_scale, "v_scale": kind.global_scale}


class PageLists(NamedTuple):
    """The pages of some sequences, int32 on the CPU: sequence i has indices[indptr[i] : indptr[i + 1]]."""

    indptr: NDArray[np.int32]  # [sequences + 1]
    indices: NDArray[np.int32]
    last_page_len: NDArray[np.int32]  # [sequences], tokens in the last page, in [1, page_size]


class GraphBuffers(NamedTuple):
    """The buffers that a CUDA graph reads its plan from, int32 on the device."""

    indptr: Tensor  # [sequences + 1]
    indices: Tensor  # [pages of all sequences at most]
    last_page_len: Tensor  # [sequences]

    @classmethod
    def empty(cls, num_sequences: int, max_pages: int, device: torch.device) -> GraphBuffers:
        sizes = (num_sequences + 1, max_pages, num_sequences)
        return cls(*(torch.zeros(size, dtype=torch.int32, device=device) for size in sizes))

    def holds(self, num_sequences: int, max_pages: int) -> bool:
        """Whether a batch of that many sequences and pages fits."""
        return num_sequences <= len(self.last_page_len) and max_pages <= len(self.indices)

    def first(self, num_sequences: int) -> GraphBuffers:
        """A view of the part for that many sequences."""
        return GraphBuffers(self.indptr[: num_sequences + 1], self.indices, self.last_page_len[:num_sequences])


class PagedDecode:
    """One query token of each sequence.

    Args:
        workspace: uint8 on the device; may be shared by all that runs on one stream.
        graph: makes a wrapper for one batch size, that of the buffers, whose `run` may be captured in a CUDA graph.
    """

    def __init__(self, kind: AttentionKind, workspace: Tensor, graph: GraphBuffers | None = None) -> None:
        self._kind = kind
        self._graph = graph
        self._is_planned = False
        self._staging = _Staging(workspace.device, None if graph is None else graph.indices)
        self._wrapper = load().BatchDecodeWithPagedKVCacheWrapper(
            workspace,
            "NHD",
            use_cuda_graph=graph is not None,
            use_tensor_cores=kind.uses_tensor_cores,
            paged_kv_indptr_buffer=None if graph is None else graph.indptr,
            paged_kv_indices_buffer=None if graph is None else graph.indices,
            paged_kv_last_page_len_buffer=None if graph is None else graph.last_page_len,
            backend="fa2" if kind.has_block_scales else "auto",
        )

    def plan(self, pages: PageLists) -> None:
        """Get ready for sequences whose KV lies in `pages`. Waits for no more than the copies of the last plan."""
        indptr, last_page_len = torch.from_numpy(pages.indptr), torch.from_numpy(pages.last_page_len)
        with self._staging.free():
            indices = self._staging.send(pages.indices)
            if self._graph is None or not self._is_planned:
                self._wrapper.plan(indptr, indices, last_page_len, *self._kind.sizes, **self._kind.options)
            else:  # the same, without a loop over the sequences in Python and without the copies
                self._graph.indptr.copy_(indptr, non_blocking=True)
                self._graph.last_page_len.copy_(last_page_len, non_blocking=True)
                again = load().fast_decode_plan
                again(self._wrapper, indptr, indices, last_page_len, *self._kind.sizes, **self._kind.options)
        self._is_planned = True

    def run(self, q: Tensor, pages: KVPages, out: Tensor, lse: Tensor | None = None) -> None:
        """Attention of q [sequences, num_q_heads, head_dim] over the planned pages.

        Writes to `out`, like q, and the base-2 log-sum-exps to `lse`, float32 [sequences, num_q_heads].
        """
        options = pages.run_options(self._kind)
        self._wrapper.run(q, (pages.k, pages.v), out=out, lse=lse, return_lse=lse is not None, **options)


class PagedPrefill:
    """Several query tokens of each sequence: its last ones where `plan` says causal, else any that see all its KV.

    `backend`: "auto" takes fa3 on Hopper, which does not split the KV of few long sequences over many processors, and
    does not read codes of 4 bits; for these "auto" is fa2.
    """

    def __init__(self, kind: AttentionKind, workspace: Tensor, backend: PrefillBackend) -> None:
        assert backend != "fa3" or not kind.has_block_scales, "fa3 reads no codes of 4 bits"
        self._kind = kind
        self._staging = _Staging(workspace.device)
        self._wrapper = load().BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=backend)

    def plan(self, qo_indptr: NDArray[np.int32], pages: PageLists, *, causal: bool) -> None:
        """Get ready for the queries [qo_indptr[i], qo_indptr[i + 1]) over the KV of sequence i. Waits as a decode's."""
        with self._staging.free():
            self._wrapper.plan(
                torch.from_numpy(qo_indptr),
                torch.from_numpy(pages.indptr),
                self._staging.send(pages.indices),
                torch.from_numpy(pages.last_page_len),
                *self._kind.sizes,
                causal=causal,
                **self._kind.options,
            )

    def run(self, q: Tensor, pages: KVPages, out: Tensor, lse: Tensor | None = None) -> None:
        """As `PagedDecode.run`, with q [queries, num_q_heads, head_dim]."""
        options = pages.run_options(self._kind)
        self._wrapper.run(q, (pages.k, pages.v), out=out, lse=lse, return_lse=lse is not None, **options)


def merge_in_place(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """Make of `out` and `lse` the attention over both parts' KV.

    Args:
        out, other_out: contiguous [queries, num_q_heads, head_dim]
        lse, other_lse: contiguous, float32, of base 2 [queries, num_q_heads]
    """
    load().merge_state_in_place(out, lse, other_out, other_lse)


def softmax(logits: Tensor, temperatures: Tensor) -> Tensor:
    """Probabilities, float32, of logits [rows, vocab_size], each row at its temperature."""
    probabilities: Tensor = load().softmax(logits, temperature=temperatures)
    return probabilities


def draw(
    probabilities: Tensor,
    *,
    top_k: Tensor | int | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    generator: torch.Generator,
) -> Tensor:
    """One id a row of probabilities [rows, vocab_size], after top_k, top_p and min_p, each on what is left.

    Args:
        top_k: int32 [rows], or one for all, which is faster; None keeps all, as the vocabulary's size does in a row.
        top_p, min_p: float32 [rows]; None is 1 and 0 in every row.
        generator: of the device.

    Returns: int32 [rows].
    """
    flashinfer = load()
    ids: Tensor
    if min_p is not None:
        if top_k is not None:
            probabilities = flashinfer.top_k_renorm_probs(probabilities, top_k)
        if top_p is not None:
            probabilities = flashinfer.top_p_renorm_probs(probabilities, top_p)
        ids = flashinfer.min_p_sampling_from_probs(probabilities, min_p, generator=generator)
    elif top_k is not None:
        kept = 1.0 if top_p is None else top_p
        ids = flashinfer.top_k_top_p_sampling_from_probs(probabilities, top_k, kept, generator=generator)
    elif top_p is not None:
        ids = flashinfer.top_p_sampling_from_probs(probabilities, top_p, generator=generator)
    else:
        ids = flashinfer.sampling_from_probs(probabilities, generator=generator)
    return ids


class _Staging:
    """Sends page indices to the device without waiting for it, through pinned memory that an event guards.

    `target` is where they go; without it there is a tensor of its own, which grows.
    """

    def __init__(self, device: torch.device, target: Tensor | None = None) -> None:
        self._is_cuda = device.type == "cuda"
        self._device = device
        self._target = torch.empty(0, dtype=torch.int32, device=device) if target is None else target
        self._grows = target is None
        self._pinned = self._pin(0)  # grows; a target may be far larger than what is ever sent there
        self._copied = torch.cuda.Event() if self._is_cuda else None

    @contextmanager
    def free(self) -> Iterator[None]:
        """Within, pinned memory may be written: what was copied out of it before has arrived."""
        if self._copied is not None:
            self._copied.synchronize()
        yield
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._device))

    def send(self, indices: NDArray[np.int32]) -> Tensor:
        """The indices on the device; valid until the next call."""
        size = len(indices)
        if size > len(self._target):
            assert self._grows, f"{size} pages in a graph's buffer for {len(self._target)}"
            self._target = torch.empty(2 * size, dtype=torch.int32, device=self._device)
        if size > len(self._pinned):
            self._pinned = self._pin(2 * size)
        self._pinned[:size].numpy()[:] = indices
        return self._target[:size].copy_(self._pinned[:size], non_blocking=True)

    def _pin(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device="cpu", pin_memory=self._is_cuda)
