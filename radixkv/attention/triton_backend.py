"""Attention on a GPU by our own Triton kernels: any group, any page size, every option, and CUDA graphs."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from radixkv.attention.backend import (
    AttentionNeeds,
    AttentionParams,
    LayerAttention,
    why_not_keys_and_values,
)
from radixkv.attention.metadata import AttentionMetadata, concatenated_ranges
from radixkv.attention.shared_prefix import BreakEven, CascadePlan, plan_cascade
from radixkv.attention.triton_plan import (
    PartialSlots,
    SplitPart,
    aligned,
    concatenated,
    extend_splits,
    extend_table,
    extend_tiles,
    shared_table,
    staging,
    upload,
)
from radixkv.attention.triton_stream import StreamStep
from radixkv.memory.kv_pool import KVLayout, KVPool
from radixkv.memory.quantized_pool import QuantizedKVPool

if TYPE_CHECKING:
    from radixkv.kernels.triton_paged import Decodes, PagedKV, Partials, Rule, Tiles

BREAK_EVEN = BreakEven(min_sequences=2, min_tokens=256, min_saved_tokens=4096)  # a guess, to be measured on a GPU
PROGRAMS_PER_SM = 8  # of a decode: twice as many as run at once, so that unequal lengths even out
MAX_SPLITS = 128
KV_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_BYTES = 1024  # of one head of a token: what a block of the kernels holds


class _Merging(NamedTuple):
    """Queries that are computed in parts: their rows, and where their partials lie (see `Partials`)."""

    rows: Tensor
    indptr: Tensor
    num_partials: int


class _DecodeStep(NamedTuple):
    """Planned decodes; where they run in one pass there is nothing to merge."""

    decodes: Decodes
    num_splits: int
    merging: _Merging | None
    shared: dict[int, Tiles]  # by the size of a group


class _ExtendStep(NamedTuple):
    """Planned extends, likewise."""

    tiles: dict[int, Tiles]  # by the size of a group
    merging: _Merging | None


class _Step(NamedTuple):
    """A planned batch."""

    decodes: _DecodeStep | None
    extends: _ExtendStep | None


class TritonBackend:
    """Reads the pages in place: decodes in splits, prefixes that they share once, extends in tiles of query rows.

    `run` waits for nothing on the device and reads no length on the CPU, and the number of splits of a decode follows
    from the batch size and the device alone, so that a CUDA graph can capture it.

    Args:
        break_even: from where on a shared prefix is read once.
    """

    name = "triton"

    def __init__(self, pool: KVPool, needs: AttentionNeeds, *, break_even: BreakEven = BREAK_EVEN) -> None:
        from radixkv.kernels import triton_paged  # not before a model wants it: it imports Triton

        self.pool = pool
        self._needs = needs
        self._break_even = break_even
        self._kv = _paged_kv(pool)
        self._groups = sorted({_group(layer) for layer in needs.layers})
        self._num_kv_heads = min(layer.kv.num_kv_heads for layer in needs.layers)
        self._split_programs = min(
            triton_paged.decode_programs(_group(layer), layer.kv.num_kv_heads) for layer in needs.layers
        )
        self._num_sms = 1
        if pool.device.type == "cuda":
            self._num_sms = torch.cuda.get_device_properties(pool.device).multi_processor_count
        self._step: _Step | None = None
        self._metadata: AttentionMetadata | None = None
        self._stream_steps: dict[int, StreamStep] = {}  # by the number of sinks
        self._fixed_arrays = torch.empty(0, dtype=torch.int32, device=pool.device)

    @staticmethod
    def why_not(needs: AttentionNeeds) -> str | None:
        """Why it cannot serve a model; None if it can.

        It serves one on the CPU where Triton's own variable TRITON_INTERPRET is 1: slowly, to test the kernels.
        """
        if (reason := why_not_keys_and_values(needs)) is not None:
            return reason
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if needs.device.type != "cuda" and not (needs.device.type == "cpu" and interpreted):
            return f"runs on CUDA devices, and the model is on {needs.device}"
        if importlib.util.find_spec("triton") is None:
            return "needs Triton, which is not installed"
        if needs.device.type == "cuda" and torch.cuda.get_device_capability(needs.device) < (8, 0):
            return f"needs a GPU of compute capability 8.0, which {needs.device} has not"
        if needs.kv_dtype == "fp8_e4m3" and not _knows_e4m3(needs.device):
            return f"reads fp8_e4m3 KV on GPUs of compute capability 8.9, which {needs.device} has not; take fp8_e5m2"
        if needs.dtype not in KV_DTYPES:
            return f"reads float32, float16 and bfloat16 KV, and the model's is {needs.dtype}"
        largest = MAX_HEAD_BYTES // needs.dtype.itemsize
        if (head_dim := _head_dim(needs)) > largest:
            return f"reads heads of at most {largest} values, and the model's have {head_dim}"
        return None

    @staticmethod
    def layout(needs: AttentionNeeds) -> KVLayout:
        return "nhd"

    @property
    def num_layers(self) -> int:
        """Layers of the pool."""
        return len(self.pool.layers)

    def plan(self, metadata: AttentionMetadata) -> None:
        """Get ready for a batch, by copies to the device that are not waited for. O(tiles + pages)."""
        self._metadata = metadata
        self._stream_steps.clear()
        self._step = self._plan_step(metadata, plan_cascade(metadata, self._break_even))

    def pays_to_share(self, metadata: AttentionMetadata) -> bool:
        """Whether a prefix of the batch would be read once, which a `fixed` backend does not do."""
        return bool(plan_cascade(metadata, self._break_even).parts)

    def fixed(self, batch_size: int, max_pages: int) -> FixedTritonBackend:
        """A backend over the same pool for decodes alone, whose `run` a CUDA graph can capture.

        All of them use the same arrays on the device, so one is planned and run at a time; make the largest first.

        Args:
            batch_size: rows of the queries; smaller batches are padded.
            max_pages: pages of all sequences of a batch, each counted as often as it is read.
        """
        size = 2 * aligned(batch_size) + max_pages
        if len(self._fixed_arrays) < size:
            self._fixed_arrays = torch.zeros(size, dtype=torch.int32, device=self.pool.device)
        return FixedTritonBackend(self.pool, self._needs, batch_size, self._fixed_arrays)

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store new KV; a token whose slot is negative is dropped, where KV is not coded."""
        from radixkv.kernels import triton_paged

        if isinstance(self.pool, QuantizedKVPool):
            self.pool.write(layer, slots, k, v)
            return
        triton_paged.write(k, v, slots, self._kv[layer])

    def run(self, layer: int, q: Tensor, params: AttentionParams) -> Tensor:
        from radixkv.kernels.triton_paged import Rule

        assert self._step is not None, "run before plan"
        rule = Rule(params.scale, params.sliding_window, params.chunk_size, params.softcap, params.sinks)
        q = self._queries(q)
        out = q.new_empty(*q.shape[:2], self.pool.layers[layer].v_head_dim)
        if params.sink_tokens:
            sink_q = q if params.sink_queries is None else self._queries(params.sink_queries)
            self._stream(params.sink_tokens).run(
                self._kv[layer], q, sink_q, rule, _group(self._needs.layers[layer]), out
            )
            return out
        if self._step.extends is not None:
            self._run_extends(self._step.extends, layer, q, rule, out)
        if self._step.decodes is not None:
            self._run_decodes(self._step.decodes, layer, q, rule, out)
        return out

    def _queries(self, q: Tensor) -> Tensor:
        """As the kernels take them: in order, and rotated if the codes of K are."""
        q = self.pool.queries(q).to(q.dtype)
        return q if q.stride(2) == 1 else q.contiguous()

    def _stream(self, sink_tokens: int) -> StreamStep:
        """The planned batch for layers that see so many sinks beside a window."""
        assert self._metadata is not None, "run before plan"
        if sink_tokens not in self._stream_steps:
            self._stream_steps[sink_tokens] = StreamStep.plan(
                self._metadata,
                sink_tokens,
                self.pool.device,
                num_splits=self._num_splits(int((self._metadata.qo_lens == 1).sum())),
                tile_rows=self._tile_rows(int(self._metadata.qo_lens.max())),
            )
        return self._stream_steps[sink_tokens]

    def _run_extends(self, step: _ExtendStep, layer: int, q: Tensor, rule: Rule, out: Tensor) -> None:
        from radixkv.kernels.triton_paged import attend, attend_parts, merge

        kv, tiles = self._kv[layer], step.tiles[_group(self._needs.layers[layer])]
        if step.merging is None:
            attend(q, kv, tiles, rule, out)
            return
        partials = _empty_partials(step.merging, out)
        attend_parts(q, kv, tiles, rule, partials)
        merge(partials, step.merging.rows, rule.sinks, out)

    def _run_decodes(self, step: _DecodeStep, layer: int, q: Tensor, rule: Rule, out: Tensor) -> None:
        from radixkv.kernels.triton_paged import attend_parts, decode, decode_parts, merge

        kv = self._kv[layer]
        if step.merging is None:
            decode(q, kv, step.decodes, rule, out)
            return
        partials = _empty_partials(step.merging, out)
        decode_parts(q, kv, step.decodes, rule, step.num_splits, partials)
        if step.shared:
            attend_parts(q, kv, step.shared[_group(self._needs.layers[layer])], rule, partials)
        merge(partials, step.merging.rows, rule.sinks, out)

    def _num_splits(self, num_decodes: int) -> int:
        """Splits of each decode, so that the programs of all fill the device."""
        programs = max(1, num_decodes) * self._split_programs
        return min(MAX_SPLITS, -(-PROGRAMS_PER_SM * self._num_sms // programs))

    def _plan_step(self, metadata: AttentionMetadata, cascade: CascadePlan) -> _Step:
        (kv_indices,) = upload([metadata.kv_indices], self.pool.device)
        return _Step(
            self._plan_decodes(metadata, cascade, kv_indices) if 1 in metadata.qo_lens else None,
            self._plan_extends(metadata, kv_indices) if (metadata.qo_lens > 1).any() else None,
        )

    def _plan_decodes(self, metadata: AttentionMetadata, cascade: CascadePlan, kv_indices: Tensor) -> _DecodeStep:
        from radixkv.kernels.triton_paged import Decodes, Tiles

        decodes = np.flatnonzero(metadata.qo_lens == 1)
        num_splits = self._num_splits(len(decodes))
        parts = [SplitPart.cut(metadata, part, self._part_splits(len(part.sequences))) for part in cascade.parts]
        block_rows = self._tile_rows(max((len(part.sequences) for part in parts), default=0))
        slots = PartialSlots.number(decodes, parts, num_splits)
        rows, first_pages, starts, kv_lens, indptr, members, member_slots, *tables = upload(
            [
                metadata.qo_indptr[decodes],
                metadata.kv_indptr[decodes],
                cascade.private_starts[decodes],
                metadata.kv_lens[decodes],
                slots.indptr,
                concatenated([metadata.qo_indptr[part.sequences] for part in parts]),
                slots.of_members,
                *(shared_table(parts, group, block_rows[group]) for group in self._groups),
            ],
            self.pool.device,
        )
        return _DecodeStep(
            Decodes(rows, first_pages, kv_indices, starts, kv_lens),
            num_splits,
            _Merging(rows, indptr, int(slots.indptr[-1])) if num_splits > 1 or parts else None,
            {
                group: Tiles(
                    table.view(-1, 8), block_rows[group], kv_indices, metadata.positions, members, member_slots
                )
                for group, table in zip(self._groups, tables, strict=True)
                if parts
            },
        )

    def _plan_extends(self, metadata: AttentionMetadata, kv_indices: Tensor) -> _ExtendStep:
        from radixkv.kernels.triton_paged import Tiles

        extends = np.flatnonzero(metadata.qo_lens > 1)
        qo_lens = metadata.qo_lens[extends]
        block_rows = self._tile_rows(int(qo_lens.max()))
        few_tiles = int(extend_tiles(metadata, extends, self._groups[0], block_rows[self._groups[0]]).sum())
        num_splits = extend_splits(metadata, extends, few_tiles * self._num_kv_heads, self._wanted_tiles)
        tokens = concatenated_ranges(metadata.qo_indptr[extends], qo_lens)
        first_slots = np.arange(len(tokens) + 1, dtype=np.int32) * np.int32(num_splits)
        slots = np.zeros(metadata.num_tokens, np.int32)
        slots[tokens] = first_slots[:-1]
        tables = [extend_table(metadata, extends, group, block_rows[group], num_splits) for group in self._groups]
        arrays = [tokens.astype(np.int32), first_slots, slots, *tables]
        rows, indptr, token_slots, *tables_there = upload(arrays, self.pool.device)
        merged = num_splits > 1
        return _ExtendStep(
            {
                group: Tiles(
                    table.view(-1, 8),
                    block_rows[group],
                    kv_indices,
                    metadata.positions,
                    slots=token_slots if merged else None,
                )
                for group, table in zip(self._groups, tables_there, strict=True)
            },
            _Merging(rows, indptr, int(first_slots[-1])) if merged else None,
        )

    @property
    def _wanted_tiles(self) -> int:
        """How many programs of tiles fill the device."""
        return 2 * self._num_sms

    def _part_splits(self, num_queries: int) -> int:
        """Splits of a part that so many queries share, so that its tiles, of up to 128 rows, fill the device."""
        return -(-self._wanted_tiles // (-(-num_queries * self._groups[0] // 128) * self._num_kv_heads))

    def _tile_rows(self, num_queries: int) -> dict[int, int]:
        """Rows of a tile, for each size of a group, where no sequence or part has more queries."""
        from radixkv.kernels.triton_paged import tile_rows

        dim, dtype = _head_dim(self._needs), self.pool.dtype
        return {group: tile_rows(num_queries * group, dim, dtype) for group in self._groups}


class FixedTritonBackend(TritonBackend):
    """Decodes alone, over arrays whose addresses never change: a captured `run` reads what `plan` last put there.

    Queries have `batch_size` rows. Those past the planned sequences read nothing, and their outputs are 0.

    Args:
        arrays: int32; where the pages of the sequences begin, their lengths, and the page ids, one after another.
    """

    def __init__(self, pool: KVPool, needs: AttentionNeeds, batch_size: int, arrays: Tensor) -> None:
        from radixkv.kernels.triton_paged import Decodes

        super().__init__(pool, needs)
        self._batch_size = batch_size
        self._arrays = arrays
        self._lens_at = aligned(batch_size)
        self._indices_at = 2 * self._lens_at
        places = torch.arange(batch_size + 1, dtype=torch.int32, device=pool.device)
        decodes = Decodes(
            rows=places[:batch_size],
            first_pages=arrays[:batch_size],
            kv_indices=arrays[self._indices_at :],
            kv_starts=torch.zeros_like(places),
            kv_lens=arrays[self._lens_at : self._lens_at + batch_size],
        )
        num_splits = self._num_splits(batch_size)
        merging = _Merging(decodes.rows, places * num_splits, batch_size * num_splits) if num_splits > 1 else None
        self._step = _Step(_DecodeStep(decodes, num_splits, merging, {}), None)

    def plan(self, metadata: AttentionMetadata) -> None:
        """Get ready for the next `run` or replay. One copy to the device, that is not waited for."""
        num_decodes, size = metadata.num_sequences, self._indices_at + len(metadata.kv_indices)
        assert num_decodes == metadata.num_tokens <= self._batch_size, "not a batch of decodes that fits"
        assert size <= len(self._arrays), f"{len(metadata.kv_indices)} pages are too many"
        staged = staging(size, self.pool.device)
        arrays = staged.numpy()
        arrays[: self._indices_at] = 0
        arrays[:num_decodes] = metadata.kv_indptr[:-1]
        arrays[self._lens_at : self._lens_at + num_decodes] = metadata.kv_lens
        arrays[self._indices_at :] = metadata.kv_indices
        self._arrays[:size].copy_(staged, non_blocking=True)


def _knows_e4m3(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def _paged_kv(pool: KVPool) -> list[PagedKV]:
    """What the kernels see of each layer: values, or codes in the type that they are of, and their scales."""
    from radixkv.kernels.triton_device import E4M3, E5M2
    from radixkv.kernels.triton_paged import PagedKV

    if not isinstance(pool, QuantizedKVPool):
        return [PagedKV(k, v) for k, v in zip(pool.k, pool.v, strict=True)]
    if pool.form.num_scales == 0:
        float8 = {"fp8_e4m3": E4M3, "fp8_e5m2": E5M2}[pool.kv_dtype]
        return [PagedKV(k, v, float8=float8) for k, v in zip(pool.k, pool.v, strict=True)]
    code = torch.int8 if pool.kv_dtype == "int8" else torch.uint8
    typed = [(k.view(code), v.view(code)) for k, v in zip(pool.k, pool.v, strict=True)]
    scales = list(zip(pool.k_scales, pool.v_scales, strict=True))
    if pool.form.num_scales == 1:
        scales = [(k_scale[..., 0], v_scale[..., 0]) for k_scale, v_scale in scales]
    return [PagedKV(*kv, *of_kv) for kv, of_kv in zip(typed, scales, strict=True)]


def _empty_partials(merging: _Merging, out: Tensor) -> Partials:
    from radixkv.kernels.triton_paged import Partials

    return Partials(
        out.new_empty(merging.num_partials, *out.shape[1:], dtype=torch.float32),
        out.new_empty(merging.num_partials, out.shape[1], dtype=torch.float32),
        merging.indptr,
    )


def _group(layer: LayerAttention) -> int:
    return layer.num_q_heads // layer.kv.num_kv_heads


def _head_dim(needs: AttentionNeeds) -> int:
    """Values of the largest head."""
    return max(max(layer.kv.k_head_dim, layer.kv.v_head_dim) for layer in needs.layers)
