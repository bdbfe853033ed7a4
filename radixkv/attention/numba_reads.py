"""What the sequences of a batch read of their pages, alone and together, for the compiled CPU kernel."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from radixkv.attention.backend import AttentionParams
from radixkv.attention.dense_extends import first_visible
from radixkv.attention.metadata import AttentionMetadata, concatenated_ranges
from radixkv.attention.numba_tasks import Reads
from radixkv.attention.shared_prefix import CascadePlan, SharedPart


class BatchReads:
    """Makes the reads of a batch.

    Args:
        chosen: bool [sequences], of which sequences.
    """

    def __init__(self, metadata: AttentionMetadata, chosen: NDArray[np.bool_]) -> None:
        self._metadata, self._chosen = metadata, chosen

    def of_sequences(
        self, sliding_window: int | None, chunk_size: int | None, sink_tokens: int, cascade: CascadePlan
    ) -> Reads:
        """What all of them read in layers that see so far; what `cascade` says is read once for several sequences."""
        own = self._own(sliding_window, chunk_size, cascade)
        if not sink_tokens and not cascade.parts:
            return own
        others = [self._of_part(part) for part in cascade.parts]
        if sink_tokens:
            others.append(self._of_sinks(sink_tokens))
            own = _from(own, sink_tokens)
        return Reads.joined([own, *others])

    def _own(self, sliding_window: int | None, chunk_size: int | None, cascade: CascadePlan) -> Reads:
        """What each sequence reads for itself."""
        starts = self._all.starts
        if sliding_window is not None or chunk_size is not None:
            starts = first_visible(self._all.ends - 1, AttentionParams(1.0, sliding_window, chunk_size))
        if cascade.parts:
            starts = np.maximum(starts, np.repeat(cascade.private_starts[self._chosen], self._all.counts))
        return self._all._replace(starts=starts)

    def _of_sinks(self, sink_tokens: int) -> Reads:
        """What the sequences read of their first tokens, with queries of their own."""
        ends = np.minimum(self._all.ends, sink_tokens)
        return self._all._replace(tokens=self._all.tokens + self._metadata.num_tokens, ends=ends)

    def _of_part(self, part: SharedPart) -> Reads:
        """What several sequences read together."""
        tokens = self._metadata.qo_indptr[part.sequences].astype(np.int64)
        page_list = self._metadata.kv_indptr[part.sequences[:1]].astype(np.int64)
        same = np.ones_like(tokens)
        return Reads(page_list, np.array([len(tokens)]), tokens, same * part.first, same * part.last)

    @cached_property
    def _all(self) -> Reads:
        """What they would read if every token saw all before it."""
        metadata = self._metadata
        page_lists, kv_lens = metadata.kv_indptr[:-1].astype(np.int64), metadata.kv_lens.astype(np.int64)
        if metadata.num_tokens == metadata.num_sequences and self._chosen.all():  # decodes alone
            tokens = np.arange(metadata.num_tokens)
            return Reads(page_lists, np.ones_like(tokens), tokens, np.zeros_like(tokens), kv_lens)
        counts = metadata.qo_lens[self._chosen].astype(np.int64)
        tokens = concatenated_ranges(metadata.qo_indptr[:-1][self._chosen], counts)
        ends = concatenated_ranges(kv_lens[self._chosen] - counts + 1, counts)
        return Reads(page_lists[self._chosen], counts, tokens, np.zeros_like(ends), ends)


def _from(reads: Reads, first: int) -> Reads:
    """`reads` of the tokens from `first` on, without those of which nothing is left."""
    page_lists, counts, tokens, starts, ends = reads
    goes_on = ends > first
    counts = np.bincount(np.repeat(np.arange(len(counts)), counts)[goes_on], minlength=len(counts))
    starts = np.maximum(starts, first)[goes_on]
    return Reads(page_lists[counts > 0], counts[counts > 0], tokens[goes_on], starts, ends[goes_on])
