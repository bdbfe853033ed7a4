"""How a batch is cut up for the Triton kernels: splits of shared parts, slots of partials, tables of tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixkv.attention.metadata import AttentionMetadata, concatenated_ranges, indptr
from radixkv.attention.shared_prefix import SharedPart

Ints = NDArray[np.int32]

ALIGNMENT = 4  # int32 values: Triton compiles kernels anew for arrays that do not begin at a multiple of 16 bytes
MIN_SPLIT_TOKENS = 256  # of a shared part or an extend: what a program reads at least
BLOCK_TOKENS = 64  # splits are whole blocks


class SplitPart(NamedTuple):
    """A shared part in splits: split s holds the tokens from starts[s] on up to the next one's, or to `last`."""

    sequences: NDArray[np.intp]
    first_page: int  # where the pages of the first of them stand in kv_indices
    starts: range
    last: int

    @classmethod
    def cut(cls, metadata: AttentionMetadata, part: SharedPart, num_splits: int) -> SplitPart:
        """Cut `part` into as many splits as are wanted, or into fewer that are long enough."""
        split_tokens = max(MIN_SPLIT_TOKENS, -(-(part.last - part.first) // num_splits))
        split_tokens = -(-split_tokens // BLOCK_TOKENS) * BLOCK_TOKENS
        first_page = int(metadata.kv_indptr[part.sequences[0]])
        return cls(part.sequences, first_page, range(part.first, part.last, split_tokens), part.last)


class PartialSlots(NamedTuple):
    """Where partials go: those of a decode lie together, its own splits first, then those of its shared parts.

    indptr: [num_decodes + 1]; of_members: the first slot of each member of each part, part after part.
    """

    indptr: Ints
    of_members: Ints

    @classmethod
    def number(cls, decodes: NDArray[np.intp], parts: Sequence[SplitPart], num_splits: int) -> PartialSlots:
        places = [np.searchsorted(decodes, part.sequences) for part in parts]
        counts = np.full(len(decodes), num_splits)
        for members, part in zip(places, parts, strict=True):
            counts[members] += len(part.starts)
        starts = indptr(counts)
        free = starts[:-1] + num_splits
        of_members = []
        for members, part in zip(places, parts, strict=True):
            of_members.append(free[members])
            free[members] += len(part.starts)
        return cls(starts, concatenated(of_members))


def extend_splits(metadata: AttentionMetadata, extends: NDArray[np.intp], num_tiles: int, wanted_tiles: int) -> int:
    """In how many splits extends of `num_tiles` tiles are read: more than one where few tokens extend a long prefix."""
    most = -(-int(metadata.kv_lens[extends].max()) // MIN_SPLIT_TOKENS)
    return min(most, -(-wanted_tiles // num_tiles))


def extend_tiles(metadata: AttentionMetadata, extends: NDArray[np.intp], group: int, block_rows: int) -> Ints:
    """How many tiles of rows each extend has."""
    return -(-metadata.qo_lens[extends] * group // block_rows)


def extend_table(
    metadata: AttentionMetadata, extends: NDArray[np.intp], group: int, block_rows: int, num_splits: int
) -> Ints:
    """Tiles of all extends, see `Tiles`. Those that read most come first, so that none of them is left for the end."""
    num_tiles = extend_tiles(metadata, extends, group, block_rows)
    sequence = np.repeat(extends, num_tiles)
    first_row = concatenated_ranges(np.zeros_like(num_tiles), num_tiles) * block_rows
    qo_lens, kv_lens = metadata.qo_lens[sequence], metadata.kv_lens[sequence]
    visible = kv_lens - qo_lens + np.minimum((first_row + block_rows - 1) // group, qo_lens - 1) + 1
    split_tokens = _whole_blocks(-(-kv_lens // num_splits))
    queries = (metadata.qo_indptr[sequence], qo_lens, first_row, metadata.kv_indptr[sequence])
    tables = []
    for split in range(num_splits):
        start = np.minimum(split * split_tokens, visible)
        end = np.minimum(start + split_tokens, visible)
        tables.append(np.stack([*queries, start, end, np.full_like(start, split), np.zeros_like(start)], axis=1))
    table = np.concatenate(tables).astype(np.int32)
    return table[np.argsort(table[:, 4] - table[:, 5], kind="stable")]


def shared_table(parts: Sequence[SplitPart], group: int, block_rows: int) -> Ints:
    """Tiles of all splits of all parts, see `Tiles`."""
    tiles = []
    first_member = 0
    for part in parts:
        count = len(part.sequences)
        tiles += [
            (first_member, count, first_row, part.first_page, start, min(start + part.starts.step, part.last), split, 0)
            for split, start in enumerate(part.starts)
            for first_row in range(0, count * group, block_rows)
        ]
        first_member += count
    return np.array(tiles, np.int32)


def _whole_blocks(num_tokens: Ints) -> Ints:
    return -(-num_tokens // BLOCK_TOKENS) * BLOCK_TOKENS


def concatenated(arrays: Sequence[Ints]) -> Ints:
    return np.concatenate([np.empty(0, np.int32), *arrays])


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def staging(size: int, device: torch.device) -> Tensor:
    """Int32 on the CPU; for a GPU in pinned memory, which torch does not reuse before a copy from it is done."""
    return torch.empty(size, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")


def upload(arrays: Sequence[Ints], device: torch.device) -> list[Tensor]:
    """Flat copies of int32 arrays on `device`, in one transfer that is not waited for."""
    ends = np.cumsum([aligned(array.size) for array in arrays])
    staged = staging(int(ends[-1]), device)
    starts = [0, *ends[:-1]]
    places = [slice(start, start + array.size) for start, array in zip(starts, arrays, strict=True)]
    for array, place in zip(arrays, places, strict=True):
        staged.numpy()[place] = array.ravel()
    there = staged.to(device, non_blocking=True)
    return [there[place] for place in places]
