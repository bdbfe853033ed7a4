"""What FlashInfer 0.6.18 does in the calls that radixkv makes of it, by torch: dull, on any device, and strict.

The signatures are FlashInfer's own, as far as they are used; a test on a GPU compares them. Whatever the real one would
refuse, compute wrongly or wait for is an assertion here. Log-sum-exps are of base 2.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

HEAD_DIMS = (64, 128, 256)
CUDA_CORE_GROUPS = (1, 2, 3, 4, 6, 8)
NVFP4, NVFP4_BLOCK = torch.uint8, 16  # the type of pages of 4-bit codes, and how many of them have one scale

calls: list[str] = []  # what was run, for tests that ask


def _check_index(tensor: Tensor, device: str | torch.device, name: str) -> None:
    assert tensor.dtype == torch.int32, f"{name} is {tensor.dtype}"
    assert tensor.device.type == torch.device(device).type, f"{name} lies on {tensor.device}"
    assert tensor.is_contiguous(), name


def nvfp4_values(packed: Tensor, block_scales: Tensor) -> Tensor:
    """What the kernels make of bytes [..., dim / 2] and scales [..., dim / 16], before k_scale and v_scale: float32.

    The low 4 bits of a byte come first. A code is 1 bit of sign, 2 of exponent and 1 of fraction, with a bias of 1.
    """
    codes = torch.stack([packed % 16, packed // 16], dim=-1).flatten(-2).int()
    exponent, fraction = codes // 2 % 4, codes % 2 / 2
    magnitudes = torch.where(exponent > 0, (1 + fraction) * 2.0 ** (exponent - 1), fraction)
    return torch.where(codes < 8, magnitudes, -magnitudes) * block_scales.float().repeat_interleave(NVFP4_BLOCK, dim=-1)


class _Wrapper:
    """What both wrappers share: the planned pages, and attention over them."""

    device: torch.device
    _qo_indptr: Tensor
    _causal: bool

    def _check_plan(
        self, indptr: Tensor, indices: Tensor, last_page_len: Tensor, page_size: int, head_dim: int
    ) -> None:
        _check_index(indptr, "cpu", "indptr")
        _check_index(indices, self.device, "indices")
        _check_index(last_page_len, "cpu", "last_page_len")
        counts = indptr.diff()
        assert len(indptr) == len(last_page_len) + 1
        assert int(indptr[0]) == 0
        assert int(indptr[-1]) == len(indices)
        assert bool((counts >= 1).all()), "a sequence without pages"
        assert bool(((last_page_len >= 1) & (last_page_len <= page_size)).all())
        assert head_dim in HEAD_DIMS, head_dim

    def _remember(
        self,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        window_left: int,
        logits_soft_cap: float | None,
        dtypes: tuple[torch.dtype, torch.dtype | None],
        sm_scale: float | None,
    ) -> None:
        assert window_left >= -1
        assert dtypes[0] in (torch.float16, torch.bfloat16)
        assert dtypes[1] in (None, dtypes[0], torch.float8_e4m3fn, torch.float8_e5m2, NVFP4)
        self._q_shape = (num_qo_heads, head_dim)
        values_per_byte = 2 if dtypes[1] == NVFP4 else 1
        self._page_shape = (page_size, num_kv_heads, head_dim // values_per_byte)
        self._window_left = window_left
        self._soft_cap = logits_soft_cap or 0.0
        self._dtype, self._kv_dtype = dtypes[0], dtypes[1] or dtypes[0]
        self._scale = sm_scale if sm_scale is not None else head_dim**-0.5

    def _attend(
        self,
        q: Tensor,
        kv: tuple[Tensor, Tensor],
        pages: tuple[Tensor, Tensor, Tensor],
        out: Tensor | None,
        lse: Tensor | None,
        return_lse: bool,
        scales: tuple[float | None, float | None, tuple[Tensor, Tensor] | None],
    ) -> Any:
        k, v = kv
        k_scale, v_scale, kv_cache_sf = scales
        block_scales = self._check_block_scales(k, v, kv_cache_sf)
        assert tuple(q.shape[1:]) == self._q_shape
        assert q.stride(-1) == 1
        assert q.dtype == self._dtype
        assert k.dtype == v.dtype == self._kv_dtype
        assert tuple(k.shape[1:]) == tuple(v.shape[1:]) == self._page_shape
        assert k.stride() == v.stride()
        out = torch.zeros_like(q) if out is None else out
        assert out.shape == q.shape
        assert out.dtype == q.dtype
        assert out.is_contiguous()
        if return_lse and lse is None:
            lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        assert lse is None or (lse.shape == q.shape[:2] and lse.dtype == torch.float32 and lse.is_contiguous())
        indptr, indices, last_page_len = (tensor.tolist() for tensor in pages)
        qo_indptr = self._qo_indptr.tolist()
        for i, last in enumerate(last_page_len):
            page_ids = torch.tensor(indices[indptr[i] : indptr[i + 1]], device=q.device)
            kv_len = (len(page_ids) - 1) * self._page_shape[0] + last
            rows = slice(qo_indptr[i], qo_indptr[i + 1])
            one_k, one_v = (
                self._read(x, scale, page_ids)[:kv_len] for x, scale in zip((k, v), block_scales, strict=True)
            )
            one_out, one_lse = self._dense(q[rows].float(), one_k, one_v, 1.0 if k_scale is None else k_scale)
            out[rows] = one_out.to(out.dtype)
            if lse is not None:
                lse[rows] = one_lse
        if v_scale is not None:
            out *= v_scale
        return (out, lse) if return_lse else out

    def _check_block_scales(
        self, k: Tensor, v: Tensor, kv_cache_sf: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor | None, Tensor | None]:
        if self._kv_dtype != NVFP4:
            assert kv_cache_sf is None, "scales of KV that has none"
            return None, None
        if kv_cache_sf is None:
            raise ValueError("kv_cache_sf must be provided for NVFP4 KV cache.")
        if not isinstance(kv_cache_sf, tuple):
            raise KeyError(f"Unrecognized paged_kv_cache type {type(kv_cache_sf)}")
        page_size, num_kv_heads, _ = self._page_shape
        for pages, scales in zip((k, v), kv_cache_sf, strict=True):
            assert scales.dtype == torch.float8_e4m3fn, f"scales are {scales.dtype}"
            assert tuple(scales.shape) == (len(pages), page_size, num_kv_heads, self._q_shape[1] // NVFP4_BLOCK)
            assert scales.stride(-1) == 1, "NVFP4 scale tensor innermost stride must be 1"
            assert scales.device == pages.device
        return kv_cache_sf

    def _read(self, pages: Tensor, block_scales: Tensor | None, page_ids: Tensor) -> Tensor:
        """Values of pages, [tokens, num_kv_heads, head_dim] in float32."""
        if block_scales is None:
            return pages[page_ids].flatten(0, 1).float()
        return nvfp4_values(pages[page_ids], block_scales[page_ids]).flatten(0, 1)

    def _dense(self, q: Tensor, k: Tensor, v: Tensor, k_scale: float) -> tuple[Tensor, Tensor]:
        qo_len, kv_len = len(q), len(k)
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * (self._scale * k_scale)
        if self._soft_cap > 0:
            scores = self._soft_cap * torch.tanh(scores / self._soft_cap)
        qo_idx = torch.arange(qo_len, device=q.device)[:, None]
        kv_idx = torch.arange(kv_len, device=q.device)[None, :]
        seen = torch.ones(qo_len, kv_len, dtype=torch.bool, device=q.device)
        if self._causal:
            seen &= kv_idx <= kv_len - qo_len + qo_idx
        if self._window_left >= 0:
            seen &= kv_idx + qo_len + self._window_left >= kv_len + qo_idx
        scores = scores.masked_fill(~seen, -math.inf)
        out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
        return out, (scores.logsumexp(-1) / math.log(2)).T


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    _causal = False

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Tensor | None = None,
        paged_kv_indices_buffer: Tensor | None = None,
        paged_kv_last_page_len_buffer: Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
    ) -> None:
        assert kv_layout == "NHD"
        assert backend in ("auto", "fa2")
        assert float_workspace_buffer.dtype == torch.uint8
        self.device = float_workspace_buffer.device
        self._use_tensor_cores, self._use_cuda_graph = use_tensor_cores, use_cuda_graph
        if use_cuda_graph:
            assert paged_kv_indptr_buffer is not None
            assert paged_kv_indices_buffer is not None
            assert paged_kv_last_page_len_buffer is not None
            self._buffers = (paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)
            for buffer in self._buffers:
                _check_index(buffer, self.device, "buffer")
            assert len(paged_kv_indptr_buffer) == len(paged_kv_last_page_len_buffer) + 1

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
        sm_scale: float | None = None,
        non_blocking: bool = True,
    ) -> None:
        self._check_plan(indptr, indices, last_page_len, page_size, head_dim)
        group, rest = divmod(num_qo_heads, num_kv_heads)
        assert rest == 0
        assert self._use_tensor_cores or group in CUDA_CORE_GROUPS, f"Unsupported group_size: {group}"
        assert self._use_tensor_cores or kv_data_type != NVFP4, "the kernels on CUDA cores take no scales of blocks"
        if self._use_cuda_graph:
            assert len(last_page_len) == len(self._buffers[2]), "The batch size should be fixed in cudagraph mode"
            assert len(indices) <= len(self._buffers[1])
            self._buffers[0].copy_(indptr)
            self._buffers[1][: len(indices)].copy_(indices)
            self._buffers[2].copy_(last_page_len)
        else:
            self._buffers = (indptr.to(self.device), indices, last_page_len.to(self.device))
        self._qo_indptr = torch.arange(len(last_page_len) + 1)
        self._remember(
            num_qo_heads,
            num_kv_heads,
            head_dim,
            page_size,
            window_left,
            logits_soft_cap,
            (q_data_type, kv_data_type),
            sm_scale,
        )

    def run(
        self,
        q: Tensor,
        paged_kv_cache: tuple[Tensor, Tensor],
        *args: Any,
        k_scale: float | None = None,
        v_scale: float | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        kv_cache_sf: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        assert len(q) == len(self._buffers[2])
        calls.append("decode")
        scales = (k_scale, v_scale, kv_cache_sf)
        return self._attend(q, paged_kv_cache, self._buffers, out, lse, return_lse, scales)


def fast_decode_plan(
    self: BatchDecodeWithPagedKVCacheWrapper,
    indptr: Tensor,
    indices: Tensor,
    last_page_len: Tensor,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    pos_encoding_mode: str = "NONE",
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    q_data_type: torch.dtype | None = None,
    kv_data_type: torch.dtype | None = None,
    data_type: torch.dtype | None = None,
    sm_scale: float | None = None,
) -> None:
    """In graph mode it leaves the buffers to the caller; it counts on what a `plan` before it has found out."""
    assert self._use_cuda_graph
    assert self._qo_indptr is not None, "no plan before"
    assert len(last_page_len) == len(self._buffers[2]), "The batch size should be fixed in cudagraph mode"
    assert len(indices) <= len(self._buffers[1])
    assert q_data_type is not None
    self._check_plan(indptr, indices, last_page_len, page_size, head_dim)
    self._remember(
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
        window_left,
        logits_soft_cap,
        (q_data_type, kv_data_type),
        sm_scale,
    )
    calls.append("fast plan")


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Tensor | None = None,
        paged_kv_indptr_buf: Tensor | None = None,
        paged_kv_indices_buf: Tensor | None = None,
        paged_kv_last_page_len_buf: Tensor | None = None,
        custom_mask_buf: Tensor | None = None,
        mask_indptr_buf: Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
        jit_kwargs: dict[str, Any] | None = None,
    ) -> None:
        assert kv_layout == "NHD"
        assert backend in ("auto", "fa2", "fa3")
        assert not use_cuda_graph
        assert float_workspace_buffer.dtype == torch.uint8
        self.device = float_workspace_buffer.device
        self._backend = backend

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: Tensor | None = None,
        packed_custom_mask: Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
        o_data_type: torch.dtype | None = None,
        non_blocking: bool = True,
    ) -> None:
        self._check_plan(paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, page_size, head_dim_qk)
        _check_index(qo_indptr, "cpu", "qo_indptr")
        assert len(qo_indptr) == len(paged_kv_indptr)
        assert custom_mask is packed_custom_mask is None
        assert head_dim_vo in (None, head_dim_qk)
        assert kv_data_type != NVFP4 or self._backend != "fa3", "FA3 does not support NVFP4 KV cache"
        self._causal = causal
        self._qo_indptr = qo_indptr.clone()
        self._pages = (paged_kv_indptr.clone(), paged_kv_indices, paged_kv_last_page_len.clone())
        self._remember(
            num_qo_heads,
            num_kv_heads,
            head_dim_qk,
            page_size,
            window_left,
            logits_soft_cap,
            (q_data_type, kv_data_type),
            sm_scale,
        )

    def run(
        self,
        q: Tensor,
        paged_kv_cache: tuple[Tensor, Tensor],
        *args: Any,
        k_scale: float | None = None,
        v_scale: float | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        kv_cache_sf: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        assert len(q) == int(self._qo_indptr[-1])
        calls.append("causal prefill" if self._causal else "prefill")
        scales = (k_scale, v_scale, kv_cache_sf)
        return self._attend(q, paged_kv_cache, self._pages, out, lse, return_lse, scales)


def merge_state_in_place(v: Tensor, s: Tensor, v_other: Tensor, s_other: Tensor, mask: Tensor | None = None) -> None:
    assert v.shape == v_other.shape
    assert s.shape == s_other.shape == v.shape[:2]
    assert s.dtype == s_other.dtype == torch.float32
    assert all(tensor.is_contiguous() for tensor in (v, s, v_other, s_other))
    assert mask is None
    highest = torch.maximum(s, s_other)
    own, other = torch.exp2(s - highest), torch.exp2(s_other - highest)
    merged = (own[..., None] * v.float() + other[..., None] * v_other.float()) / (own + other)[..., None]
    v.copy_(merged)
    s.copy_(highest + torch.log2(own + other))


def softmax(logits: Tensor, temperature: Tensor | float | None = None, enable_pdl: bool | None = None) -> Tensor:
    if temperature is None:
        return logits.float().softmax(-1)
    _check_rows(logits, temperature)
    scale = temperature[:, None] if isinstance(temperature, Tensor) else temperature
    return (logits.float() / scale).softmax(-1)


def top_k_renorm_probs(probs: Tensor, top_k: Tensor | int) -> Tensor:
    _check_rows(probs, top_k)
    kept = torch.zeros_like(probs)
    for row in range(len(probs)):
        k = min(int(top_k[row]) if isinstance(top_k, Tensor) else top_k, probs.shape[1])
        best = probs[row].topk(k).indices
        kept[row, best] = probs[row, best]
    return kept / kept.sum(-1, keepdim=True)


def top_p_renorm_probs(probs: Tensor, top_p: Tensor | float, is_deterministic: bool = False) -> Tensor:
    _check_rows(probs, top_p)
    kept = torch.zeros_like(probs)
    for row in range(len(probs)):
        p = float(top_p[row]) if isinstance(top_p, Tensor) else top_p
        order = probs[row].argsort(descending=True)
        before = probs[row, order].cumsum(0) - probs[row, order]
        best = order[before < p]
        kept[row, best] = probs[row, best]
    return kept / kept.sum(-1, keepdim=True)


def sampling_from_probs(
    probs: Tensor,
    indices: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    assert probs.dtype == torch.float32
    assert indices is None
    assert bool(torch.isfinite(probs).all()), "a row that cannot be sampled from"
    return torch.multinomial(probs, 1, generator=generator)[:, 0].to(torch.int32)


def top_p_sampling_from_probs(
    probs: Tensor,
    top_p: Tensor | float,
    indices: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    return sampling_from_probs(top_p_renorm_probs(probs, top_p), indices, deterministic, generator)


def min_p_sampling_from_probs(
    probs: Tensor,
    min_p: Tensor | float,
    indices: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    _check_rows(probs, min_p)
    limit = (min_p[:, None] if isinstance(min_p, Tensor) else min_p) * probs.max(-1, keepdim=True).values
    return sampling_from_probs(probs.where(probs >= limit, 0.0), indices, deterministic, generator)


def top_k_top_p_sampling_from_probs(
    probs: Tensor,
    top_k: Tensor | int,
    top_p: Tensor | float,
    indices: Tensor | None = None,
    filter_apply_order: str = "top_k_first",
    deterministic: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    assert filter_apply_order == "top_k_first"
    return top_p_sampling_from_probs(top_k_renorm_probs(probs, top_k), top_p, indices, deterministic, generator)


def _check_rows(rows: Tensor, parameter: Tensor | float) -> None:
    if isinstance(parameter, Tensor):
        assert parameter.shape == rows.shape[:1], "Sampling parameter tensor batch size mismatch"
        assert parameter.device == rows.device
