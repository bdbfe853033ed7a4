"""Attention on a GPU by our own Triton kernels: any group, any page size, every option, and CUDA graphs."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from radixkv.attention.backend import AttentionNeeds, AttentionParams, why_not_keys_and_values
from radixkv.attention.metadata import AttentionMetadata
from radixkv.attention.shared_prefix import BreakEven, plan_cascade
from radixkv.attention.triton_launches import Launches, group_size, largest_head_dim
from radixkv.attention.triton_plan import aligned, staging, upload
from radixkv.attention.triton_steps import DecodeStep, ExtendStep, Merging
from radixkv.attention.triton_stream import StreamStep
from radixkv.kernels import triton_paged
from radixkv.kernels.triton_device import E4M3, E5M2
from radixkv.kernels.triton_paged import Decodes, PagedKV, Rule
from radixkv.memory.kv_codes import CODE_FORMS
from radixkv.memory.kv_pool import KVLayout, KVPool

BREAK_EVEN = BreakEven(min_sequences=2, min_tokens=256, min_saved_tokens=4096)  # a guess, to be measured on a GPU
KV_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_BYTES = 1024  # of one head of a token: what a block of the kernels holds


class TritonBackend:
    """Reads the pages in place: decodes in splits, prefixes that they share once, extends in tiles of query rows.

    Attention waits for nothing on the device and reads no length on the CPU, and the number of splits of a decode
    follows from the batch size and the device alone, so that a CUDA graph can capture it.

    Args:
        break_even: from where on a shared prefix is read once.
    """

    name = "triton"

    def __init__(self, pool: KVPool, needs: AttentionNeeds, *, break_even: BreakEven = BREAK_EVEN) -> None:
        self.pool = pool
        self.num_layers = len(pool.layers)
        self.break_even = break_even
        self.launches = Launches(needs)
        self._kv = _paged_kv(pool)
        self._group_sizes = [group_size(layer) for layer in needs.layers]
        self._graph_arrays = torch.empty(0, dtype=torch.int32, device=pool.device)

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
        if needs.device.type == "cuda" and torch.cuda.get_device_capability(needs.device) < (8, 0):
            return f"needs compute capability 8.0 or newer; {needs.device} is older"
        if needs.kv_dtype not in ("auto", *CODE_FORMS):
            return f"cannot read {needs.kv_dtype} KV"
        if needs.kv_dtype == "fp8_e4m3" and not _knows_e4m3(needs.device):
            return f"needs compute capability 8.9 or newer to read fp8_e4m3 KV; use fp8_e5m2 on {needs.device}"
        if needs.dtype not in KV_DTYPES:
            return f"reads float32, float16 and bfloat16 KV, and the model's is {needs.dtype}"
        largest = MAX_HEAD_BYTES // needs.dtype.itemsize
        if (head_dim := largest_head_dim(needs)) > largest:
            return f"reads heads of at most {largest} values, and the model's have {head_dim}"
        return None

    @staticmethod
    def layout(needs: AttentionNeeds) -> KVLayout:
        return "nhd"

    def plan(self, metadata: AttentionMetadata) -> TritonPlan:
        """Get ready for a batch, by copies to the device that are not waited for. O(tiles + pages)."""
        return TritonPlan(self, metadata)

    def pays_to_share(self, metadata: AttentionMetadata) -> bool:
        """Whether a prefix of the batch would be read once, which a graph plan does not do."""
        return bool(plan_cascade(metadata, self.break_even).parts)

    def graph_plan(self, slots: Tensor, max_pages: int) -> TritonGraphPlan:
        """See `GraphableBackend`. All graph plans use the same arrays on the device."""
        size = 2 * aligned(len(slots)) + max_pages
        if len(self._graph_arrays) < size:
            self._graph_arrays = torch.zeros(size, dtype=torch.int32, device=self.pool.device)
        return TritonGraphPlan(self, slots, self._graph_arrays)

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store new KV; a token whose slot is negative is dropped, where KV is not coded."""
        if self.pool.holds_codes:
            self.pool.write(layer, slots, k, v)
        else:
            triton_paged.write(k, v, slots, self._kv[layer])

    def run(
        self, steps: list[DecodeStep | ExtendStep], layer: int, q: Tensor, params: AttentionParams, kv_len: int
    ) -> Tensor:
        """Attention of a layer that sees no sinks, in `steps` that have different rows; no sequence is longer."""
        q = self._queries(q)
        out = q.new_empty(*q.shape[:2], self.pool.layers[layer].v_head_dim)
        for step in steps:
            step.run(self._kv[layer], q, _rule(params, kv_len), self._group_sizes[layer], out)
        return out

    def run_stream(self, step: StreamStep, layer: int, q: Tensor, params: AttentionParams) -> Tensor:
        """Attention of a layer that sees a window and sinks."""
        sink_q = q if params.sink_queries is None else params.sink_queries
        q, sink_q = self._queries(q), self._queries(sink_q)
        out = q.new_empty(*q.shape[:2], self.pool.layers[layer].v_head_dim)
        assert params.key_bias is None, "a sink's place differs from its position"
        step.run(self._kv[layer], q, sink_q, _rule(params, 0), self._group_sizes[layer], out)
        return out

    def _queries(self, q: Tensor) -> Tensor:
        """As the kernels take them: in order, and rotated if the codes of K are."""
        q = self.pool.queries(q).to(q.dtype)
        return q if q.stride(2) == 1 else q.contiguous()


class TritonPlan:
    """The attention of one batch. See `AttentionPlan`."""

    def __init__(self, backend: TritonBackend, metadata: AttentionMetadata) -> None:
        self._backend, self._metadata = backend, metadata
        (kv_indices,) = upload([metadata.kv_indices], backend.pool.device)
        cascade = plan_cascade(metadata, backend.break_even)
        decodes = DecodeStep.plan(metadata, cascade, backend.launches, kv_indices)
        extends = ExtendStep.plan(metadata, backend.launches, kv_indices)
        self._steps = [step for step in (extends, decodes) if step is not None]
        self._streams: dict[int, StreamStep] = {}  # by the number of sinks, planned when the first such layer comes

    def store_kv(self, layer: int, k: Tensor, v: Tensor) -> None:
        self._backend.write(layer, self._metadata.slots, k, v)

    def attend(self, layer: int, q: Tensor, params: AttentionParams) -> Tensor:
        if params.sink_tokens:
            return self._backend.run_stream(self._stream(params.sink_tokens), layer, q, params)
        return self._backend.run(self._steps, layer, q, params, int(self._metadata.kv_lens.max()))

    def _stream(self, sink_tokens: int) -> StreamStep:
        """The batch for layers that see `sink_tokens` sinks beside a window."""
        if sink_tokens not in self._streams:
            self._streams[sink_tokens] = StreamStep.plan(
                self._metadata, sink_tokens, self._backend.launches, self._backend.pool.device
            )
        return self._streams[sink_tokens]


class TritonGraphPlan:
    """Decodes over arrays whose addresses never change: a captured `attend` reads what `update` last put there.

    Queries have as many rows as there are slots. Those past the sequences of the batch read nothing, and their outputs
    are 0. See `GraphPlan`.

    Args:
        arrays: int32; where the pages of the sequences begin, their lengths, and the page ids, one after another.
    """

    def __init__(self, backend: TritonBackend, slots: Tensor, arrays: Tensor) -> None:
        self._backend, self._slots, self._arrays = backend, slots, arrays
        batch_size = len(slots)
        self._lens_at = aligned(batch_size)
        self._indices_at = 2 * self._lens_at
        places = torch.arange(batch_size + 1, dtype=torch.int32, device=arrays.device)
        decodes = Decodes(
            rows=places[:batch_size],
            first_pages=arrays[:batch_size],
            kv_indices=arrays[self._indices_at :],
            kv_starts=torch.zeros_like(places),
            kv_lens=arrays[self._lens_at : self._lens_at + batch_size],
        )
        num_splits = backend.launches.decode_splits(batch_size)
        merging = Merging(decodes.rows, places * num_splits, batch_size * num_splits) if num_splits > 1 else None
        self._step = DecodeStep(decodes, num_splits, merging, {})
        self._longest = min(len(arrays) - self._indices_at, backend.pool.num_pages) * backend.pool.page_size
        self._tables: set[Tensor] = set()

    def update(self, metadata: AttentionMetadata) -> None:
        """As `GraphPlan.update`, by one copy to the device; a batch may have fewer sequences than there are slots."""
        num_decodes, size = metadata.num_sequences, self._indices_at + len(metadata.kv_indices)
        assert num_decodes == metadata.num_tokens <= len(self._slots), "not a batch of decodes that fits"
        assert size <= len(self._arrays), f"{len(metadata.kv_indices)} pages are too many"
        staged = staging(size, self._arrays.device)
        arrays = staged.numpy()
        arrays[: self._indices_at] = 0
        arrays[:num_decodes] = metadata.kv_indptr[:-1]
        arrays[self._lens_at : self._lens_at + num_decodes] = metadata.kv_lens
        arrays[self._indices_at :] = metadata.kv_indices
        self._arrays[:size].copy_(staged, non_blocking=True)

    def store_kv(self, layer: int, k: Tensor, v: Tensor) -> None:
        self._backend.write(layer, self._slots, k, v)

    def attend(self, layer: int, q: Tensor, params: AttentionParams) -> Tensor:
        assert not params.sink_tokens, "streaming has no graphs"
        if params.key_bias is not None:  # what was captured reads this table, though it may grow for others
            self._tables.add(params.key_bias.table(self._longest))
        return self._backend.run([self._step], layer, q, params, self._longest)


def _knows_e4m3(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def _paged_kv(pool: KVPool) -> list[PagedKV]:
    """What the kernels see of each layer: values, or codes in the type that they are of, and their scales."""
    float8 = {"fp8_e4m3": E4M3, "fp8_e5m2": E5M2}.get(pool.kv_dtype)
    kept = zip(pool.k, pool.v, pool.k_scales, pool.v_scales, strict=True)
    if pool.kv_dtype == "int8":
        return [PagedKV(k.view(torch.int8), v.view(torch.int8), ks[..., 0], vs[..., 0]) for k, v, ks, vs in kept]
    if pool.kv_dtype in ("int4", "fp4"):
        return [PagedKV(*of_layer) for of_layer in kept]
    return [PagedKV(k, v, float8=float8) for k, v, _, _ in kept]


def _rule(params: AttentionParams, kv_len: int) -> Rule:
    """What a layer asks, where no sequence is longer than `kv_len`."""
    key_bias = None if params.key_bias is None else params.key_bias.table(kv_len)
    return Rule(params.scale, params.sliding_window, params.chunk_size, params.softcap, params.sinks, key_bias)
