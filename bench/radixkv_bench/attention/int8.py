"""Decodes over int8 KV by our Triton kernels: half the bytes of 16 bit, and a scale for each token and head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from radixkv.kernels import triton_paged
from radixkv.kernels.triton_paged import Decodes, PagedKV, Partials, Rule
from radixkv_bench.attention.setup import Setup

TOLERANCE = 0.1  # codes have 8 bits
LARGEST_CODE = 127
PROGRAMS_A_PROCESSOR = 8


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of [..., head_dim]: the largest value of each vector has the largest code.

    >>> codes, scales = quantise(torch.tensor([[0.5, -1.0]]))
    >>> codes.tolist(), round(float(scales[0]) * 127, 3)
    ([[64, -127]], 1.0)
    """
    values = x.float()
    scales = values.abs().amax(-1).clamp_min(1e-12) / LARGEST_CODE
    return (values / scales[..., None]).round().to(torch.int8), scales


def make(setup: Setup) -> tuple[Callable[[int], Tensor], int]:
    """What runs a layer, and the bytes that it reads."""
    pool, case = setup.pool("nhd"), setup.case
    layers = [_quantised(k, v) for k, v in zip(pool.k, pool.v, strict=True)]
    decodes = _decodes(setup)
    num_splits = _num_splits(setup)
    partials = _partials(setup, num_splits)
    rule = Rule(setup.params.scale)

    def run(layer: int) -> Tensor:
        out = torch.empty_like(setup.q)
        if num_splits == 1:
            triton_paged.decode(setup.q, layers[layer], decodes, rule, out)
        else:
            triton_paged.decode_parts(setup.q, layers[layer], decodes, rule, num_splits, partials)
            triton_paged.merge(partials, decodes.rows, None, out)
        return out

    scale_bytes = layers[0].k_scale.element_size() if layers[0].k_scale is not None else 0
    return run, case.kv_bytes(torch.int8) + case.distinct_tokens * case.kv_heads * 2 * scale_bytes


def _quantised(k: Tensor, v: Tensor) -> PagedKV:
    (k_codes, k_scales), (v_codes, v_scales) = quantise(k), quantise(v)
    return PagedKV(k_codes, v_codes, k_scales, v_scales)


def _decodes(setup: Setup) -> Decodes:
    metadata = setup.metadata(with_path=False)
    rows = torch.arange(setup.case.batch, dtype=torch.int32, device=setup.device)
    first_pages, pages, kv_lens = (
        torch.from_numpy(x).to(setup.device) for x in (metadata.kv_indptr[:-1], metadata.kv_indices, metadata.kv_lens)
    )
    return Decodes(rows, first_pages, pages, torch.zeros_like(rows), kv_lens)


def _num_splits(setup: Setup) -> int:
    """Parts of each sequence: enough programs for all processors of the device."""
    case = setup.case
    programs = case.batch * triton_paged.decode_programs(case.q_heads // case.kv_heads, case.kv_heads)
    if setup.device.type != "cuda":
        return 2
    processors: int = torch.cuda.get_device_properties(setup.device).multi_processor_count
    return max(1, round(PROGRAMS_A_PROCESSOR * processors / programs))


def _partials(setup: Setup, num_splits: int) -> Partials:
    case = setup.case
    shape = (case.batch * num_splits, case.q_heads)
    return Partials(
        torch.empty(*shape, case.head_dim, device=setup.device),
        torch.empty(shape, device=setup.device),
        torch.arange(case.batch + 1, dtype=torch.int32, device=setup.device) * num_splits,
    )
