"""Attention on the CPU by our compiled kernel, on the pages in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixkv.attention import numba_tasks
from radixkv.attention.backend import AttentionNeeds, AttentionParams, why_not_keys_and_values
from radixkv.attention.dense_extends import DenseExtends
from radixkv.attention.extend_choice import MIN_DENSE_TOKENS, faster_extends, is_known
from radixkv.attention.metadata import AttentionMetadata
from radixkv.attention.numba_launches import Launches, Scratch, factors, float32, merge_fields
from radixkv.attention.numba_reads import BatchReads
from radixkv.attention.numba_tasks import Heads, Work, plan_work
from radixkv.attention.program_plan import LayersOperation, Pages
from radixkv.attention.shared_prefix import NEVER, NO_CASCADE, BreakEven, plan_cascade
from radixkv.kernels import numba_arguments, numba_cpu, numba_merge, openmp
from radixkv.kernels.compiling import log_if_slow
from radixkv.kernels.numba_emitter import LANES
from radixkv.kernels.numba_modes import MODES, mode_for
from radixkv.kernels.processor import this_processor
from radixkv.memory.kv_codes import code_form, is_quantized
from radixkv.memory.kv_pool import KVLayout, KVPool
from radixkv.memory.kv_shape import LayerKV

MIN_TOKENS_PER_THREAD = 128  # below it waking a thread costs more than it computes

LARGEST_GROUP_TO_SHARE = 4


class _Visible(NamedTuple):
    """What decides which positions a token sees; layers that agree on it share their tasks."""

    heads: Heads
    sliding_window: int | None
    chunk_size: int | None
    sink_tokens: int
    has_sinks: bool


class NumbaBackend:
    """Decodes and extends read the pages where they lie, without a copy, on the threads that torch has.

    KV is float32, bfloat16 or float16, or codes of them. Float32 is computed as such; products of bfloat16 are added in
    float32, and by the processor's own dot products of bfloat16 where it has them, for which weights are rounded to
    bfloat16. Codes become float32 in registers, and scales are applied to scores and weights, not to each of them,
    unless they are of blocks of components.
    """

    name = "numba"

    def __init__(self, pool: KVPool, needs: AttentionNeeds) -> None:
        self.pool = pool
        self.num_layers = len(pool.layers)
        mode = mode_for(pool.kv_dtype)
        assert mode is not None, pool.kv_dtype
        self.mode = MODES[mode]
        self.long_extends = needs.long_extends or "kernel"
        self.rows_of_extends = numba_cpu.rows_of_extends(self.mode.name)
        self.num_threads = torch.get_num_threads()
        self._word = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[pool.k[0].itemsize]
        self._k_words = [pages.view(self._word).numpy() for pages in pool.k]  # the same memory
        self._v_words = [pages.view(self._word).numpy() for pages in pool.v]
        self.pages = [self._pages_of(layer) for layer in range(self.num_layers)]
        self.addresses = np.array([pages[:2] for pages in self.pages])  # of K and V, [layers, 2]
        self.scales = [(k.data_ptr(), v.data_ptr()) for k, v in zip(pool.k_scales, pool.v_scales, strict=True)]  # or 0
        self._layers: Sequence[AttentionParams] = ()
        self._kinds: list[tuple[NDArray[np.int64], AttentionParams]] = []
        self._compile(needs)
        if needs.long_extends is None and not is_known(this_processor(), needs.dtype):
            self.long_extends = faster_extends(needs, NumbaBackend, num_threads=self.num_threads)

    @staticmethod
    def why_not(needs: AttentionNeeds) -> str | None:
        if (reason := why_not_keys_and_values(needs)) is not None:
            return reason
        if needs.device.type != "cpu":
            return f"runs on the CPU, and the model is on {needs.device}"
        if is_quantized(needs.kv_dtype):
            return _why_not_codes(needs)
        if needs.kv_dtype != "auto":
            return f"cannot read {needs.kv_dtype} KV"
        if needs.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"reads float32, bfloat16 and float16 KV, and the model's is {needs.dtype}"
        if needs.dtype == torch.float16 and mode_for("float16") is None:
            return "cannot read float16 KV on this processor"
        if needs.dtype != torch.float32:
            odd = [dim for layer in needs.layers for dim in (layer.kv.k_head_dim, layer.kv.v_head_dim) if dim % 2]
            if odd:
                return f"takes 16-bit KV in pairs, and the model's heads have {odd[0]} components"
        return None

    @staticmethod
    def layout(needs: AttentionNeeds) -> KVLayout:
        """In lanes where a page fills registers; else the kernel sorts tokens into lanes as it reads them."""
        return "lanes" if needs.page_size % LANES == 0 else "nhd"

    def plan(self, metadata: AttentionMetadata) -> NumbaPlan:
        return NumbaPlan(self, metadata)

    def kinds_of(self, layers: Sequence[AttentionParams]) -> list[tuple[NDArray[np.int64], AttentionParams]]:
        """Which layers attend alike in a program, and how. Asked with the same object, it knows the answer."""
        if layers is not self._layers:
            kinds: dict[tuple[LayerKV, AttentionParams], list[int]] = {}
            for layer, params in enumerate(layers):
                if params.sinks is not None or params.sink_tokens:
                    raise ValueError("sinks are not part of a program")
                kinds.setdefault((self.pool.layers[layer], params), []).append(layer)
            self._layers, self._kinds = layers, [(np.array(same), params) for (_, params), same in kinds.items()]
        return self._kinds

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store KV as the pool does, in one compiled pass where it lies in lanes."""
        if self.pool.layout != "lanes":
            self.pool.write(layer, slots, k, v)
            return
        if self.mode.encodes:
            self._encode(layer, slots, k, v)
            return
        k, v = self.pool.as_kept(k, v)
        k_words, v_words = (x.contiguous().view(self._word).numpy() for x in (k, v))
        pages = (self._k_words[layer], self._v_words[layer])
        self.mode.write(slots.numpy(), self.pool.page_size, k_words, v_words, *pages)

    def _pages_of(self, layer: int) -> Pages:
        """Where a layer's KV lies; the bytes of a head mean something in lanes alone."""
        k, v, num_heads = self.pool.k[layer], self.pool.v[layer], self.pool.layers[layer].num_kv_heads
        head_bytes = [pages.stride(0) * pages.element_size() // num_heads for pages in (k, v)]
        return Pages(k.data_ptr(), v.data_ptr(), self.pool.page_size, *head_bytes)

    def _encode(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Code and store new KV in one pass."""
        pool = self.pool
        values = [x.float().contiguous().numpy() for x in (pool.queries(k), v)]
        bits = {1: torch.uint8, 2: torch.uint16}[pool.k_scales[layer].itemsize]
        scales = [pages[layer].view(bits).numpy() for pages in (pool.k_scales, pool.v_scales)]
        codes = (self._k_words[layer], self._v_words[layer])
        self.mode.write(slots.numpy(), pool.page_size, *values, *codes, *scales)

    def _compile(self, needs: AttentionNeeds) -> None:
        """Compile what the model needs, or load it from disk, so that no request waits for it."""
        groups = {layer.num_q_heads // layer.kv.num_kv_heads for layer in needs.layers}
        with log_if_slow("the attention kernels"):
            of_decodes = {min(group, numba_cpu.MAX_ROWS) for group in groups}
            for rows in sorted(of_decodes | {self.rows_of_extends}):
                numba_cpu.attention_tiles(self.mode.name, rows)
            numba_cpu.attention_worker()
            numba_merge.merge_worker()
            numba_tasks.compile_planner()
            kv = self.pool.layers[0]
            nothing = [float32(0, kv.num_kv_heads, dim) for dim in (kv.k_head_dim, kv.v_head_dim)]
            self.write(0, torch.empty(0, dtype=torch.int64, device=self.pool.device), *nothing)


class NumbaPlan:
    """The attention of one batch. See `AttentionPlan`."""

    def __init__(self, backend: NumbaBackend, metadata: AttentionMetadata) -> None:
        self._backend, self.pool, self._mode = backend, backend.pool, backend.mode
        self._metadata = metadata
        self._num_threads = backend.num_threads
        self._work: dict[_Visible, Work] = {}  # planned when the first layer of its kind comes
        self._launches: dict[tuple[object, ...], Launches] = {}  # likewise
        self._kept: list[Scratch] = []  # what operations write to
        self._tables: dict[int, Tensor] = {}  # of biases, which tasks read
        self._pages = np.ascontiguousarray(metadata.kv_indices, np.int32)
        if backend.long_extends == "dense":
            self._is_dense = metadata.qo_lens >= MIN_DENSE_TOKENS
        else:
            self._is_dense = np.zeros(metadata.num_sequences, np.bool_)
        self._all_dense = bool(self._is_dense.all())
        self._reads = BatchReads(metadata, ~self._is_dense)
        self._dense = DenseExtends(self.pool, metadata, np.flatnonzero(self._is_dense))

    def store_kv(self, layer: int, k: Tensor, v: Tensor) -> None:
        self._backend.write(layer, self._metadata.slots, k, v)

    def attend(self, layer: int, q: Tensor, params: AttentionParams) -> Tensor:
        kv = self.pool.layers[layer]
        out = float32(q.shape[0], q.shape[1], kv.v_head_dim)
        if not self._all_dense:
            rows = q
            if params.sink_tokens:
                rows = torch.cat([q, q if params.sink_queries is None else params.sink_queries])
            self._attend(layer, self.pool.queries(rows).float().contiguous(), params, out)
        out = out.to(q.dtype)
        self._dense.attend(layer, q, params, out)
        return out

    # -- planning ----------------------------------------------------------------------------------------------------

    def _plan_work(self, key: _Visible) -> Work:
        """The tasks of layers that see as `key` says."""
        cascade = NO_CASCADE
        if key.sliding_window is None and key.chunk_size is None:
            cascade = plan_cascade(self._metadata, break_even(key.heads.group))
        reads = self._reads.of_sequences(key.sliding_window, key.chunk_size, key.sink_tokens, cascade)
        return plan_work(
            reads,
            key.heads,
            num_tokens=self._metadata.num_tokens,
            num_threads=self._num_threads,
            merge_all=key.has_sinks,
            rows_of_extends=self._backend.rows_of_extends,
        )

    # -- as part of a program ----------------------------------------------------------------------------------------

    def pages(self, dtype: torch.dtype) -> list[Pages] | None:
        """As `ProgramPlan.pages`."""
        keeps_values = dtype == self.pool.dtype and self._mode.dtype == str(dtype).removeprefix("torch.")
        if not keeps_values or self.pool.layout != "lanes":
            return None
        return self._backend.pages

    def operations(self, q: Tensor, out: Tensor, layers: Sequence[AttentionParams]) -> list[LayersOperation]:
        """As `ProgramPlan.operations`. Layers of one kind differ in their KV's addresses alone."""
        return [
            operation
            for same, params in self._backend.kinds_of(layers)
            for operation in self._operations_of(same, q, params, out)
        ]

    def _operations_of(
        self, layers: NDArray[np.int64], q: Tensor, params: AttentionParams, out: Tensor
    ) -> Iterator[LayersOperation]:
        first = int(layers[0])
        work = self._work_of(q.shape[1], first, params)
        scratch = self._scratch(first, work, q)
        self._kept.append(scratch)
        fields = self._fields(first, q, params, out, scratch)
        for stage, table in enumerate(work.tables):
            tiles = numba_cpu.attention_tiles(self._mode.name, table.rows)
            record = numba_arguments.ATTENTION.fill(counter=0, **fields, **table.fields, **tiles.fields)
            records = record.repeat(len(layers))
            records["k"], records["v"] = self._backend.addresses[layers].T
            yield LayersOperation(layers, stage, numba_cpu.attention_worker(), records)
        if len(work.merged_rows):
            record = numba_arguments.MERGE.fill(counter=0, sinks=0, **merge_fields(work, out, scratch, q.shape[1]))
            yield LayersOperation(layers, 2, numba_merge.merge_worker(), record.repeat(len(layers)))

    # -- running -----------------------------------------------------------------------------------------------------

    def _work_of(self, num_q_heads: int, layer: int, params: AttentionParams) -> Work:
        """The tasks of a layer, planned when the first one of its kind comes."""
        heads = Heads(num_q_heads, self.pool.layers[layer].num_kv_heads)
        key = _Visible(heads, params.sliding_window, params.chunk_size, params.sink_tokens, params.sinks is not None)
        if key not in self._work:
            self._work[key] = self._plan_work(key)
        return self._work[key]

    def _scratch(self, layer: int, work: Work, q: Tensor) -> Scratch:
        num_rows = q.shape[0] * q.shape[1]
        partial_out = float32(work.num_partials, self.pool.layers[layer].v_head_dim)
        return Scratch(float32(num_rows + work.num_partials), partial_out, num_rows)

    def _fields(self, layer: int, q: Tensor, params: AttentionParams, out: Tensor, scratch: Scratch) -> dict[str, Any]:
        """What `numba_arguments.ATTENTION` holds besides the counter and what a table of tasks tells."""
        pool, kv = self.pool, self.pool.layers[layer]
        _, _, page_size, k_head_bytes, v_head_bytes = self._backend.pages[layer]
        return dict(
            **self._layer_fields(layer, q, out, params),
            pages=self._pages.ctypes.data,
            lse=scratch.lse.data_ptr(),
            partial_out=scratch.partial_out.data_ptr(),
            partial_lse=scratch.partial_lse,
            k_dim=kv.k_head_dim,
            v_dim=kv.v_head_dim,
            num_kv_heads=kv.num_kv_heads,
            page_size=page_size,
            in_lanes=pool.layout == "lanes",
            k_head_bytes=k_head_bytes,
            v_head_bytes=v_head_bytes,
            num_q_heads=q.shape[1],
            **factors(params, self._mode.unit),
        )

    def _layer_fields(self, layer: int, q: Tensor, out: Tensor, params: AttentionParams) -> dict[str, int]:
        """Those of them that differ between layers that attend alike."""
        k, v = self._backend.pages[layer][:2]
        k_scales, v_scales = self._backend.scales[layer]
        return {
            "q": q.data_ptr(),
            "k": k,
            "v": v,
            "k_scales": k_scales,
            "v_scales": v_scales,
            "out": out.data_ptr(),
            **self._bias_fields(params),
        }

    def _bias_fields(self, params: AttentionParams) -> dict[str, int]:
        """Where the biases of keys lie, and the positions of queries; the table belongs to `_tables` then."""
        if params.key_bias is None:
            return {"key_bias": 0, "q_positions": 0, "key_bias_tokens": 0}
        assert not params.sink_tokens, "a sink's place differs from its position"
        table = params.key_bias.table(int(self._metadata.kv_lens.max()))
        self._tables[id(table)] = table
        return {
            "key_bias": table.data_ptr(),
            "q_positions": self._metadata.positions.data_ptr(),
            "key_bias_tokens": table.shape[1],
        }

    def _launches_of(self, layer: int, q: Tensor, params: AttentionParams, out: Tensor) -> Launches:
        """Those of a layer, made when the first one of its kind comes."""
        kv = self.pool.layers[layer]
        sees = (params.sliding_window, params.chunk_size, params.sink_tokens)
        key = (kv, q.shape[1], params.scale, params.softcap, *sees, params.sinks is None, params.key_bias is None)
        if (kept := self._launches.get(key)) is not None:
            return kept
        work = self._work_of(q.shape[1], layer, params)
        scratch, counter = self._scratch(layer, work, q), np.zeros(1, np.int64)
        fields = self._fields(layer, q, params, out, scratch) | {"counter": counter.ctypes.data}
        num_threads = min(self._num_threads, 1 + work.num_tokens // MIN_TOKENS_PER_THREAD)
        tables, merge = [], None
        for table in work.tables:
            tiles = numba_cpu.attention_tiles(self._mode.name, table.rows)
            tables.append(({**fields, **table.fields, **tiles.fields}, min(num_threads, len(table.tasks))))
        if len(work.merged_rows):
            num_chunks = -(-len(work.merged_rows) // numba_merge.MERGED_AT_ONCE)
            of_merge = merge_fields(work, out, scratch, q.shape[1]) | {"counter": counter.ctypes.data}
            merge = of_merge, min(num_threads, num_chunks)
        launches = self._launches[key] = Launches(work, scratch, tables, merge, counter)
        return launches

    def _attend(self, layer: int, q: Tensor, params: AttentionParams, out: Tensor) -> None:
        launches = self._launches_of(layer, q, params, out)
        own = self._layer_fields(layer, q, out, params)
        for fields, num_threads in launches.tables:
            launches.counter[0] = 0
            arguments = numba_arguments.ATTENTION.fill(**{**fields, **own})
            openmp.run(numba_cpu.attention_worker(), arguments.ctypes.data, num_threads)
        if launches.merge is None:
            return
        launches.counter[0] = 0
        sinks = None if params.sinks is None else params.sinks.detach().float().contiguous()
        fields, num_threads = launches.merge
        of_layer = {"out": own["out"], "sinks": 0 if sinks is None else sinks.data_ptr()}
        arguments = numba_arguments.MERGE.fill(**{**fields, **of_layer})
        openmp.run(numba_merge.merge_worker(), arguments.ctypes.data, num_threads)


def break_even(group: int) -> BreakEven:
    """From where on reading a prefix once pays on a CPU, for groups of so many query heads; see docs/benchmarks.md.

    The heads of a group use what was loaded for one of them. So the more they are, the nearer the kernel is to what the
    processor can multiply, however often it loads; the fewer, the more there is to spare.
    """
    if group > LARGEST_GROUP_TO_SHARE:
        return NEVER
    return BreakEven(min_sequences=8, min_tokens=128, min_saved_tokens=4096 * group)


def _why_not_codes(needs: AttentionNeeds) -> str | None:
    """Why codes of the model's KV cannot be read; None if they can."""
    form = code_form(needs.kv_dtype)
    if needs.page_size % LANES:
        return f"reads {needs.kv_dtype} KV in pages of whole {LANES} tokens, and they have {needs.page_size}"
    if mode_for(needs.kv_dtype) is None:
        return f"cannot read {needs.kv_dtype} KV on this processor"
    in_lane = 4 * form.codes_per_byte
    odd = [dim for layer in needs.layers for dim in (layer.kv.k_head_dim, layer.kv.v_head_dim) if dim % in_lane]
    if odd:
        return f"takes {in_lane} components of {needs.kv_dtype} KV together, and the model's heads have {odd[0]}"
    return None
