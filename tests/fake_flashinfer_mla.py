"""What FlashInfer 0.6.18 does in the calls that radixkv makes of it for latent attention: dull, on any device, strict.

The signatures are FlashInfer's own, as far as they are used. Whatever the real one would refuse, compute wrongly or
wait for is an assertion here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

calls: list[int] = []  # the number of sequences of each run, for tests that ask


def _check_index(tensor: Tensor, device: str | torch.device, name: str) -> None:
    assert tensor.dtype == torch.int32, f"{name} is {tensor.dtype}"
    assert tensor.device.type == torch.device(device).type, f"{name} lies on {tensor.device}"
    assert tensor.is_contiguous(), name


class BatchMLAPagedAttentionWrapper:
    def __init__(
        self,
        float_workspace_buffer: Tensor,
        use_cuda_graph: bool = False,
        qo_indptr: Tensor | None = None,
        kv_indptr: Tensor | None = None,
        kv_indices: Tensor | None = None,
        kv_len_arr: Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        assert backend in ("auto", "fa2", "fa3")
        assert float_workspace_buffer.dtype == torch.uint8
        self.device = float_workspace_buffer.device
        self._use_cuda_graph = use_cuda_graph
        self._buffers = [qo_indptr, kv_indptr, kv_indices, kv_len_arr]
        if use_cuda_graph:
            for buffer in self._buffers:
                assert buffer is not None
                _check_index(buffer, self.device, "buffer")

    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        kv_indices: Tensor,
        kv_len_arr: Tensor,
        num_heads: int,
        head_dim_ckv: int,
        head_dim_kpe: int,
        page_size: int,
        causal: bool,
        sm_scale: float,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        use_profiler: bool = False,
    ) -> None:
        for tensor, name in ((qo_indptr, "qo_indptr"), (kv_indptr, "kv_indptr"), (kv_len_arr, "kv_len_arr")):
            _check_index(tensor, "cpu", name)
        _check_index(kv_indices, self.device, "kv_indices")
        assert len(qo_indptr) == len(kv_indptr) == len(kv_len_arr) + 1
        assert int(qo_indptr[0]) == int(kv_indptr[0]) == 0
        assert int(kv_indptr[-1]) == len(kv_indices)
        assert torch.equal(kv_indptr.diff(), -(-kv_len_arr // page_size)), "pages that do not hold the tokens"
        assert bool((qo_indptr.diff() <= kv_len_arr).all())
        assert q_data_type == kv_data_type
        assert kv_data_type in (torch.float16, torch.bfloat16)
        assert (head_dim_ckv, head_dim_kpe) == (512, 64)
        planned = [qo_indptr, kv_indptr, kv_indices, kv_len_arr]
        if self._use_cuda_graph:
            for buffer, tensor in zip(self._buffers, planned, strict=True):
                assert buffer is not None
                assert len(tensor) <= len(buffer) if tensor is kv_indices else len(tensor) == len(buffer)
                buffer[: len(tensor)].copy_(tensor)
        else:
            self._buffers = [tensor.to(self.device).clone() for tensor in planned]
        self._num_heads, self._sizes, self._page_size = num_heads, (head_dim_ckv, head_dim_kpe), page_size
        self._causal, self._scale, self._dtype = causal, sm_scale, q_data_type

    def run(
        self,
        q_nope: Tensor,
        q_pe: Tensor,
        ckv_cache: Tensor,
        kpe_cache: Tensor,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor:
        for tensor, size in zip((q_nope, q_pe, ckv_cache, kpe_cache), self._sizes * 2, strict=True):
            assert tensor.dim() == 3
            assert tensor.shape[-1] == size
            assert tensor.stride(-1) == 1
            assert tensor.data_ptr() % 16 == 0, "rows are read 16 bytes at a time"
            assert tensor.dtype == self._dtype
        assert q_nope.shape[1] == q_pe.shape[1] == self._num_heads
        assert ckv_cache.shape[1] == kpe_cache.shape[1] == self._page_size
        assert out is not None
        assert out.shape == q_nope.shape
        assert out.dtype == q_nope.dtype
        assert lse is None
        assert not return_lse
        qo_indptr, kv_indptr, kv_indices, kv_lens = (buffer.tolist() for buffer in self._buffers)
        assert len(q_nope) == qo_indptr[-1]
        calls.append(len(kv_lens))
        for i, kv_len in enumerate(kv_lens):
            rows = slice(qo_indptr[i], qo_indptr[i + 1])
            pages = torch.tensor(kv_indices[kv_indptr[i] : kv_indptr[i + 1]], device=q_nope.device)
            ckv, kpe = (cache[pages].flatten(0, 1)[:kv_len].float() for cache in (ckv_cache, kpe_cache))
            scores = q_nope[rows].float() @ ckv.T + q_pe[rows].float() @ kpe.T  # [rows, heads, kv_len]
            if self._causal:
                later = torch.ones(scores.shape[0], kv_len, dtype=torch.bool).triu(kv_len - scores.shape[0] + 1)
                scores = scores.masked_fill(later[:, None].to(scores.device), -math.inf)
            out[rows] = ((scores * self._scale).softmax(-1) @ ckv).to(out.dtype)
        return out
