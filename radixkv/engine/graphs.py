"""CUDA graphs: a decode step replayed as one launch, so that the GPU does not wait for Python.

A graph repeats the same kernels on the same memory. So there is one for each of a ladder of batch sizes, whose inputs
lie in tensors that stay; a batch is padded to the next size by a dummy sequence that reads and writes a scratch page.
What differs between steps reaches the kernels through those tensors and through what `GraphPlan.update` copies.

What is captured is the whole forward pass of an unchanged Hugging Face model, which may not wait for the GPU then. As
called here it does not: transformers makes no mask for an attention function that has no mask function of its own, and
looks at no value before it decides that; positions are given, nothing is cached, and rows are chosen by indices, not by
a mask. The backend's plan is made before the capture. What does wait: rotary embeddings of the type
"dynamic", whose length decides a Python branch, and experts run one by one (`experts_implementation="eager"`;
"grouped_mm" and "batched_mm" do not wait). Such models fail in `capture`, with an error that says so, and run without
graphs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from radixkv.attention.backend import AttentionBackend, GraphableBackend, GraphPlan
from radixkv.attention.metadata import AttentionMetadata
from radixkv.engine.resolved_config import ResolvedConfig
from radixkv.errors import UnsupportedBackendError, UnsupportedModelError
from radixkv.models.paged_attention import PagedContext, flattened_forward

WARM_UPS = 2  # libraries allocate and choose kernels in the first runs
MAX_BATCH_SIZE = 256
MAX_PAGES = 1 << 22  # of a batch; 16 MiB of indices on the device
RUNG = 8  # between the sizes from there on: at most so many rows are computed for nothing

logger = logging.getLogger(__name__)

Replay = Callable[[], Tensor]
"""Runs what was captured once more; its output lies where the capture's did."""


class Capturer(Protocol):
    """Records what `forward` does to the device."""

    def capture(self, forward: Callable[[], Tensor]) -> Replay:
        """Run `forward`, and return what repeats it on the same memory."""
        ...


class CudaCapturer:
    """`torch.cuda.CUDAGraph`, after warm-ups on a side stream; all graphs share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def capture(self, forward: Callable[[], Tensor]) -> Replay:
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                forward()
        here.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # other threads may go on using CUDA meanwhile
        with torch.cuda.graph(graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"):
            output = forward()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


def make_graphs(
    model: PreTrainedModel, backend: AttentionBackend, config: ResolvedConfig, *, scratch_page: int
) -> GraphRunner | None:
    """Graphs for all batch sizes that an engine of that (resolved) config may have, captured; None to go without.

    Raises: UnsupportedModelError, UnsupportedBackendError if the config asks for graphs that cannot be had.
    """
    if config.cuda_graphs is False:
        return None
    if not isinstance(backend, GraphableBackend):
        if config.cuda_graphs is None:
            return None
        raise UnsupportedBackendError(
            f"attention backend {backend.name!r} cannot run in CUDA graphs; set cuda_graphs=None"
        )
    pages_per_request = -(-config.max_context_tokens // config.page_size)
    graphs = GraphRunner(
        model,
        backend,
        max_batch_size=min(MAX_BATCH_SIZE, config.max_running_requests),
        max_pages=min(MAX_PAGES, config.max_running_requests * pages_per_request),
        page_size=config.page_size,
        scratch_page=scratch_page,
        on_capture=lambda done, of: logger.info("captured %d of %d CUDA graphs", done, of),
    )
    try:
        graphs.capture()
    except UnsupportedModelError as error:
        if config.cuda_graphs:
            raise
        logger.warning("going on without CUDA graphs: %s", error)
        return None
    return graphs


class _Graph(NamedTuple):
    plan: GraphPlan
    replay: Replay


class GraphRunner:
    """Runs batches of decodes by graphs, captured when the first one comes or `capture` is called.

    >>> GraphRunner.ladder(20)
    [1, 2, 4, 8, 16, 20]

    Args:
        max_batch_size: larger batches are not for graphs.
        max_pages: nor are batches whose sequences have more pages together (4 bytes each on the device).
        scratch_page: a page that nobody else has, for the padding.
        capturer: as a default CUDA's.
        on_capture: called with the number of graphs captured, and of all, after each.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        backend: GraphableBackend,
        *,
        max_batch_size: int,
        max_pages: int,
        page_size: int,
        scratch_page: int,
        capturer: Capturer | None = None,
        on_capture: Callable[[int, int], object] | None = None,
    ) -> None:
        self._model = model
        self._backend = backend
        self._sizes = self.ladder(max_batch_size)
        self._max_pages = max(max_pages, max_batch_size)  # of padding alone, too
        self._page_size, self._scratch_page = page_size, scratch_page
        self._capturer = capturer or CudaCapturer(model.device)
        self._on_capture = on_capture
        self._graphs: dict[int, _Graph] = {}
        # The inputs, int64. Rows of a batch that are not sequences are padding.
        self._input_ids, self._positions, self._slots = (
            torch.zeros(max_batch_size, dtype=torch.int64, device=model.device) for _ in range(3)
        )
        self._rows = torch.arange(max_batch_size, dtype=torch.int64, device=model.device)

    @staticmethod
    def ladder(max_batch_size: int) -> list[int]:
        """The batch sizes that are captured: 1, 2, 4, then every eighth, and the largest."""
        sizes = {1, 2, 4, *range(RUNG, max_batch_size + 1, RUNG), max_batch_size}
        return sorted(size for size in sizes if size <= max_batch_size)

    def can_run(self, metadata: AttentionMetadata) -> bool:
        """Whether the batch is for a graph: decodes alone, few enough, and faster so than by the backend itself."""
        num_sequences = metadata.num_sequences
        if metadata.num_tokens != num_sequences or num_sequences > self._sizes[-1]:
            return False
        num_pages = len(metadata.kv_indices) + self._size(num_sequences) - num_sequences
        return num_pages <= self._max_pages and not self._backend.pays_to_share(metadata)

    @torch.inference_mode()
    def run(self, input_ids: Tensor, metadata: AttentionMetadata) -> Tensor:
        """The forward pass over a batch that `can_run`; `input_ids` int64 [sequences]. Waits for nothing on the device.

        Returns: logits float32 [sequences, vocab_size], valid until the next call.
        Raises: UnsupportedModelError, as `capture`.
        """
        self.capture()
        size = self._size(metadata.num_sequences)
        graph = self._graphs[size]
        self._pad(metadata.num_sequences, size)
        self._input_ids[: len(input_ids)].copy_(input_ids, non_blocking=True)
        self._positions[: len(input_ids)].copy_(metadata.positions, non_blocking=True)
        self._slots[: len(input_ids)].copy_(metadata.slots, non_blocking=True)
        graph.plan.update(self._padded(metadata, size))
        return graph.replay()[: len(input_ids)].float()

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture all graphs that are not captured yet, the largest first, whose memory the others then use.

        Raises: UnsupportedModelError if the model's forward pass waits for the device.
        """
        for size in reversed(self._sizes):
            if size not in self._graphs:
                self._graphs[size] = self._capture(size)
                if self._on_capture is not None:
                    self._on_capture(len(self._graphs), len(self._sizes))

    def _capture(self, size: int) -> _Graph:
        self._pad(0, size)
        plan = self._backend.graph_plan(self._slots[:size], self._max_pages)
        plan.update(self._padded(self._nothing(), size))
        context = PagedContext(plan, self._backend.num_layers)

        def forward() -> Tensor:
            return flattened_forward(
                self._model, self._input_ids[:size], self._positions[:size], self._rows[:size], context
            )

        try:
            replay = self._capturer.capture(forward)
        except RuntimeError as error:  # CUDA's errors have no narrower type
            raise UnsupportedModelError(
                f"the forward pass of {type(self._model).__name__} cannot be captured in a CUDA graph "
                f"({str(error).strip().splitlines()[0]}); run it without CUDA graphs"
            ) from error
        context.check_complete()
        return _Graph(plan, replay)

    def _size(self, num_sequences: int) -> int:
        return next(size for size in self._sizes if size >= num_sequences)

    def _pad(self, num_sequences: int, size: int) -> None:
        """Make the rows [num_sequences, size) padding: token 0 at position 0 of the scratch page."""
        self._input_ids[num_sequences:size].zero_()
        self._positions[num_sequences:size].zero_()
        self._slots[num_sequences:size].fill_(self._scratch_page * self._page_size)

    def _padded(self, metadata: AttentionMetadata, size: int) -> AttentionMetadata:
        """`metadata` and padding, with the inputs that stay."""
        padding = np.ones(size - metadata.num_sequences, np.int32)
        own_pages = metadata.kv_indptr[-1:] + np.cumsum(padding, dtype=np.int32)
        return AttentionMetadata(
            page_size=self._page_size,
            qo_indptr=np.arange(size + 1, dtype=np.int32),
            kv_indptr=np.concatenate([metadata.kv_indptr, own_pages]),
            kv_indices=np.concatenate([metadata.kv_indices, self._scratch_page * padding]),
            kv_last_page_len=np.concatenate([metadata.kv_last_page_len, padding]),
            kv_lens=np.concatenate([metadata.kv_lens, padding]),
            positions=self._positions[:size],
            slots=self._slots[:size],
        )

    def _nothing(self) -> AttentionMetadata:
        """A batch of no sequences."""
        start, none = np.zeros(1, np.int32), np.empty(0, np.int32)
        return AttentionMetadata(self._page_size, start, start, none, none, none, self._positions[:0], self._slots[:0])
