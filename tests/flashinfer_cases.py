"""What the tests of FlashInfer's backend share: where they run, and how a case is compared with the reference."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fake_flashinfer
from attention_cases import TOLERANCE, Case
from radixkv.attention import flashinfer_backend
from radixkv.attention.backend import AttentionParams, GraphPlan
from radixkv.attention.flashinfer_backend import FlashInferBackend
from radixkv.attention.metadata import AttentionMetadata
from radixkv.attention.shared_prefix import BreakEven

HAS_FLASHINFER = torch.cuda.is_available() and importlib.util.find_spec("flashinfer") is not None
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not HAS_FLASHINFER, reason="needs CUDA and flashinfer")]


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    for mark in ON_GPU:
        test = mark(test)
    return test


SPANS = [(0, 1), (0, 13), (20, 21), (37, 38), (15, 33), (16, 17), (31, 32), (3, 40)]  # [first, last) of each sequence
DECODES = [(20, 21), (37, 38), (16, 17), (31, 32)]
ALWAYS = BreakEven(min_sequences=2, min_tokens=1)

MakeCase = Callable[..., Case]


def use_fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the backend run on the CPU, by the fake."""
    fake_flashinfer.calls.clear()
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer)
    monkeypatch.setattr(flashinfer_backend, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(flashinfer_backend, "WORKSPACE_BYTES", 1 << 10)


def make_backend(case: Case, params: AttentionParams, **options: Any) -> FlashInferBackend:
    needs = case.needs(params)
    assert FlashInferBackend.why_not(needs) is None
    return FlashInferBackend(case.pool(FlashInferBackend.layout(needs)), needs, **options)


def check(case: Case, backend: FlashInferBackend, params: AttentionParams) -> None:
    compare(case, backend.plan(case.metadata).attend(0, case.q, params), params)


def compare(case: Case, found: Tensor, params: AttentionParams) -> None:
    torch.testing.assert_close(found.double().cpu(), case.expected(params), rtol=0, atol=TOLERANCE[case.dtype])


def some_decodes(metadata: AttentionMetadata, first: int, last: int) -> AttentionMetadata:
    """The sequences [first, last) of decodes."""
    pages = slice(*metadata.kv_indptr[[first, last]])
    return AttentionMetadata(
        page_size=metadata.page_size,
        qo_indptr=metadata.qo_indptr[: last - first + 1],
        kv_indptr=metadata.kv_indptr[first : last + 1] - metadata.kv_indptr[first],
        kv_indices=metadata.kv_indices[pages],
        kv_last_page_len=metadata.kv_last_page_len[first:last],
        kv_lens=metadata.kv_lens[first:last],
        positions=metadata.positions[first:last],
        slots=metadata.slots[first:last],
    )


def graph_plan(backend: FlashInferBackend, batch_size: int, max_pages: int) -> GraphPlan:
    return backend.graph_plan(torch.zeros(batch_size, dtype=torch.int64, device=backend.pool.device), max_pages)
