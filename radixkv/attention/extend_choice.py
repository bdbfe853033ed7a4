"""Which of two ways computes long extends faster on this machine: our kernel on the pages, or torch's dense product.

Ours was faster than torch on the processors that were measured (AVX2, and AVX-512 in float32; docs/attention.md).
Others have units for dense products that a library reaches and we do not (AMX, bfloat16 on AVX-512, Apple's). There,
both are timed once, and what was found is kept beside the compiled kernels.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal

import llvmlite.binding as llvm
import numpy as np
import torch
from torch import Tensor

from radixkv.attention.backend import AttentionNeeds, AttentionParams, BackendClass
from radixkv.attention.metadata import SequenceSpan, build_metadata
from radixkv.kernels.compiling import kept_folder
from radixkv.kernels.processor import Processor
from radixkv.memory.quantized_pool import make_kv_pool

LongExtends = Literal["kernel", "dense"]
MIN_DENSE_TOKENS = 256  # of an extend, from where on it is long; shorter ones are our kernel's
MEASURED_ROUNDS = 5
CLEARLY_FASTER = 1.1  # torch's way reads all KV once more, and needs memory for it

logger = logging.getLogger(__name__)


def is_known(processor: Processor, dtype: torch.dtype) -> bool:
    """Whether the kernel was measured to be faster on such a processor, so that there is nothing to find out."""
    return processor.lanes == 8 or (processor.lanes == 16 and dtype == torch.float32)


def faster_extends(needs: AttentionNeeds, backend: BackendClass, *, num_threads: int) -> LongExtends:
    """The way in which `backend` computes long extends of the model's first layer faster, timed once on this machine.

    Timed is an extend by `MIN_DENSE_TOKENS` on four times as many tokens, on KV of its own.
    """
    layer = next(layer for layer in needs.layers if layer.kv.holds_kv)
    shape = (layer.num_q_heads, layer.kv, needs.dtype, needs.kv_dtype, needs.page_size, num_threads)
    key = ", ".join(map(str, (llvm.get_host_cpu_name(), f"torch {torch.__version__}", *shape)))
    return remembered(key, lambda: _measure(replace(needs, layers=(layer,)), backend))


def _measure(needs: AttentionNeeds, backend: BackendClass) -> LongExtends:
    (layer,) = needs.layers
    last = 5 * MIN_DENSE_TOKENS
    pages = np.arange(-(-last // needs.page_size), dtype=np.int32)
    metadata, everything = (
        build_metadata([SequenceSpan(first, last, pages)], page_size=needs.page_size, device=needs.device)
        for first in (last - MIN_DENSE_TOKENS, 0)
    )
    pool = make_kv_pool(
        backend.layout(needs),
        [layer.kv],
        kv_dtype=needs.kv_dtype,
        num_pages=len(pages),
        page_size=needs.page_size,
        dtype=needs.dtype,
        device=needs.device,
    )
    k, v = (_ones(needs, last, layer.kv.num_kv_heads, dim) for dim in (layer.kv.k_head_dim, layer.kv.v_head_dim))
    pool.write(0, everything.slots, k, v)
    q = _ones(needs, MIN_DENSE_TOKENS, layer.num_q_heads, layer.kv.k_head_dim)
    plain = AttentionParams(layer.params.scale)
    plans = [backend(pool, replace(needs, long_extends=way)).plan(metadata) for way in ("kernel", "dense")]
    return faster_of(*(partial(plan.attend, 0, q, plain) for plan in plans))


def _ones(needs: AttentionNeeds, *shape: int) -> Tensor:
    return torch.ones(shape, dtype=needs.dtype, device=needs.device)


def faster_of(kernel: Callable[[], object], dense: Callable[[], object]) -> LongExtends:
    """Time both, in turns; "dense" only if it is clearly faster."""
    ratios = []
    for round_number in range(1 + MEASURED_ROUNDS):
        took = []
        for run in (kernel, dense):
            start = time.perf_counter()
            run()
            took.append(time.perf_counter() - start)
        if round_number:  # the first one warms up
            ratios.append(took[0] / took[1])
    return "dense" if median(ratios) >= CLEARLY_FASTER else "kernel"


def remembered(key: str, measure: Callable[[], LongExtends], folder: Path | None = None) -> LongExtends:
    """What was found for `key` before, by this or another process; else what `measure` finds, which is then kept.

    A file that cannot be read or written is no reason to fail: then each process measures for itself.
    """
    folder = folder or kept_folder()
    path = None if folder is None else folder / "radixkv-long-extends.json"
    found = {} if path is None else _read(path)
    if found.get(key) in ("kernel", "dense"):
        return found[key]
    choice = measure()
    if path is not None:
        _write(path, {**_read(path), key: choice})
    return choice


def _read(path: Path) -> dict[str, LongExtends]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, found: dict[str, LongExtends]) -> None:
    try:
        beside = path.with_suffix(f".{time.time_ns()}")
        beside.write_text(json.dumps(found, indent=2), encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        logger.warning("what was measured about long extends cannot be kept, so each process measures it (%s)", error)
