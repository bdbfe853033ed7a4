"""What the model needs for one step, as plain arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from radixkv.attention.metadata import BatchLayout, PathNode, SequenceSpan, lay_out
from radixkv.cache.lease import Lease
from radixkv.engine.span import Span
from radixkv.memory.req_to_token import ReqToTokenPool


class StepInput(NamedTuple):
    """The tokens of one step, where their KV goes, and which of them want logits.

    It holds no request, no lease and nothing that lies on a device, so it can be kept, compared and sent to another
    process.

    Attributes:
        request_ids: [sequences]
        token_ids: int64 [tokens], those of one request after those of another. Empty if the device knows them already.
        layout: where each sequence begins, and the pages of its KV.
        logits_of: int64 [sequences + …], the last row of each sequence. Those that do not sample have logits too:
            logits that are not finite betray KV that must not be shared. Then, sequence by sequence, the other rows
            that `prompt_logprobs` or the check of a draft needs.
        state_slots: int64 [sequences, 2], where layers that keep a state read that of each sequence, and write the
            next one; [sequences, 0] where no layer does. At the start of a sequence nothing is read.
    """

    request_ids: tuple[int, ...]
    token_ids: NDArray[np.int64]
    layout: BatchLayout
    logits_of: NDArray[np.int64]
    state_slots: NDArray[np.int64]


def make_step_input(spans: Sequence[Span], table: ReqToTokenPool, *, known_tokens: bool = True) -> StepInput:
    """What the model needs to compute `spans`. O(tokens + pages).

    Args:
        table: where the pages of each running request are read.
        known_tokens: False if the step before chooses the tokens, and the device alone will know them.
    """
    leases = [span.request.running() for span in spans]
    sequences = [_sequence(span, *held, table) for span, held in zip(spans, leases, strict=True)]
    layout = lay_out(sequences, page_size=table.page_size)
    tokens = [span.request.tokens_between(span.first, span.last) for span in spans] if known_tokens else []
    return StepInput(
        tuple(span.request.id for span in spans),
        np.concatenate([np.empty(0, np.int64), *tokens]),
        layout,
        np.concatenate([layout.qo_indptr[1:].astype(np.int64) - 1, *_more_rows(spans, layout)]),
        np.array([lease.state_slots() for lease, _ in leases], np.int64),
    )


def _more_rows(spans: Sequence[Span], layout: BatchLayout) -> Iterator[NDArray[np.int64]]:
    for span, row in zip(spans, layout.qo_indptr.tolist(), strict=False):
        if not span.num_drafted and span.request.prompt_logprobs is None:
            continue
        if positions := span.more_positions:
            yield np.arange(positions.start, positions.stop) - span.first + row


def _sequence(span: Span, lease: Lease, row: int, table: ReqToTokenPool) -> SequenceSpan:
    path = [PathNode(id(node), node.end) for node in lease.whole_path()]
    return SequenceSpan(span.first, span.last, table.pages(row, span.last), path)
