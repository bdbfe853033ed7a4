"""Compiles the Triton kernels for a GPU of compute capability 9.0, as the backend would launch them; needs no GPU.

Run by test_triton in a process of its own, where Triton does not interpret.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from radixkv.kernels import triton_paged
from radixkv.kernels.triton_device import E4M3, E5M2
from radixkv.kernels.triton_paged import Decodes, PagedKV, Partials, Rule, Tiles

SHARED_MEMORY_BYTES = 227 << 10  # of a program


class NoLaunch:
    """Stands in for CUDA's driver, as far as compiling asks it."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    compiled = run(kernel, *args, grid=grid, warmup=True, **kwargs)
    assert compiled.metadata.shared <= SHARED_MEMORY_BYTES, (kernel, kwargs, compiled.metadata.shared)


def check(
    q_dtype: torch.dtype,
    kv_dtype: torch.dtype,
    group: int,
    head_dim: int,
    page_size: int,
    rule: Rule,
    tile_counts: Sequence[int] = (1, 64, 1000),
    *,
    blocks: bool = False,
) -> None:
    """Compile what decodes, extends and shared prefixes of one shape launch."""
    num_kv_heads, ints = 2, torch.zeros(8, dtype=torch.int32)
    packed, float8 = kv_dtype == torch.uint8, {torch.float8_e4m3fn: E4M3, torch.float8_e5m2: E5M2}.get(kv_dtype)
    pages = torch.zeros(
        1, page_size, num_kv_heads, head_dim // (2 if packed else 1), dtype=kv_dtype if float8 is None else torch.uint8
    )
    scales = torch.zeros(pages.shape[:3]) if kv_dtype == torch.int8 else None
    if packed and blocks:
        scales = torch.zeros(*pages.shape[:3], head_dim // 16, dtype=torch.uint8)
    elif packed:
        scales = torch.zeros(*pages.shape[:3], 2, dtype=torch.bfloat16)
    kv = PagedKV(pages, pages, scales, scales, float8)
    q = torch.zeros(4, group * num_kv_heads, head_dim, dtype=q_dtype)
    partials = Partials(torch.zeros(4, *q.shape[1:]), torch.zeros(4, q.shape[1]), ints)
    decodes = Decodes(ints, ints, ints, ints, ints)
    triton_paged.decode(q, kv, decodes, rule, q)
    triton_paged.decode_parts(q, kv, decodes, rule, 2, partials)
    triton_paged.merge(partials, ints, rule.sinks, q)
    for num_rows in tile_counts:
        rows = triton_paged.tile_rows(num_rows, head_dim, q_dtype)
        tiles = Tiles(ints.view(-1, 8), rows, ints, torch.zeros(4, dtype=torch.int64))
        triton_paged.attend(q, kv, tiles, rule, q)
    triton_paged.attend_parts(q, kv, tiles._replace(members=ints, slots=ints), rule, partials)
    if kv_dtype == q_dtype:
        triton_paged.write(q[:, :num_kv_heads], q[:, :num_kv_heads], torch.zeros(4, dtype=torch.int64), kv)


run = JITFunction.run
JITFunction.run = compile_only
driver.set_active(NoLaunch())
half, plain = torch.bfloat16, Rule(0.1)
rich = Rule(0.1, 64, 32, 5.0, torch.zeros(16, dtype=torch.bfloat16), torch.zeros(16, 64))
for rule in rich, plain:  # every kernel, with all that is optional and with none of it; larger blocks take longest
    check(half, half, 4, 16, 16, rule, tile_counts=(1,))
if sys.argv[1] == "all":
    check(half, half, 4, 128, 16, rich)
    check(half, half, 4, 128, 16, plain)
    check(half, half, 1, 128, 16, plain._replace(key_bias=rich.key_bias))
    check(half, torch.int8, 4, 128, 16, rich)
    check(half, torch.uint8, 4, 128, 16, plain)
    check(half, torch.uint8, 4, 128, 16, plain, blocks=True)
    check(half, torch.float8_e4m3fn, 4, 128, 16, plain)
    check(torch.float16, torch.float16, 7, 80, 1, rich._replace(sinks=None))
    check(half, half, 8, 256, 16, rich)
    check(half, half, 71, 64, 16, plain)
    check(half, half, 1, 512, 16, plain)
    check(half, torch.int8, 1, 256, 16, plain)
    check(torch.float16, torch.uint8, 7, 80, 1, rich._replace(sinks=None))
    check(torch.float16, torch.uint8, 7, 80, 1, rich._replace(sinks=None), blocks=True)
    check(torch.float16, torch.float8_e5m2, 1, 256, 16, rich._replace(sinks=None))
    check(torch.float32, torch.float32, 2, 64, 16, plain)
    check(torch.float32, torch.float32, 4, 256, 1, rich)
