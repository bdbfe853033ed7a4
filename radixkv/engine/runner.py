"""Runs the model on a step's tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from radixkv.attention.backend import AttentionBackend
from radixkv.attention.metadata import PathNode, SequenceSpan, build_metadata, to_device
from radixkv.engine.graphs import GraphRunner
from radixkv.engine.scheduler import Span
from radixkv.memory.req_to_token import ReqToTokenPool
from radixkv.models.paged_attention import PagedContext, flattened_forward
from radixkv.models.streaming import Streaming


class ModelRunner:
    """The model, the attention backend and the table of pages, behind one call.

    Args:
        graphs: runs what it can of them by CUDA graphs.
        streaming: what window and sinks make of attention, where there are any.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        backend: AttentionBackend,
        req_to_token: ReqToTokenPool,
        graphs: GraphRunner | None = None,
        streaming: Streaming | None = None,
    ) -> None:
        self.model = model
        self.backend = backend
        self._req_to_token = req_to_token
        self._graphs = graphs
        self._streaming = streaming

    def forward(self, batch: Sequence[Span]) -> Tensor:
        """Compute the KV of all tokens of `batch`, and the logits of the last token of each span.

        Spans that do not sample have theirs too: logits that are not finite betray KV that must not be shared.

        Returns: [spans, vocab_size], float32, valid until the next call.
        Raises: UnsupportedModelError if the model did not run on the pages, whoever switched it.
        """
        tokens = np.concatenate([span.request.token_ids[span.first : span.last] for span in batch])
        return self.forward_on(batch, to_device(tokens.astype(np.int64), self.model.device))

    @torch.inference_mode()
    def forward_on(self, batch: Sequence[Span], input_ids: Tensor) -> Tensor:
        """As `forward`, of tokens that the device knows already: int64 [tokens]."""
        metadata = build_metadata(
            [self._sequence_span(span) for span in batch],
            page_size=self._req_to_token.page_size,
            device=self.model.device,
        )
        if self._graphs is not None and self._graphs.can_run(metadata):
            return self._graphs.run(input_ids, metadata)
        last_rows = to_device(metadata.qo_indptr[1:].astype(np.int64) - 1, self.model.device)
        adjustment = None if self._streaming is None else self._streaming.step(metadata.positions)
        context = PagedContext(self.backend, metadata, adjustment)
        logits = flattened_forward(self.model, input_ids, metadata.positions, last_rows, context)
        context.check_complete()
        return logits.float()

    def _sequence_span(self, span: Span) -> SequenceSpan:
        request = span.request
        assert request.row is not None, request
        assert request.lease is not None, request
        path = [PathNode(node, node.end) for node in request.lease.whole_path()]
        return SequenceSpan(span.first, span.last, self._req_to_token.pages(request.row, span.last), path)
