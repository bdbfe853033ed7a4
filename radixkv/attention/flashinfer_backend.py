"""Attention on NVIDIA GPUs by FlashInfer's kernels, which read the pages in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixkv.attention.backend import (
    AttentionNeeds,
    AttentionParams,
    LayerAttention,
    why_not_keys_and_values,
)
from radixkv.attention.metadata import AttentionMetadata, concatenated_ranges, indptr
from radixkv.attention.shared_prefix import BreakEven, CascadePlan, SharedPart, plan_cascade
from radixkv.kernels.flashinfer_paged import (
    NO_WINDOW,
    AttentionKind,
    GraphBuffers,
    PagedDecode,
    PagedPrefill,
    PageLists,
    PrefillBackend,
    load,
    merge_in_place,
)
from radixkv.memory.kv_pool import KVLayout, KVPool, pool_bytes_per_token

DEVICE_TYPE = "cuda"
MIN_CAPABILITY = (8, 0)  # bfloat16 and asynchronous copies
HEAD_DIMS = (64, 128, 256)  # for which the kernels that merge parts are compiled
DTYPES = (torch.float16, torch.bfloat16)
FLOAT8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}  # what KV may be kept as besides
WORKSPACE_BYTES = 256 << 20  # partial results of KV that is split over many processors

# What a level of shared parts must spare each layer to pay for its three or so more kernels: 25 µs of reading at
# 4 TB/s. Two-level decodes of 128 sequences over 8 KV heads of 128 in 16 bit are known to be half as fast as plain ones
# where 128 tokens are shared (64 MiB spared), and twice as fast at 256.
LEVEL_BYTES = 100 << 20
MIN_SHARING_SEQUENCES = 4
MIN_SHARED_TOKENS = 256

# And what sharing must spare each layer to be faster than a graph of plain decodes: 250 µs, as long as Python takes to
# launch a layer's kernels one by one.
GRAPH_BYTES = 1 << 30


class FlashInferBackend:
    """KV in float16, bfloat16, fp8_e4m3 and fp8_e5m2 on CUDA.

    Sequences that compute one token run by the decode kernels and all others by the prefill kernels, one call each:
    in a joint prefill call the tiles are as high as the extends need, and a decode would leave them nearly empty.
    Layers that differ in heads, window or soft cap have plans of their own; each plan's layers run alike. Where several
    decodes share a prefix and it pays, the prefix is read once, level by level of the tree.

    Args:
        break_even: from where on a shared prefix is read once; as a default where it spares `LEVEL_BYTES` a layer.
        prefill: FlashInfer's implementation for extends; fa2 splits long cached KV over many processors, fa3 does not.
    """

    name = "flashinfer"

    def __init__(
        self,
        pool: KVPool,
        needs: AttentionNeeds,
        *,
        break_even: BreakEven | None = None,
        prefill: PrefillBackend = "fa2",
    ) -> None:
        self.pool = pool
        kv_dtype = FLOAT8.get(needs.kv_dtype, needs.dtype)
        self._k, self._v = ([pages.view(kv_dtype) for pages in of_layers] for of_layers in (pool.k, pool.v))
        self._break_even = break_even or _break_even(pool)
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=pool.device)
        self._kinds = [_kind(layer, needs) for layer in needs.layers]
        self._plans = {kind: _Plan(kind, self._workspace, prefill) for kind in dict.fromkeys(self._kinds)}
        self._graph_buffers: dict[AttentionKind, GraphBuffers] = {}

    @staticmethod
    def why_not(needs: AttentionNeeds) -> str | None:
        if (reason := why_not_keys_and_values(needs)) is not None:
            return reason
        if needs.kv_dtype not in ("auto", *FLOAT8):
            return f"reads KV in the model's dtype and in {' and '.join(FLOAT8)}, not {needs.kv_dtype}"
        if needs.device.type != DEVICE_TYPE:
            return f"runs on CUDA, and the model is on {needs.device}"
        if needs.dtype not in DTYPES:
            return f"reads float16 and bfloat16 KV, and the model's is {needs.dtype}"
        for number, layer in enumerate(needs.layers):
            if (reason := _why_not_layer(layer)) is not None:
                return f"{reason}, as layer {number} asks"
        return _why_not_here(needs.device)

    @staticmethod
    def layout(needs: AttentionNeeds) -> KVLayout:
        return "nhd"

    @property
    def num_layers(self) -> int:
        return len(self.pool.layers)

    def plan(self, metadata: AttentionMetadata) -> None:
        qo_lens = metadata.qo_lens
        decodes = _share(metadata, np.flatnonzero(qo_lens == 1), self.pool.device)
        extends = _share(metadata, np.flatnonzero(qo_lens > 1), self.pool.device)
        cascade = plan_cascade(metadata, self._break_even)
        for plan in self._plans.values():
            plan.plan(metadata, decodes, extends, cascade)

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        self.pool.write(layer, slots, k, v)

    def run(self, layer: int, q: Tensor, params: AttentionParams) -> Tensor:
        kind = self._kinds[layer]
        assert _window_left(params) == kind.window_left, f"layer {layer} changed its window"
        return self._plans[kind].run(q.contiguous(), self._k[layer], self._v[layer])

    def pays_to_share(self, metadata: AttentionMetadata) -> bool:
        """Whether reading shared prefixes once, which a `fixed` backend does not do, spares more than a graph would."""
        parts = plan_cascade(metadata, self._break_even).parts
        saved_tokens = sum((part.last - part.first) * (len(part.sequences) - 1) for part in parts)
        sharing = [
            layer for layer, kind in zip(self.pool.layers, self._kinds, strict=True) if kind.window_left == NO_WINDOW
        ]
        return saved_tokens * pool_bytes_per_token(sharing, self.pool.dtype) > self.num_layers * GRAPH_BYTES

    def fixed(self, batch_size: int, max_pages: int) -> FixedFlashInferBackend:
        """A backend over the same pool for exactly `batch_size` decodes with `max_pages` pages at most.

        Its `run` may be captured in a CUDA graph; `plan` before each replay. All of them use the same workspace and the
        same buffers, so one runs at a time; make the largest first.
        """
        for kind in self._plans:
            buffers = self._graph_buffers.get(kind)
            if buffers is None or not buffers.holds(batch_size, max_pages):
                self._graph_buffers[kind] = GraphBuffers.empty(batch_size, max_pages, self.pool.device)
        decodes = {
            kind: PagedDecode(kind, self._workspace, buffers.first(batch_size))
            for kind, buffers in self._graph_buffers.items()
        }
        return FixedFlashInferBackend(self.pool, (self._k, self._v), self._kinds, decodes, batch_size)


class FixedFlashInferBackend:
    """Decodes of one batch size, for a CUDA graph; made by `FlashInferBackend.fixed`."""

    name = "flashinfer"

    def __init__(
        self,
        pool: KVPool,
        kv: tuple[list[Tensor], list[Tensor]],
        kinds: Sequence[AttentionKind],
        decodes: dict[AttentionKind, PagedDecode],
        batch_size: int,
    ) -> None:
        self.pool = pool
        self._k, self._v = kv
        self._kinds = kinds
        self._decodes = decodes
        self._batch_size = batch_size

    @property
    def num_layers(self) -> int:
        return len(self.pool.layers)

    def plan(self, metadata: AttentionMetadata) -> None:
        sequences = np.arange(metadata.num_sequences)
        assert metadata.num_sequences == metadata.num_tokens == self._batch_size, "not the batch that was captured"
        for kind, decode in self._decodes.items():
            decode.plan(page_lists(metadata, sequences, first_tokens(metadata, kind.window_left)))

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        self.pool.write(layer, slots, k, v)

    def run(self, layer: int, q: Tensor, params: AttentionParams) -> Tensor:
        q = q.contiguous()
        out = torch.empty_like(q)
        self._decodes[self._kinds[layer]].run(q, self._k[layer], self._v[layer], out)
        return out


Rows = slice | Tensor
"""Rows of a tensor: a slice where they lie side by side, else int64 indices on its device."""


class _Share(NamedTuple):
    """Some sequences of the batch, ascending, and the rows of their tokens."""

    sequences: NDArray[np.intp]
    rows: Rows


class _Level(NamedTuple):
    """Shared parts that lie at the same depth, planned as one batch. `rows` are places among the decodes."""

    rows: Rows
    num_rows: int
    prefill: PagedPrefill


class _Plan:
    """The wrappers of the layers of one kind, and what they run in the planned batch."""

    def __init__(self, kind: AttentionKind, workspace: Tensor, prefill: PrefillBackend) -> None:
        self._kind = kind
        self._workspace = workspace
        self._decode = PagedDecode(kind, workspace)
        self._extend = PagedPrefill(kind, workspace, prefill)
        self._level_prefills: list[PagedPrefill] = []  # as many as ever were levels
        self._levels: list[_Level] = []
        self._decodes: _Share | None = None
        self._extends: _Share | None = None

    def plan(
        self, metadata: AttentionMetadata, decodes: _Share | None, extends: _Share | None, cascade: CascadePlan
    ) -> None:
        self._decodes, self._extends = decodes, extends
        self._levels = []
        starts = first_tokens(metadata, self._kind.window_left)
        if extends is not None:
            qo_indptr = indptr(metadata.qo_lens[extends.sequences])
            self._extend.plan(qo_indptr, page_lists(metadata, extends.sequences, starts), causal=True)
        if decodes is not None:
            if cascade.parts and self._kind.window_left == NO_WINDOW:
                starts = cascade.private_starts
                self._levels = self._plan_levels(decodes.sequences, cascade.parts)
            self._decode.plan(page_lists(metadata, decodes.sequences, starts))

    def run(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        if self._extends is not None:
            rows = self._extends.rows
            part = _take(out, rows)
            self._extend.run(_take(q, rows), k, v, part)
            _put(out, rows, part)
        if self._decodes is not None:
            rows = self._decodes.rows
            part = _take(out, rows)
            self._run_decodes(_take(q, rows), k, v, part)
            _put(out, rows, part)
        return out

    def _run_decodes(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        if not self._levels:
            self._decode.run(q, k, v, out)
            return
        lse = q.new_empty(q.shape[:2], dtype=torch.float32)
        self._decode.run(q, k, v, out, lse)
        for level in self._levels:
            shared_out = q.new_empty(level.num_rows, *q.shape[1:])
            shared_lse = lse.new_empty(level.num_rows, lse.shape[1])
            level.prefill.run(_take(q, level.rows), k, v, shared_out, shared_lse)
            part, part_lse = _take(out, level.rows), _take(lse, level.rows)
            merge_in_place(part, part_lse, shared_out, shared_lse)
            _put(out, level.rows, part)
            _put(lse, level.rows, part_lse)

    def _plan_levels(self, decodes: NDArray[np.intp], parts: Sequence[SharedPart]) -> list[_Level]:
        by_level = _by_level(parts)
        while len(self._level_prefills) < len(by_level):
            self._level_prefills.append(PagedPrefill(self._kind, self._workspace, "fa2"))
        return [
            self._plan_level(prefill, decodes, own_parts)
            for prefill, own_parts in zip(self._level_prefills, by_level, strict=False)
        ]

    def _plan_level(self, prefill: PagedPrefill, decodes: NDArray[np.intp], parts: Sequence[SharedPart]) -> _Level:
        """Each part is one sequence to FlashInfer, whose queries are those of all decodes that share it."""
        places = np.searchsorted(decodes, np.concatenate([part.sequences for part in parts]))
        pages = PageLists(
            indptr([len(part.pages) for part in parts]),
            np.concatenate([part.pages for part in parts]),
            np.full(len(parts), self._kind.page_size, np.int32),  # parts are whole pages
        )
        prefill.plan(indptr([len(part.sequences) for part in parts]), pages, causal=False)
        return _Level(_rows(places, self._workspace.device), len(places), prefill)


def _break_even(pool: KVPool) -> BreakEven:
    layer_bytes_per_token = pool.bytes_per_token / len(pool.layers)
    return BreakEven(MIN_SHARING_SEQUENCES, MIN_SHARED_TOKENS, round(LEVEL_BYTES / layer_bytes_per_token))


def _kind(layer: LayerAttention, needs: AttentionNeeds) -> AttentionKind:
    return AttentionKind(
        num_q_heads=layer.num_q_heads,
        num_kv_heads=layer.kv.num_kv_heads,
        head_dim=layer.kv.k_head_dim,
        page_size=needs.page_size,
        dtype=needs.dtype,
        kv_dtype=FLOAT8.get(needs.kv_dtype, needs.dtype),
        scale=layer.params.scale,
        window_left=_window_left(layer.params),
        softcap=layer.params.softcap or 0.0,
    )


def _why_not_layer(layer: LayerAttention) -> str | None:
    kv, params = layer.kv, layer.params
    if kv.k_head_dim not in HEAD_DIMS or kv.v_head_dim != kv.k_head_dim:
        sizes = ", ".join(map(str, HEAD_DIMS))
        return f"knows heads of {sizes} with values like the keys, not {kv.k_head_dim} and {kv.v_head_dim}"
    if layer.num_q_heads % kv.num_kv_heads:
        return f"cannot share {kv.num_kv_heads} KV heads among {layer.num_q_heads} query heads"
    if params.chunk_size is not None:
        return "has no chunked attention"
    if params.sinks is not None or params.sink_tokens:
        return "has no attention sinks here"
    return None


def _why_not_here(device: torch.device) -> str | None:
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < MIN_CAPABILITY:
        return "needs compute capability {}.{}, and the GPU has {}.{}".format(*MIN_CAPABILITY, *capability)
    try:
        load()
    except ImportError as error:
        return f"is not there: {error}"
    return None


def _window_left(params: AttentionParams) -> int:
    return NO_WINDOW if params.sliding_window is None else params.sliding_window - 1


def first_tokens(metadata: AttentionMetadata, window_left: int) -> NDArray[np.int32]:
    """The first token of each sequence that any of its queries sees. FlashInfer masks by the distance from the end, so
    what lies before can be left out."""
    if window_left == NO_WINDOW:
        return np.zeros_like(metadata.kv_lens)
    first: NDArray[np.int32] = np.maximum(metadata.kv_lens - metadata.qo_lens - window_left, 0)
    return first


def page_lists(metadata: AttentionMetadata, sequences: NDArray[np.intp], starts: NDArray[np.int32]) -> PageLists:
    """The pages of `sequences` from those on that hold their tokens `starts` (of the whole batch). O(pages)."""
    first = metadata.kv_indptr[sequences] + starts[sequences] // metadata.page_size
    last = metadata.kv_indptr[sequences + 1]
    if np.array_equal(first[1:], last[:-1]):
        indices = metadata.kv_indices[first[0] : last[-1]]
    else:
        indices = metadata.kv_indices[concatenated_ranges(first, last - first)]
    return PageLists(indptr(last - first), indices, metadata.kv_last_page_len[sequences])


def _share(metadata: AttentionMetadata, sequences: NDArray[np.intp], device: torch.device) -> _Share | None:
    """Those sequences of the batch, if there are any."""
    if not len(sequences):
        return None
    tokens = concatenated_ranges(metadata.qo_indptr[sequences], metadata.qo_lens[sequences])
    return _Share(sequences, _rows(tokens, device))


def _by_level(parts: Sequence[SharedPart]) -> list[list[SharedPart]]:
    """The parts by their depth: a sequence has at most one of each level. Parents come before children."""
    depth: dict[int, int] = {}
    levels: list[list[SharedPart]] = []
    for part in parts:
        level = depth.get(int(part.sequences[0]), 0)  # the same for all: they share every part above
        depth.update(dict.fromkeys(part.sequences.tolist(), level + 1))
        levels += [[]] if level == len(levels) else []
        levels[level].append(part)
    return levels


def _rows(indices: NDArray[np.integer], device: torch.device) -> Rows:
    """A slice if they are consecutive: the scheduler puts decodes first, so most are, and nothing is copied."""
    first, last = int(indices[0]), int(indices[-1]) + 1
    if last - first == len(indices) and np.all(np.diff(indices) == 1):
        return slice(first, last)
    return torch.from_numpy(indices.astype(np.int64)).to(device, non_blocking=True)


def _take(x: Tensor, rows: Rows) -> Tensor:
    """The rows: a view if they are a slice, else a copy."""
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


def _put(x: Tensor, rows: Rows, values: Tensor) -> None:
    """Write back what `_take` gave; a view needs nothing."""
    if not isinstance(rows, slice):
        x.index_copy_(0, rows, values)
