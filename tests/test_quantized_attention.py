"""Attention over KV that is kept as codes is attention over what the codes stand for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from attention_cases import Case, Spans
from radixkv.attention.backend import choose_backend, why_not
from radixkv.errors import UnsupportedBackendError
from radixkv.memory.kv_codes import CODE_FORMS
from stress_cases import some_of

SPANS = [(0, 1), (0, 13), (20, 21), (37, 38), (15, 33), (16, 17), (31, 32), (3, 40)]  # [first, last) of each sequence
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 7},
    "streaming": {"sliding_window": 7, "sink_tokens": 4},
    "chunk, softcap and sinks": {"chunk_size": 8, "softcap": 3.0, "sinks": True},
}
TOLERANCE = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
HALVES = [torch.float16, torch.bfloat16]
EVERY_BACKEND = pytest.mark.parametrize("backend", ["numba", "torch"])
EVERY_CODE = pytest.mark.parametrize("kv_dtype", CODE_FORMS)


def check(backend: str, spans: Spans, option: str = "plain", **shape: Any) -> None:
    """The backend agrees with the reference over the values as they are kept."""
    case = Case(spans, **shape)
    params = case.params(**OPTIONS[option])
    assert why_not(backend, case.needs(params)) is None
    case.check(backend, params, TOLERANCE[case.dtype])


@EVERY_BACKEND
@EVERY_CODE
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("page_size", [16, 48])
def test_options(backend: str, kv_dtype: str, option: str, page_size: int) -> None:
    check(backend, SPANS, option, page_size=page_size, num_q_heads=8, num_kv_heads=4, kv_dtype=kv_dtype)


# (query heads of a KV head, head_dim). Every pair of a code and a number of rows is a kernel to compile, for seconds.
# So every code is covered with what other tests compile: 2 and 8 rows, and 3, as the demo model has, of two codes.
GROUPS = [(1, 64), (5, 64), (6, 64), (8, 64), (6, 80), (1, 256)]
GROUPS_OF = {
    "int8": [(2, 64), (8, 64), (3, 80), (2, 256)],
    "int4": [(2, 64), (8, 64), (3, 64), (2, 256)],
    "fp8_e4m3": [(2, 64), (8, 80)],
    "fp8_e5m2": [(2, 64), (8, 64), (2, 256)],
    "fp4": [(2, 64), (8, 80), (8, 96), (2, 256)],
}


@EVERY_BACKEND
@pytest.mark.parametrize(
    ("kv_dtype", "group", "head_dim"), [(code, *size) for code, sizes in GROUPS_OF.items() for size in sizes]
)
def test_groups_and_head_sizes(backend: str, kv_dtype: str, group: int, head_dim: int) -> None:
    check(backend, SPANS[2:6], num_q_heads=2 * group, head_dim=head_dim, kv_dtype=kv_dtype)


@pytest.mark.stress
@EVERY_BACKEND
@EVERY_CODE
@pytest.mark.parametrize(("group", "head_dim"), GROUPS)
def test_every_group_of_every_code(backend: str, kv_dtype: str, group: int, head_dim: int) -> None:
    check(backend, SPANS[2:6], num_q_heads=2 * group, head_dim=head_dim, kv_dtype=kv_dtype)


@EVERY_CODE
def test_the_reference_backend_hands_on_what_the_reference_computes(kv_dtype: str) -> None:
    check("reference", SPANS, "streaming", num_kv_heads=4, kv_dtype=kv_dtype)


@EVERY_BACKEND
@EVERY_CODE
def test_values_of_another_size_than_keys(backend: str, kv_dtype: str) -> None:
    check(backend, SPANS, num_q_heads=8, num_kv_heads=4, head_dim=48, v_head_dim=16, kv_dtype=kv_dtype)


@EVERY_BACKEND
@pytest.mark.parametrize("kv_dtype", some_of(CODE_FORMS, {"int8", "int4"}))
def test_extends_over_prefixes_of_every_length_around_page_borders(backend: str, kv_dtype: str) -> None:
    spans = [(first, last) for last in range(14, 35) for first in range(max(0, last - 18), last)]
    check(backend, spans, num_q_heads=4, num_kv_heads=2, kv_dtype=kv_dtype)


@EVERY_BACKEND
@pytest.mark.parametrize("kv_dtype", some_of(CODE_FORMS, {"int4", "fp8_e4m3"}))
@pytest.mark.parametrize("dtype", [torch.float32, *(pytest.param(d, marks=pytest.mark.stress) for d in HALVES)])
def test_shared_prefixes_count_the_same(backend: str, kv_dtype: str, dtype: torch.dtype) -> None:
    lasts = [2305, 2340, 2333, 2400, 2306, 2499, 2310, 2370, 1700, 30]
    spans = [*((last - 1, last) for last in lasts), (20, 45)]
    shared = {tuple(range(9)): 1536, tuple(range(8)): 2304}
    check(backend, spans, num_q_heads=8, num_kv_heads=4, dtype=dtype, kv_dtype=kv_dtype, shared=shared)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"page_size": 8, "kv_dtype": "int8"}, "reads int8 KV in pages of whole 16 tokens, and they have 8"),
        ({"head_dim": 12, "kv_dtype": "int4"}, "takes 8 components of int4 KV together, and the model's heads have 12"),
    ],
)
def test_what_the_compiled_kernel_cannot_read_is_read_by_torch(shape: dict[str, Any], reason: str) -> None:
    case = Case(SPANS, **shape)
    needs = case.needs(case.params())
    with pytest.raises(UnsupportedBackendError, match=reason):
        choose_backend("numba", needs)
    check("torch", SPANS, **shape)


@EVERY_BACKEND
@EVERY_CODE
@pytest.mark.parametrize("of", ["k", "v"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_comes_through(backend: str, kv_dtype: str, of: str, bad: float) -> None:
    """In the sequence that holds it, and no other. A score of minus infinity is none: where e5m2 keeps infinity, some
    heads of K are spared.
    """
    case = Case([(37, 38), (20, 21)], num_q_heads=8, num_kv_heads=4, kv_dtype=kv_dtype)
    first_page = int(case.metadata.kv_indices[0])
    getattr(case, of)[first_page * case.page_size + 3, :, 5] = bad
    first, second = case.plan(backend, case.params()).attend(0, case.q, case.params())
    assert not first.isfinite().all()
    assert second.isfinite().all()
