"""Attention on the CPU: decodes by our compiled kernel on the pages in place, extends by torch."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixkv.attention.backend import AttentionParams
from radixkv.attention.metadata import AttentionMetadata
from radixkv.attention.shared_prefix import SharedPrefix, attend_shared, find_shared_prefixes, merge
from radixkv.attention.torch_backend import TorchBackend
from radixkv.kernels import numba_cpu
from radixkv.memory.kv_pool import KVPool

MIN_TOKENS_PER_THREAD = 256  # below it waking a thread costs more than it computes
CHUNKS_PER_THREAD = 4  # threads take chunks as they can: another one may be kept from its core


class NumbaBackend(TorchBackend):
    """Float32 KV on the CPU. Decodes read each page once, without a copy, on as many threads as torch uses."""

    name = "numba"

    def __init__(self, pool: KVPool) -> None:
        super().__init__(pool)
        self._num_threads = torch.get_num_threads()
        self._helpers = ThreadPoolExecutor(max(1, self._num_threads - 1), "radixkv-decode")
        self._k = [pages.numpy() for pages in pool.k]  # the same memory
        self._v = [pages.numpy() for pages in pool.v]
        self._decode_indptr = self._decode_indices = self._decode_lens = np.empty(0, np.int32)
        self._shared: list[SharedPrefix] = []
        numba_cpu.warm_up()

    @staticmethod
    def why_not(pool: KVPool) -> str | None:
        if pool.device.type != "cpu":
            return f"runs on the CPU, and the model is on {pool.device}"
        if pool.dtype != torch.float32:
            return f"reads float32 KV, and the model's is {pool.dtype}"
        return None

    def plan(self, metadata: AttentionMetadata) -> None:
        super().plan(metadata)
        decodes = self._decodes
        counts = np.diff(metadata.kv_indptr)[decodes]
        self._decode_indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        pages = [metadata.kv_indices[metadata.kv_indptr[i] : metadata.kv_indptr[i + 1]] for i in decodes]
        self._decode_indices = np.concatenate(pages) if pages else np.empty(0, np.int32)
        self._decode_lens = metadata.kv_lens[decodes]
        self._shared = find_shared_prefixes(pages, self._decode_lens, metadata.page_size)

    def _decode(self, layer: int, q: Tensor, params: AttentionParams) -> Tensor:
        q = q.contiguous()
        if self._shared and params.sliding_window is None and params.chunk_size is None:
            return self._decode_with_shared(layer, q, params)
        kv_lens = self._decode_lens
        starts = np.zeros_like(kv_lens)
        if params.sliding_window is not None:
            starts = np.maximum(starts, kv_lens - params.sliding_window)
        if params.chunk_size is not None:
            starts = np.maximum(starts, (kv_lens - 1) // params.chunk_size * params.chunk_size)
        return self._decode_from(layer, q, starts, params)[0]

    def _decode_with_shared(self, layer: int, q: Tensor, params: AttentionParams) -> Tensor:
        starts = np.zeros_like(self._decode_lens)
        for sequences, pages in self._shared:
            starts[sequences] = len(pages) * self.pool.page_size
        out, lse = self._decode_from(layer, q, starts, params)
        for sequences, pages in self._shared:
            rows, page_ids = self._tensor(sequences), self._tensor(pages)
            k = self.pool.k[layer].index_select(0, page_ids).flatten(0, 1)
            v = self.pool.v[layer].index_select(0, page_ids).flatten(0, 1)
            out[rows] = merge(out[rows], lse[rows], *attend_shared(q[rows], k, v, params))
        return out

    def _decode_from(
        self, layer: int, q: Tensor, starts: NDArray[np.int32], params: AttentionParams
    ) -> tuple[Tensor, Tensor]:
        """Outputs and log-sum-exps of each decode over its tokens from `starts` on."""
        sinks = np.full(q.shape[1], numba_cpu.NO_SINK, np.float32)
        if params.sinks is not None:
            sinks = params.sinks.detach().float().numpy()
        out = np.empty((q.shape[0], q.shape[1], self.pool.layers[layer].v_head_dim), np.float32)
        lse = np.empty(q.shape[:2], np.float32)
        num_tokens = int((self._decode_lens - starts).sum())
        self._share_out(
            num_tokens,
            q.numpy(),
            self._k[layer],
            self._v[layer],
            self._decode_indptr,
            self._decode_indices,
            starts,
            self._decode_lens,
            np.float32(params.scale),
            np.float32(params.softcap or 0.0),
            sinks,
            out,
            lse,
        )
        return torch.from_numpy(out), torch.from_numpy(lse)

    def _share_out(self, num_tokens: int, q: NDArray[np.float32], k: NDArray[np.float32], *arguments: Any) -> None:
        """Run the kernel's tasks, over `num_tokens` in all, on this thread and the helpers, and wait for all."""
        num_tasks = len(q) * k.shape[2]
        num_threads = min(self._num_threads, num_tasks, 1 + num_tokens // MIN_TOKENS_PER_THREAD)
        bounds = np.linspace(0, num_tasks, min(num_tasks, num_threads * CHUNKS_PER_THREAD) + 1, dtype=np.int64)
        chunks = count()

        def work() -> None:
            while (chunk := next(chunks)) < len(bounds) - 1:  # next() is atomic
                numba_cpu.paged_decode(bounds[chunk], bounds[chunk + 1], q, k, *arguments)

        helpers = [self._helpers.submit(work) for _ in range(num_threads - 1)]
        try:
            work()
        finally:
            for helper in helpers:
                helper.result()
