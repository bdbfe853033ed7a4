"""What attention must know of a batch."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class PathNode(NamedTuple):
    """A node of the radix tree on the path of a sequence, whose tokens up to `end` lie in pages that its users share.

    `key` tells nodes apart.
    """

    key: Hashable
    end: int


class SequenceSpan(NamedTuple):
    """The part of one request that a batch computes: its tokens `[first, last)`, whose KV will lie in `pages`.

    `pages` (int32) hold the tokens `[0, last)`; `path` are the nodes that hold the first of them, root side first, each
    ending on a page's border.
    """

    first: int
    last: int
    pages: NDArray[np.int32]
    path: Sequence[PathNode] = ()


class SharedNode(NamedTuple):
    """A node that several decodes of a batch read: their tokens `[first, last)` lie in the same pages.

    `sequences` are places in the batch, ascending.
    """

    sequences: tuple[int, ...]
    first: int
    last: int


class BatchLayout(NamedTuple):
    """The layout of a flattened batch as plain arrays, none of them on a device. Fields as in `AttentionMetadata`."""

    page_size: int
    qo_indptr: NDArray[np.int32]
    kv_indptr: NDArray[np.int32]
    kv_indices: NDArray[np.int32]
    kv_last_page_len: NDArray[np.int32]
    kv_lens: NDArray[np.int32]
    positions: NDArray[np.int64]
    slots: NDArray[np.int64]
    shared_nodes: tuple[SharedNode, ...]


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """The layout of a flattened batch, in FlashInfer's terms; index arrays are int32 on the CPU.

    Attributes:
        page_size: tokens a page.
        qo_indptr: [num_sequences + 1]; sequence i computes the flattened tokens [qo_indptr[i], qo_indptr[i + 1]).
        kv_indptr, kv_indices: its KV lies in pages kv_indices[kv_indptr[i] : kv_indptr[i + 1]].
        kv_last_page_len: tokens in the last of them, in [1, page_size].
        kv_lens: tokens in all of them; the last ones are those computed now.
        positions: int64 [num_tokens] on the device, place of each flattened token in its sequence.
        slots: int64 [num_tokens] on the device, where its KV goes.
        shared_nodes: the nodes of the tree that two or more decodes read, parents before children.
    """

    page_size: int
    qo_indptr: NDArray[np.int32]
    kv_indptr: NDArray[np.int32]
    kv_indices: NDArray[np.int32]
    kv_last_page_len: NDArray[np.int32]
    kv_lens: NDArray[np.int32]
    positions: Tensor
    slots: Tensor
    shared_nodes: tuple[SharedNode, ...] = ()

    @classmethod
    def of(cls, layout: BatchLayout, device: torch.device | str) -> AttentionMetadata:
        """`layout`, with positions and slots on `device`; waits for nothing on it."""
        positions, slots = to_device(layout.positions, device), to_device(layout.slots, device)
        return cls(*layout[:6], positions=positions, slots=slots, shared_nodes=layout.shared_nodes)

    @property
    def num_sequences(self) -> int:
        return len(self.kv_lens)

    @property
    def num_tokens(self) -> int:
        return int(self.qo_indptr[-1])

    @property
    def qo_lens(self) -> NDArray[np.int32]:
        """Tokens that each sequence computes."""
        return np.diff(self.qo_indptr)


def build_metadata(
    spans: Sequence[SequenceSpan], *, page_size: int, device: torch.device | str = "cpu"
) -> AttentionMetadata:
    """The metadata of `spans`, laid out one after another. O(tokens + pages)."""
    return AttentionMetadata.of(lay_out(spans, page_size=page_size), device)


def lay_out(spans: Sequence[SequenceSpan], *, page_size: int) -> BatchLayout:
    """Lay `spans` out one after another. O(tokens + pages)."""
    kv_lens = np.array([span.last for span in spans], np.int32)
    firsts = np.array([span.first for span in spans], np.int64)
    qo_lens = kv_lens - firsts
    num_pages = -(-kv_lens // page_size)
    positions = concatenated_ranges(firsts, qo_lens)
    kv_indptr = indptr(num_pages)
    kv_indices = np.concatenate([span.pages[:count] for span, count in zip(spans, num_pages, strict=True)])
    return BatchLayout(
        page_size=page_size,
        qo_indptr=indptr(qo_lens),
        kv_indptr=kv_indptr,
        kv_indices=kv_indices,
        kv_last_page_len=kv_lens - (num_pages - 1) * page_size,
        kv_lens=kv_lens,
        positions=positions,
        slots=_slots(positions, np.repeat(kv_indptr[:-1], qo_lens), kv_indices, page_size),
        shared_nodes=tuple(_shared_nodes(spans)),
    )


def flattened_slots(metadata: AttentionMetadata, kv_indices: NDArray[np.int32]) -> NDArray[np.int64]:
    """Where the KV of each flattened token goes, int64 [num_tokens], if its sequences' pages are `kv_indices`."""
    qo_lens = metadata.qo_lens
    first_positions = metadata.kv_lens - qo_lens - metadata.qo_indptr[:-1]
    positions = np.arange(metadata.num_tokens) + np.repeat(first_positions, qo_lens)
    return _slots(positions, np.repeat(metadata.kv_indptr[:-1], qo_lens), kv_indices, metadata.page_size)


def indptr(counts: NDArray[np.integer] | Sequence[int]) -> NDArray[np.int32]:
    """Where each of several ranges begins that lie one after another, and where the last one ends.

    >>> indptr([2, 0, 3]).tolist()
    [0, 2, 2, 5]
    """
    ends = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, dtype=np.int32, out=ends[1:])
    return ends


def concatenated_ranges(starts: NDArray[np.integer], counts: NDArray[np.integer]) -> NDArray[np.int64]:
    """The ranges [start, start + count), one after another.

    >>> concatenated_ranges(np.array([7, 0]), np.array([2, 3])).tolist()
    [7, 8, 0, 1, 2]
    """
    if (counts == 1).all():
        return starts.astype(np.int64)
    ends = np.cumsum(counts, dtype=np.int64)
    return np.arange(ends[-1]) + np.repeat(starts - (ends - counts), counts)


def _slots(
    positions: NDArray[np.int64], first_pages: NDArray[np.int32], kv_indices: NDArray[np.int32], page_size: int
) -> NDArray[np.int64]:
    """The slot of each token, whose sequence's pages stand in `kv_indices` from `first_pages` on."""
    pages = kv_indices[first_pages + positions // page_size].astype(np.int64)
    slots: NDArray[np.int64] = pages * page_size + positions % page_size
    return slots


def to_device(values: NDArray[np.int64], device: torch.device | str) -> Tensor:
    """`values` as a tensor on `device`, without waiting for what the device does before."""
    tensor = torch.from_numpy(values)
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _shared_nodes(spans: Sequence[SequenceSpan]) -> Iterator[SharedNode]:
    """The nodes that at least two decodes have on their paths, parents before children. O(nodes on the paths)."""
    readers: dict[Hashable, list[int]] = {}
    bounds: dict[Hashable, tuple[int, int]] = {}
    for i, span in enumerate(spans):
        start = 0
        for node in span.path if span.last - span.first == 1 else ():
            readers.setdefault(node.key, []).append(i)
            bounds[node.key] = (start, node.end)
            start = node.end
    for key in sorted(readers, key=lambda key: bounds[key]):
        if len(readers[key]) > 1:
            yield SharedNode(tuple(readers[key]), *bounds[key])
